# SPDX-License-Identifier: Apache-2.0
"""Trains the demo models: `python -m benchmarks.demo.train --out FOLDER`, or with --draft the draft model.

Uses the product's dense forward pass, differentiated by JAX. The folder holds a complete model after the first minutes,
and a better one after every save.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from benchmarks.demo import optimizer, packing, shapes, vocabulary
from benchmarks.demo.corpus import USUAL_TOPICS
from convert.load import load_model
from jaxserve.models import param_layout
from jaxserve.models.decoder import Params, forward
from jaxserve.models.registry import spec_of
from jaxserve.models.spec import ModelSpec

# Short rows train fastest; later rows are longer, and some have the model's maximum length.
SHORT, USUAL = packing.BatchShape(16, 128, USUAL_TOPICS), packing.BatchShape(8, 256, USUAL_TOPICS)
LONG = packing.BatchShape(1, shapes.LENGTH, 60)
LOG, LOG_EVERY, SAVE_EVERY = "training_log.json", 50, 180.0  # file, steps, seconds


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    seed: int = 0  # of text and parameters
    steps: int = 4000  # of 2048 tokens each
    peak: float = 3e-3  # highest learning rate
    short_share: float = 0.6  # share of the steps, at the start, with short rows
    long_every: int = 20  # after those, one of this many steps has a row of maximum length


def start(spec: ModelSpec, seed: int) -> Params:
    """Random parameters in the public layout. Those that write to the residual stream start small."""
    random = np.random.default_rng(seed)
    params: Params = {}
    for path, leaf in param_layout.leaves(param_layout.abstract_public(spec, jnp.float32)):
        if "norm" in str(path[-2]) or str(path[-2]).endswith("_in"):
            values = np.ones(leaf.shape)
        elif path[0] == "embed":
            values = random.normal(size=leaf.shape) * 0.02
        else:
            inputs = np.prod(leaf.shape[1:]) if path[-2] == "out" else leaf.shape[-1]
            scale = (2 * len(spec.layers)) ** -0.5 if path[-2] in ("out", "down") else 1.0
            values = random.normal(size=leaf.shape) * scale * inputs**-0.5
        param_layout.put(params, path, jnp.asarray(values, jnp.float32))
    return params


def loss_of(spec: ModelSpec, public: Params, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean of the tokens' negative log probabilities."""
    logits = forward(spec, param_layout.to_engine_layout(spec, public), tokens)[:, :-1]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    weights = weights[:, 1:]
    return -jnp.sum(chosen * weights) / jnp.maximum(jnp.sum(weights), 1.0)


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def update(
    spec: ModelSpec, state: optimizer.State, tokens: jax.Array, weights: jax.Array, *, steps: float, peak: float
) -> tuple[optimizer.State, jax.Array]:
    """The state after one of `steps` steps, and the loss before it."""
    loss, grads = jax.value_and_grad(partial(loss_of, spec))(state["params"], tokens, weights)
    return optimizer.step(state, grads, steps=steps, peak=peak), loss


def lessons(tokenizer: Tokenizer, plan: TrainingPlan) -> Iterator[packing.Batch]:
    """The batches of a whole training run."""
    sources = {
        shape: packing.batches(tokenizer, shape, seed=plan.seed + number)
        for number, shape in enumerate((SHORT, USUAL, LONG))
    }
    for step in range(plan.steps):
        late = step >= plan.short_share * plan.steps
        yield next(sources[LONG if late and step % plan.long_every == 0 else USUAL if late else SHORT])


def train(out: Path, plan: TrainingPlan, *, draft: bool, begin: Path | None = None) -> None:
    """`begin`: the folder of an earlier run, whose parameters and tokenizer to start from."""
    tokenizer = vocabulary.train() if begin is None else Tokenizer.from_file(str(begin / "tokenizer.json"))
    steps = plan.steps
    spec = spec_of(shapes.config(tokenizer, draft=draft))
    if begin is None:
        params = start(spec, plan.seed)
    else:
        params = param_layout.to_public_layout(spec, load_model(begin, dtype="float32")[1])
    runs: list[Any] = [] if begin is None else json.loads((begin / LOG).read_text())["runs"]
    state = optimizer.start(params)
    began = saved = time.monotonic()
    curve: list[dict[str, float]] = []
    runs.append({**asdict(plan), **_origin(), "curve": curve})
    losses: list[jax.Array] = []
    seen = 0
    for step, (tokens, weights) in enumerate(lessons(tokenizer, plan), 1):
        state, loss = update(spec, state, jnp.asarray(tokens), jnp.asarray(weights), steps=float(steps), peak=plan.peak)
        losses.append(loss)
        seen += tokens.size
        if step % LOG_EVERY == 0 or step == steps:
            mean, seconds = float(np.mean([float(one) for one in losses])), time.monotonic() - began
            losses.clear()
            curve.append({"step": step, "tokens": seen, "loss": round(mean, 4), "seconds": round(seconds, 1)})
            print(f"step {step}/{steps}  loss {mean:.4f}  {seen / seconds:.0f} tokens/s  {seconds:.0f} s", flush=True)
            if step == steps or time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                shapes.write(out, tokenizer, state["params"], draft=draft)
                (out / LOG).write_text(_as_json(runs))


def _origin() -> dict[str, Any]:
    names = ("jaxserve", "jax", "jaxlib", "flax", "tokenizers")
    return {"device": jax.devices()[0].device_kind, "versions": {name: version(name) for name in names}}


def _as_json(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line for each point of the curves."""
    parts: list[str] = []
    for run in runs:
        lines = ",\n    ".join(json.dumps(point) for point in run["curve"])
        head = json.dumps({name: value for name, value in run.items() if name != "curve"})
        parts.append(f'{head[:-1]}, "curve": [\n    {lines}\n  ]}}')
    return '{"runs": [\n  ' + ",\n  ".join(parts) + "\n]}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a demo model. The class TrainingPlan explains the numbers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--draft", action="store_true", help="train the draft model, which is ten times smaller")
    for field in fields(TrainingPlan):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--start", type=Path, help="folder of an earlier run to resume from")
    given = parser.parse_args()
    plan = TrainingPlan(**{field.name: getattr(given, field.name) for field in fields(TrainingPlan)})
    train(given.out, plan, draft=given.draft, begin=given.start)


if __name__ == "__main__":
    main()
