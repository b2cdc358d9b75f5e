# SPDX-License-Identifier: Apache-2.0
"""Where the memory would go if a model were served: from its config and headers, for accelerators that are described.

All is computed on a CPU, with as many of its devices as the plan has, for their shardings alone. What a step's programs
take for themselves is known only once they are compiled: here it is estimated.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError, UsageError

MAX_DEVICES = 16


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a plan needs to know of a model."""

    name: str
    architecture: str
    spec: Any
    stored: Any  # dtype of the checkpoint
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes are per device."""

    dtype: str
    memory: int | None  # to use; None on a CPU, where the cache has a size of its own
    weights: int
    state: int
    step: int  # estimated
    slack: int
    block_size: int
    block_bytes: int
    blocks: int  # without the null block; 0 or less where nothing is left
    max_model_len: int
    held: int  # blocks of the longest sequence
    max_num_seqs: int
    max_num_batched_tokens: int
    insisted: bool  # the length was asked for, and is not shortened

    @property
    def tokens(self) -> int:
        return max(self.blocks, 0) * self.block_size

    @property
    def fits(self) -> bool:
        return self.blocks >= (self.held if self.insisted else 1)

    @property
    def served_len(self) -> int:
        """The longest sequence that will be taken."""
        return self.max_model_len if self.blocks >= self.held else self.tokens

    @property
    def concurrency(self) -> float:
        """How many sequences of the longest kind fit at once."""
        return max(self.blocks, 0) / min(self.held, max(self.blocks, 1))


# --- the model ------------------------------------------------------------------------------------------------------


def read(config: EngineConfig) -> Model:
    """From its config, and from the headers of its weights where those are here: none are downloaded."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from convert import load
    from convert.files import hub
    from jaxserve.models import hf, param_layout

    cache = Path(config.download_dir).expanduser() if config.download_dir else None
    folder = hub.fetch(config.model, revision=config.revision, cache_dir=cache, weights=False)
    raw = hf.read_json(folder / "config.json")
    there = (folder / "spec.json").exists() or any(folder.glob("*.safetensors*"))
    if there:
        opened = load.open_model(folder)
        spec, stored = opened.spec, np.dtype(opened.stored_dtype())
    else:
        spec, name = load.open_spec(folder), raw.get("dtype", raw.get("torch_dtype"))
        known = name if isinstance(name, str) and name in ("float16", "float32") else "bfloat16"
        stored = jnp.dtype(known)
    public: Any = param_layout.abstract_public(spec, jnp.float32)
    leaves: list[Any] = jax.tree.leaves(public)
    parameters = sum(math.prod(leaf.shape) for leaf in leaves)
    architectures = raw.get("architectures") or [spec.family]
    return Model(
        name=config.model,
        architecture=str(architectures[0]),
        spec=spec,
        stored=stored,
        parameters=parameters,
    )


# --- the plan -------------------------------------------------------------------------------------------------------


def planned(config: EngineConfig, model: Model, memory: int | None) -> Plan:
    """Where the memory goes. `memory` None means a CPU."""
    import jax
    import jax.numpy as jnp

    from jaxserve.config import held_blocks
    from jaxserve.engine.execute import loading, sizing
    from jaxserve.models import param_layout

    spec = model.spec
    if config.max_model_len is not None and config.max_model_len > spec.max_positions:
        problem = f"--max-model-len is {config.max_model_len}, and the model takes {spec.max_positions}"
        raise UsageError(problem, f"give at most {spec.max_positions}")
    auto = jnp.dtype(jnp.float32) if memory is None else model.stored
    dtype = auto if config.dtype == "auto" else jnp.dtype(config.dtype)
    mesh = loading.on_mesh(config, None)
    with jax.set_mesh(mesh):
        params = param_layout.abstract_params(spec, dtype)
    opened = loading.Opened(spec, params, mesh)
    rows = config.max_num_seqs or (32 if memory is None else 256)
    tokens = config.max_num_batched_tokens or max(rows, 512 if memory is None else 2048)
    if tokens < rows:
        problem = f"--max-num-batched-tokens is {tokens}, below --max-num-seqs, {rows}"
        raise UsageError(problem, f"every running sequence needs a token in each step: give --max-num-seqs {tokens}")
    longest = config.max_model_len or spec.max_positions
    plan = Plan(
        dtype=dtype.name,
        memory=None if memory is None else int(memory * config.gpu_memory_utilization),
        weights=sizing.weight_bytes(params),
        state=_state_bytes(spec, rows, -(-longest // config.block_size)),
        step=_step_bytes(spec, dtype, rows=rows, tokens=tokens, shards=config.tensor_parallel_size),
        slack=sizing.SLACK,
        block_size=config.block_size,
        block_bytes=sizing.device_block_bytes(opened, config.block_size),
        blocks=0,
        max_model_len=longest,
        held=held_blocks(longest, config.block_size, window=sizing.window_of(spec), step=tokens),
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        insisted=config.max_model_len is not None,
    )
    return replace(plan, blocks=_blocks(config, plan) - 1)  # one is the null block


def _blocks(config: EngineConfig, plan: Plan) -> int:
    from jaxserve.engine.execute import sizing

    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes // plan.block_bytes
    if plan.memory is not None:
        return (plan.memory - plan.weights - plan.state - plan.step - plan.slack) // plan.block_bytes
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = 1 + plan.max_num_seqs * plan.held
    return max(2, min(wanted, min(sizing.CPU_CACHE, free // 4) // plan.block_bytes))


def _state_bytes(spec: Any, rows: int, width: int) -> int:
    """Block tables, last tokens, and what sampling remembers of each row."""
    import jax

    from jaxserve.sampling import controls

    shapes: Any = cast(Any, jax).eval_shape(lambda: controls.allocate(rows, spec.vocab_size))
    leaves: list[Any] = jax.tree.leaves(shapes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + 4 * rows * (width + 1)


def _step_bytes(spec: Any, dtype: Any, *, rows: int, tokens: int, shards: int) -> int:
    """About what the largest programs hold at once: a layer's activations, or logits and what is sampled from."""
    from jaxserve.engine.execute.sizing import score_rows
    from jaxserve.models.spec import Mlp

    widest = 0
    for layer in spec.layers:
        mlp = layer.mlp
        width = mlp.width if isinstance(mlp, Mlp) else mlp.width * mlp.router.top_k
        widest = max(widest, 6 * spec.hidden + 3 * width // shards)
    logits = 2 * 4 * max(rows, score_rows(tokens)) * spec.vocab_size
    return max(tokens * widest * dtype.itemsize, logits)


def alternatives(config: EngineConfig, model: Model, memory: int | None) -> Iterator[tuple[str, Plan]]:
    """Plans with one flag changed: halved, doubled, or another choice."""
    plan = planned(config, model, memory)
    for name, value in _changes(config, model, plan):
        flag = "--" + name.replace("_", "-")
        try:
            yield f"{flag} {_told(name, value)}", planned(replace(config, **{name: value}), model, memory)
        except JaxserveError:  # the model cannot be cut so, or two settings contradict
            continue


def _changes(config: EngineConfig, model: Model, plan: Plan) -> Iterator[tuple[str, Any]]:
    longest, most = plan.max_model_len, model.spec.max_positions
    lengths = {longest * 2, longest // 2, *(length for length in (32768, 8192, 2048) if length < longest)}
    for length in sorted((length for length in lengths if 2 <= length <= most), reverse=True):
        yield "max_model_len", length
    for rows in (plan.max_num_seqs * 2, plan.max_num_seqs // 2):
        if rows >= 1:
            yield "max_num_seqs", rows
    if config.num_blocks is not None:
        yield "num_blocks", config.num_blocks * 2
        yield "num_blocks", config.num_blocks // 2
    elif config.kv_cache_memory_bytes is not None or plan.memory is None:
        yield from _cache_sizes(config, plan)
    else:
        if config.gpu_memory_utilization < 0.95:
            yield "gpu_memory_utilization", 0.95
        yield "gpu_memory_utilization", config.gpu_memory_utilization / 2
    if plan.memory is not None:
        for tensor in (config.tensor_parallel_size * 2, config.tensor_parallel_size // 2):
            if 1 <= tensor <= MAX_DEVICES // config.expert_parallel_size:
                yield "tensor_parallel_size", tensor
    for dtype in ("float32", "bfloat16"):
        if dtype != plan.dtype:
            yield "dtype", dtype


def _cache_sizes(config: EngineConfig, plan: Plan) -> Iterator[tuple[str, int]]:
    """Half of what the cache takes now, and twice that if there is room."""
    size = config.kv_cache_memory_bytes or max(plan.blocks, 0) * plan.block_bytes
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if plan.memory is not None:
        room = plan.memory - plan.state - plan.step - plan.slack
    for other in (size * 2, size // 2):
        if 0 < other <= room - plan.weights:
            yield "kv_cache_memory_bytes", other


def _told(name: str, value: Any) -> str:
    """As a flag takes it."""
    if name == "kv_cache_memory_bytes":
        for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
            if value % scale == 0:
                return f"{value // scale}{unit}"
    return f"{value:g}" if isinstance(value, float) else str(value)
