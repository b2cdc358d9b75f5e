# SPDX-License-Identifier: Apache-2.0
"""`jaxserve check`: describes a model, whether it fits, and what each flag would change. Loads no weights.

The numbers come from engine.capacity, as an engine logs them. The memory of an accelerator comes from its driver,
because jax would allocate it.
"""

import json as json_module
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, cast

from jaxserve import demo
from jaxserve.cli.with_jax.memory_plan import MAX_DEVICES, Described, alternatives, fetch, planned, read
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.capacity import SLACK, Capacity
from jaxserve.errors import JaxserveError, one_line
from jaxserve.flags.parser import Parser
from jaxserve.flags.setting import Setting, build
from jaxserve.flags.sizes import shown_size
from jaxserve.models.spec import Attention, Recurrent


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
        folder = fetch(self.engine)  # before jax is imported, since a wrong path is the most common mistake
        _on_cpu()
        memory = self.memory if self.memory is not None else _accelerator()
        model = read(self.engine, folder)
        plan = planned(self.engine, model, memory)
        others = list(alternatives(self.engine, model, memory))
        if self.json:
            print(json_module.dumps(_as_json(model, plan, others)))
        else:
            print("\n".join([*_model_lines(model, plan), *_plan_lines(plan), *_other_lines(plan, others)]))
        if not plan.fits:
            raise _does_not_fit(plan, others)


def _on_cpu() -> None:
    """Make jax use CPU devices: nothing is computed, and an accelerator may be in use."""
    import jax

    config = cast(Any, jax.config)
    config.update("jax_platforms", "cpu")
    with suppress(RuntimeError):  # the process has initialized its devices already
        config.update("jax_num_cpu_devices", MAX_DEVICES)


def _accelerator() -> int | None:
    """The memory of this machine's smallest NVIDIA GPU, as its driver reports it. None without a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    ask = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout
        return min(int(line) for line in said.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _does_not_fit(plan: Capacity, others: list[tuple[str, Capacity]]) -> JaxserveError:
    error = plan.misfit()
    helps = [name for name, other in others if other.fits and plan.fixed is None]
    return ConfigError(error.problem, f"set {helps[0]}" if helps else error.hint)


# --- as text --------------------------------------------------------------------------------------------------------


def _model_lines(model: Described, plan: Capacity) -> list[str]:
    spec, block_size = model.spec, plan.limits.block_size
    attention = next(layer.attention for layer in spec.layers if not isinstance(layer.attention, Recurrent))
    heads = f"{attention.heads} heads"
    if isinstance(attention, Attention):
        heads += f", {attention.kv_heads} KV heads"
    groups = f" in one of {plan.limits.groups} groups of layers" if plan.limits.groups > 1 else ""
    per_block = f"{shown_size(plan.block_bytes)} per block of {block_size}{groups}"
    return [
        f"model         {one_line(model.name)}, {one_line(model.architecture)}",
        f"parameters    {model.parameters:,} in {plan.memory.dtype}, stored as {model.stored.name}",
        f"layers        {len(spec.layers)}, hidden {spec.hidden:,}, {heads}, vocabulary {spec.vocab_size:,}",
        f"max length    {spec.max_positions:,} tokens",
        f"KV cache      {plan.token_bytes:,} bytes per token and device, {per_block}",
        *_window_lines(plan),
        "",
    ]


def _window_lines(plan: Capacity) -> list[str]:
    """What layers with a sliding window save."""
    windows = [plan.limits.windows[group] for group, _ in plan.groups.at]
    found = sorted({window for window in windows if window is not None})
    if not found or not plan.longest or plan.kept_share >= 1:
        return []
    count = sum(window is not None for window in windows)
    keep = f"{count} of {len(windows)} layers keep only a window of {' or '.join(f'{each:,}' for each in found)} tokens"
    share = f"{100 * plan.kept_share:.0f}% of what it would take if every layer kept all tokens"
    return [
        f"{'':14}{keep}:",
        f"{'':14}a sequence of {plan.longest:,} takes {shown_size(plan.sequence_bytes)}, {share}",
    ]


def _plan_lines(plan: Capacity) -> list[str]:
    rows = [f"  {name:<24}{shown_size(count):>12}{'  ' + why if why else ''}" for name, count, why in plan.parts()]
    return [plan.usable(), *rows, *(f"  {line}" for line in plan.cache_lines())]


def _other_lines(plan: Capacity, others: list[tuple[str, Capacity]]) -> list[str]:
    """A table of the capacity with one flag changed; its first line is the unchanged capacity."""
    shown = [(name, other) for name, other in others if other.fits or plan.fits]
    if not shown:
        return []
    wide = max(len(name) for name, _ in shown) + 2
    head = f"  {'':<{wide}}{'weights':>12}{'KV cache, tokens':>18}{'max length':>11}{'at once':>10}"
    return ["", "with one flag changed", head, *(_row(name, one, wide) for name, one in [("unchanged", plan), *shown])]


def _row(name: str, plan: Capacity, wide: int) -> str:
    start = f"  {name:<{wide}}{shown_size(plan.memory.weights):>12}{plan.tokens:>18,}"
    if not plan.fits:
        return f"{start}  {'too few' if plan.blocks else 'does not fit'}"
    return f"{start}{plan.longest:>11,}{plan.concurrency:>10,.1f}"


def _as_json(model: Described, plan: Capacity, others: list[tuple[str, Capacity]]) -> dict[str, Any]:
    spec = model.spec
    return {
        "model": model.name,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "stored_dtype": model.stored.name,
        "layers": len(spec.layers),
        "hidden": spec.hidden,
        "vocab_size": spec.vocab_size,
        "max_positions": spec.max_positions,
        "kv_bytes_per_token": plan.token_bytes,
        "plan": _plan_as_json(plan),
        "alternatives": {name: _plan_as_json(other) for name, other in others},
    }


def _plan_as_json(plan: Capacity) -> dict[str, Any]:
    memory, limits = plan.memory, plan.limits
    return {
        "dtype": memory.dtype,
        "memory": None if memory.on_cpu else memory.usable,
        "weights": memory.weights,
        "state": plan.state,
        "step": plan.step,
        "slack": SLACK,
        "block_size": limits.block_size,
        "block_bytes": plan.block_bytes,
        "cache_groups": plan.limits.groups,
        "sequence_bytes": plan.sequence_bytes,
        "kept_share": plan.kept_share,
        "blocks": plan.blocks,
        "max_model_len": plan.wanted_len,
        "held": plan.held,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "insisted": plan.insisted,
        "tokens": plan.tokens,
        "fits": plan.fits,
        "concurrency": plan.concurrency,
        "served_len": plan.longest,
    }
