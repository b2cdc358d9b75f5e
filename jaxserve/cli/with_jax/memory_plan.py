# SPDX-License-Identifier: Apache-2.0
"""The capacities that `jaxserve check` compares: as configured and with one flag changed, on devices that need not be
in this machine.

A model is read from its config and the headers of its weights. To get the size of the weights, shapes and shardings are
made on CPU devices, as many as there are shards. engine.capacity computes the rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxserve import machine
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine import capacity
from jaxserve.engine.capacity import Capacity
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags.sizes import given_size
from jaxserve.models.spec import ModelSpec

MAX_DEVICES = 16


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model whose weights are not loaded."""

    name: str
    architecture: str
    spec: ModelSpec
    stored: Any  # dtype of the checkpoint
    parameters: int
    method: str | None  # by which the checkpoint is quantized


def fetch(config: EngineConfig) -> Path:
    """The model's folder. No weights are downloaded."""
    from convert.files import hub

    cache = Path(config.download_dir).expanduser() if config.download_dir else None
    return hub.fetch(config.model, revision=config.revision, cache_dir=cache, weights=False)


def read(config: EngineConfig, folder: Path) -> Described:
    """Read it from its config, and from the headers of its weights if they are present."""
    import jax.numpy as jnp
    import numpy as np

    from convert import load
    from jaxserve.models import hf, param_layout, registry

    raw = hf.read_json(folder / "config.json")
    if (folder / "spec.json").exists() or any(folder.glob("*.safetensors*")) or any(folder.glob("*.gguf")):
        opened = load.open_model(folder)
        spec, stored = opened.spec, np.dtype(opened.stored_dtype())
    else:
        spec, name = load.open_spec(folder), raw.get("dtype", raw.get("torch_dtype"))
        known = name if isinstance(name, str) and name in ("float16", "float32") else "bfloat16"
        stored = jnp.dtype(known)
    architectures = raw.get("architectures") or [spec.family]
    return Described(
        name=config.model,
        architecture=str(architectures[0]),
        spec=spec,
        stored=stored,
        parameters=param_layout.count(spec),
        method=registry.method_of(folder),
    )


def planned(config: EngineConfig, model: Described, total: int | None) -> Capacity:
    """The capacity on devices with `total` bytes each; None means this machine's CPU."""
    import jax

    from jaxserve.engine.execute import loading, memory
    from jaxserve.models import online, param_layout

    on_cpu = total is None
    auto = machine.cpu_dtype(model.stored.name) if on_cpu else model.stored.name
    spec = replace(model.spec, dtype=auto if config.dtype == "auto" else config.dtype)
    if config.quantization is not None:
        chosen = online.to_apply(config.quantization, spec, model.method)
        spec = spec if chosen is None else online.quantized(spec, chosen)
    mesh = loading.on_mesh(config, None)
    with jax.set_mesh(mesh):
        shapes = param_layout.abstract_params(spec)
    found = memory.of_weights(spec, shapes, mesh, on_cpu=on_cpu)
    if not on_cpu:
        found = replace(found, usable=int(total * config.gpu_memory_utilization), used=found.weights)
    elif config.num_blocks is None and config.kv_cache_memory_bytes is None:
        found = replace(found, usable=memory.free_on_cpu(found.weights), used=found.weights)
    try:
        return capacity.resolve(config, model.spec, found)
    except ConfigError as error:
        raise UsageError(error.problem, error.hint) from None


def alternatives(config: EngineConfig, model: Described, total: int | None) -> Iterator[tuple[str, Capacity]]:
    """Capacities with one flag changed: halved, doubled, or another choice."""
    for name, value in _changes(config, model, planned(config, model, total)):
        flag = "--" + name.replace("_", "-")
        try:
            yield f"{flag} {_flag_value(name, value)}", planned(replace(config, **{name: value}), model, total)
        except JaxserveError:  # the model cannot be divided like this, or two settings contradict each other
            continue


def _changes(config: EngineConfig, model: Described, plan: Capacity) -> Iterator[tuple[str, Any]]:
    from jaxserve.models import online

    longest, rows = plan.wanted_len, plan.limits.max_num_seqs
    lengths = {longest * 2, longest // 2, *(length for length in (32768, 8192, 2048) if length < longest)}
    for length in sorted((length for length in lengths if 2 <= length <= model.spec.max_positions), reverse=True):
        yield "max_model_len", length
    for count in (rows * 2, rows // 2):
        if count >= 1:
            yield "max_num_seqs", count
    if config.num_blocks is not None:
        yield "num_blocks", config.num_blocks * 2
        yield "num_blocks", config.num_blocks // 2
    elif config.kv_cache_memory_bytes is not None or plan.memory.on_cpu:
        yield from _cache_sizes(config, plan)
    else:
        if config.gpu_memory_utilization < 0.95:
            yield "gpu_memory_utilization", 0.95
        yield "gpu_memory_utilization", config.gpu_memory_utilization / 2
    if not plan.memory.on_cpu:
        for tensor in (config.tensor_parallel_size * 2, config.tensor_parallel_size // 2):
            if 1 <= tensor <= MAX_DEVICES // config.expert_parallel_size:
                yield "tensor_parallel_size", tensor
    if plan.kv_dtype not in capacity.ONE_BYTE:
        yield "kv_cache_dtype", "fp8"
    if not model.spec.quantized:
        yield from (("quantization", name) for name in online.ONLINE if name != config.quantization)
    for dtype in ("float32", "bfloat16"):
        if dtype != plan.memory.dtype:
            yield "dtype", dtype


def _cache_sizes(config: EngineConfig, plan: Capacity) -> Iterator[tuple[str, int]]:
    """Half of the KV cache's size, and twice that if there is room."""
    size = config.kv_cache_memory_bytes or plan.blocks * plan.block_bytes
    room = machine.total_memory() or 2**63
    if plan.memory.usable is not None and not plan.memory.on_cpu:
        room = plan.memory.usable - plan.state - plan.step - capacity.SLACK
    for other in (size * 2, size // 2):
        if 0 < other <= room - plan.memory.weights:
            yield "kv_cache_memory_bytes", other


def _flag_value(name: str, value: Any) -> str:
    """The value as written on the command line."""
    if name == "kv_cache_memory_bytes":
        return given_size(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
