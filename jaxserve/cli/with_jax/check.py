# SPDX-License-Identifier: Apache-2.0
"""`jaxserve check`: what a model is, whether it fits, and what each flag would change; no weights are loaded.

The figures are memory_plan's. Nothing is asked of an accelerator but its driver: jax would take its memory.
"""

import json as json_module
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any, cast

from jaxserve import demo
from jaxserve.cli.with_jax.memory_plan import MAX_DEVICES, Model, Plan, alternatives, planned, read
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.errors import JaxserveError, one_line
from jaxserve.flags.parser import Parser
from jaxserve.flags.setting import Setting, build


@dataclass(frozen=True, kw_only=True)
class Check:
    """Describe a model and check whether it fits."""

    memory: Annotated[
        int | None,
        Setting(
            "Memory of each accelerator, such as 80GiB (default: this machine's GPU; without one, plan for the CPU).",
            "Check",
            low=1,
            high=2**60,
            unit="bytes",
        ),
    ] = None
    json: Annotated[bool, Setting("Print one JSON object instead of a table.", "Check")] = False
    engine: EngineConfig

    @classmethod
    def of(cls, parser: Parser, given: Mapping[str, Any]) -> "Check":
        return build(cls, {"model": str(demo.FOLDER), **given})

    def run(self) -> None:
        _on_cpu()
        memory = self.memory if self.memory is not None else _accelerator()
        model = read(self.engine)
        plan = planned(self.engine, model, memory)
        others = list(alternatives(self.engine, model, memory))
        if self.json:
            print(json_module.dumps(_as_json(model, plan, others)))
        else:
            print("\n".join([*_model_lines(model, plan), *_plan_lines(self.engine, plan), *_other_lines(plan, others)]))
        if not plan.fits:
            raise _does_not_fit(plan, others)


def _on_cpu() -> None:
    """Nothing is computed, and an accelerator may be in use."""
    import jax

    config = cast(Any, jax.config)
    config.update("jax_platforms", "cpu")
    with suppress(RuntimeError):  # a program that has devices already
        config.update("jax_num_cpu_devices", MAX_DEVICES)


def _accelerator() -> int | None:
    """Bytes of the smallest NVIDIA GPU here, asked of its driver: jax would take its memory. None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    ask = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout
        return min(int(line) for line in said.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _does_not_fit(plan: Plan, others: list[tuple[str, Plan]]) -> JaxserveError:
    helps = [name for name, other in others if other.fits]
    hint = f"{helps[0]} would do" if helps else "use more or larger devices, or a smaller model"
    if plan.blocks < 1:
        used = plan.weights + plan.state + plan.step + plan.slack
        have = f"{_size(plan.memory)} to use" if plan.memory is not None else "the KV cache's size"
        return ConfigError(f"it does not fit: {_size(used)} before any KV cache, {have} per device", hint)
    problem = f"a sequence of {plan.max_model_len:,} tokens does not fit into {plan.tokens:,} tokens of KV cache"
    return ConfigError(problem, hint)


# --- as text --------------------------------------------------------------------------------------------------------


def _model_lines(model: Model, plan: Plan) -> list[str]:
    spec = model.spec
    attention = spec.layers[0].attention
    heads = f"{attention.heads} heads" + (f", {attention.kv_heads} KV heads" if hasattr(attention, "kv_heads") else "")
    per_token = plan.block_bytes // plan.block_size
    return [
        f"model         {one_line(model.name)}, {one_line(model.architecture)}",
        f"parameters    {model.parameters:,} in {plan.dtype}, stored as {model.stored.name}",
        f"layers        {len(spec.layers)}, hidden {spec.hidden:,}, {heads}, vocabulary {spec.vocab_size:,}",
        f"longest       {spec.max_positions:,} tokens",
        f"KV cache      {per_token:,} bytes per token and device, {_size(plan.block_bytes)} per block of "
        f"{plan.block_size}",
        "",
    ]


def _plan_lines(config: EngineConfig, plan: Plan) -> list[str]:
    def row(name: str, size: int, why: str = "") -> str:
        return f"  {name:<24}{_size(size):>12}{'  ' + why if why else ''}"

    head = "per device, on a CPU" if plan.memory is None else f"per device, {_size(plan.memory)} to use"
    lines = [head, row("weights", plan.weights)]
    if plan.memory is not None:
        lines += [
            row("state", plan.state, f"--max-num-seqs {plan.max_num_seqs}"),
            row("largest step, about", plan.step, f"--max-num-batched-tokens {plan.max_num_batched_tokens}"),
            row("slack", plan.slack),
        ]
    blocks = max(plan.blocks, 0)
    lines.append(row("KV cache", (blocks + 1) * plan.block_bytes if blocks else 0))
    if blocks:
        lines += [
            f"  {blocks:,} blocks of {plan.block_size} = {plan.tokens:,} tokens: "
            f"{plan.concurrency:.1f} sequences of {plan.served_len:,} at once"
        ]
        if plan.served_len < plan.max_model_len and not plan.insisted:
            lines.append(f"  max_model_len would be {plan.served_len:,}, not the model's {plan.max_model_len:,}")
    return lines


def _other_lines(plan: Plan, others: list[tuple[str, Plan]]) -> list[str]:
    """A table: what one flag's change gives, under what there is without it."""
    shown = [(name, other) for name, other in others if other.fits or plan.fits]
    if not shown:
        return []
    wide = max(len(name) for name, _ in shown) + 2
    head = f"  {'':<{wide}}{'weights':>12}{'KV cache, tokens':>18}{'longest':>11}{'at once':>10}"
    return ["", "with one flag changed", head, *(_row(name, one, wide) for name, one in [("as it is", plan), *shown])]


def _row(name: str, plan: Plan, wide: int) -> str:
    start = f"  {name:<{wide}}{_size(plan.weights):>12}{plan.tokens:>18,}"
    if not plan.fits:
        return f"{start}  {'does not fit' if plan.blocks < 1 else 'too few'}"
    return f"{start}{plan.served_len:>11,}{plan.concurrency:>10,.1f}"


def _as_json(model: Model, plan: Plan, others: list[tuple[str, Plan]]) -> dict[str, Any]:
    spec = model.spec

    def content(one: Plan) -> dict[str, Any]:
        more = {"tokens": one.tokens, "fits": one.fits, "concurrency": one.concurrency, "served_len": one.served_len}
        return {**asdict(one), **more}

    return {
        "model": model.name,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "stored_dtype": model.stored.name,
        "layers": len(spec.layers),
        "hidden": spec.hidden,
        "vocab_size": spec.vocab_size,
        "max_positions": spec.max_positions,
        "kv_bytes_per_token": plan.block_bytes // plan.block_size,
        "plan": content(plan),
        "alternatives": {name: content(other) for name, other in others},
    }


def _size(count: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,.0f} bytes"
