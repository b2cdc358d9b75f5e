# SPDX-License-Identifier: Apache-2.0
"""Starts jax's devices with the settings that an engine needs, and knows which settings they were started with.

Environment variables decide how jax manages a GPU's memory, and how many threads compute on a CPU. They are read once,
when it first uses a device; after that, nothing here has an effect. By default jax takes a share of a GPU's memory at
once, and never returns any to the system; and it starts a thread for each core that this process may run on, even if a
container's quota lets fewer run at a time. What the user has set takes precedence. Our settings are removed once jax
has started, so that no other program inherits them.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import xla_bridge  # jax has no public function that tells whether it has started

from jaxserve import machine
from jaxserve.config import ConfigError, EngineConfig

# The share of a GPU's memory that jax manages. jaxlib refuses to start a GPU if both names are set.
MEMORY_SHARE, DEPRECATED_SHARE = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
DEFAULT_SHARE = 0.75  # jaxlib's
PREALLOCATE, ALLOCATOR = "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"
KEEPS_MEMORY = f"jax keeps freed memory unless it starts on a GPU with {ALLOCATOR}=platform"
RETURNING = ("platform", "address")  # the allocators that return a deleted array's memory to the system

# How many threads XLA computes with on a CPU; the first takes precedence, empty is as if it were not set.
THREADS, COMMON_THREADS = "PJRT_NPROC", "NPROC"

_started: dict[str, str] = {}  # the variables of memory, if jax was started here and has a GPU
_threads: int | None = None  # if jax was started here


def environment(config: EngineConfig, given: Mapping[str, str]) -> dict[str, str]:
    """The environment to start jax in, for an engine, if this one is given."""
    found = dict(given)
    if found.get(MEMORY_SHARE):
        found.pop(DEPRECATED_SHARE, None)
    elif not found.get(DEPRECATED_SHARE):
        found[MEMORY_SHARE] = str(config.gpu_memory_utilization)
    if config.enable_sleep_mode and not found.get(ALLOCATOR):
        found |= {ALLOCATOR: "platform", PREALLOCATE: "false"}
    if config.cpu_threads is not None:
        found |= {THREADS: str(config.cpu_threads)}
    elif not (found.get(THREADS) or found.get(COMMON_THREADS)):
        found |= {THREADS: str(machine.cpus())}
    return found


def start(config: EngineConfig) -> None:
    """Start jax's devices, unless the program has used one already."""
    global _threads
    if xla_bridge.backends_are_initialized():
        if config.cpu_threads not in (None, cpu_threads()):
            problem = f"cpu_threads is {config.cpu_threads}, but JAX has already started with {cpu_threads()} threads"
            raise ConfigError(problem, f"make the engine before using JAX, or set {COMMON_THREADS} in the environment")
        return
    before, wanted = dict(os.environ), environment(config, os.environ)
    try:
        _change(before, wanted)
        on_gpu = any(device.platform == "gpu" for device in jax.devices())
        _threads = _asked_threads(wanted)
    finally:
        _change(wanted, before)
    if on_gpu:
        _started.update({name: wanted.get(name, "") for name in (MEMORY_SHARE, DEPRECATED_SHARE, ALLOCATOR)})


def _change(old: Mapping[str, str], new: Mapping[str, str]) -> None:
    for name in old.keys() - new.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in new.items() if old.get(name) != value})


def _setting(name: str) -> str:
    """The value that jax was started with: here, or else by the program, whose environment is still there."""
    return _started[name] if _started else os.environ.get(name, "")


def share_of(device: Any) -> float:
    """The share of the device's memory that jax manages."""
    if device.platform != "gpu":
        return 1.0
    return float(_setting(MEMORY_SHARE) or _setting(DEPRECATED_SHARE) or DEFAULT_SHARE)


def returns_memory(device: Any) -> bool:
    """Whether the memory of a deleted array is free for other processes, not only for this one."""
    return device.platform == "cpu" or (device.platform == "gpu" and _setting(ALLOCATOR).lower() in RETURNING)


def cpu_threads() -> int:
    """How many threads compute on a CPU."""
    return _threads or _asked_threads(os.environ)


def _asked_threads(variables: Mapping[str, str]) -> int:
    for name in (THREADS, COMMON_THREADS):
        if variables.get(name, "").isdecimal() and int(variables[name]):
            return int(variables[name])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
