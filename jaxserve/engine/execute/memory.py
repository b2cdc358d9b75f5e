# SPDX-License-Identifier: Apache-2.0
"""Measures the devices' memory and the size of a model's weights, as input for capacity.py.

`available` measures before the weights are read, so that programs can be compiled meanwhile. `sized` then compiles the
largest programs if the size of the KV cache depends on their temporaries.
"""

import contextlib
from dataclasses import replace
from typing import Any

import jax

from jaxserve import machine
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine import capacity
from jaxserve.engine.capacity import Capacity, Memory
from jaxserve.engine.execute import cuda_driver, jax_start, weights
from jaxserve.engine.execute.loading import Opened
from jaxserve.engine.execute.program_store import Store
from jaxserve.engine.execute.runner import Runner
from jaxserve.engine.execute.weights import shard_bytes
from jaxserve.models.decoder import Params
from jaxserve.models.mesh_fit import fit
from jaxserve.models.spec import ModelSpec
from jaxserve.parallel import mesh


def available(config: EngineConfig, model: Opened) -> Memory:
    """The memory for this model on its devices. Free memory is queried only if the KV cache's size depends on it."""
    devices = devices_of(model)
    on_cpu = devices[0].platform == "cpu"
    memory = of_weights(model.spec, model.shapes, model.mesh, on_cpu=on_cpu)
    coming = memory.weights if model.plan is not None else 0
    if config.num_blocks is not None or config.kv_cache_memory_bytes is not None:
        return memory
    if on_cpu:
        return replace(memory, usable=free_on_cpu(coming), used=coming)
    usable, used = budget(devices, config.gpu_memory_utilization)
    return replace(memory, usable=usable, used=used + coming)


def of_weights(spec: ModelSpec, shapes: Params, on: Any, *, on_cpu: bool) -> Memory:
    """What is known without querying a device: the weights, and how the model is sharded over the mesh `on`."""
    with jax.set_mesh(on) if on is not None else contextlib.nullcontext():
        fitted = fit(spec, *mesh.shards())
    return Memory(
        on_cpu=on_cpu, dtype=spec.dtype, fitted=fitted, weights=sum(map(shard_bytes, jax.tree.leaves(shapes)))
    )


def free_on_cpu(coming: int = 0) -> int:
    """The bytes that are free for this process; if unknown, enough for a full-size KV cache and the `coming` bytes."""
    free = machine.free_memory()
    return 4 * capacity.CPU_CACHE + coming if free is None else free


def sized(config: EngineConfig, model: Opened, memory: Memory, store: Store | None = None) -> Capacity:
    """The capacity of an engine with this memory. Raises a ConfigError if it is too small."""
    found = capacity.resolve(config, model.spec, memory)
    if memory.usable is not None and not memory.on_cpu:
        probe = Runner.of(config, model, found.smallest(), store)
        step = probe.largest_step()
        if model.plan is None:  # the program will give new parameters, which are converted between two steps
            step = max(step, weights.largest_joined(model.spec, model.shapes))
        found = capacity.resolve(config, model.spec, replace(memory, step=step))
    ends = frozenset(token for token in model.eos_token_ids if 0 <= token < model.spec.vocab_size)
    return replace(found.checked(), limits=replace(found.limits, eos_token_ids=ends))


# --- an accelerator's memory ----------------------------------------------------------------------------------------


def budget(devices: list[Any], utilization: float) -> tuple[int, int]:
    """Usable bytes and bytes in use, of the device with the least left.

    The utilization refers to all memory of the device. Arrays that the program holds already count as used, and what
    jax may have beyond the utilization is left to the program.
    """

    def of(device: Any) -> tuple[int, int]:
        stats = _reported(device)
        limits = [stats[name] for name in ("bytes_limit", "bytes_reservable_limit") if stats.get(name)]
        asked = cuda_driver.memory(device)
        if limits:
            limit, used = min(limits), stats.get("bytes_in_use", 0)
            total = asked.total if asked is not None else limit / jax_start.share_of(device)
        elif asked is not None:  # jax allocates every array from the driver, as other processes do
            total, used = asked.total, asked.total - asked.free
            limit = total
        else:
            problem = f"{device} does not report how much memory it has"
            raise ConfigError(problem, "set num_blocks or kv_cache_memory_bytes")
        return int(min(limit, total * utilization)), used

    return min((of(device) for device in devices), key=lambda pair: pair[0] - pair[1])


def _reported(device: Any) -> dict[str, int]:
    """What jax reports of its memory; nothing on a CPU, and with some allocators."""
    try:
        return device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:
        return {}


def devices_of(model: Opened) -> list[Any]:
    if model.mesh is not None:
        return list(model.mesh.devices.flat)
    return [weights.device_of(model.shapes)]
