# SPDX-License-Identifier: Apache-2.0
"""How jax starts: the share of a GPU's memory that jaxlib would take, in processes whose environment is set; and what
CUDA's driver, here a made-up one, is asked."""

import ctypes
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from jaxlib import xla_client

from jaxserve.engine.execute import cuda_driver, jax_start
from jaxserve.engine.execute.cuda_driver import DriverMemory

NEW, OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
ALLOCATOR, PREALLOCATE = "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_PREALLOCATE"

# jaxlib reads the environment when a GPU's plugin starts, which is when jax is first asked for devices.
STARTED = """
import json, os, jax
from jaxlib import xla_client
from jaxserve.config import EngineConfig
from jaxserve.engine.execute import jax_start
seen, devices = [], jax.devices
jax.devices = lambda: (seen.append(xla_client.generate_pjrt_gpu_plugin_options()), devices())[1]
before = dict(os.environ)
jax_start.start(EngineConfig(model="any", gpu_memory_utilization=0.6, enable_sleep_mode=SLEEP))
jax_start.start(EngineConfig(model="any", gpu_memory_utilization=0.2))
print(json.dumps({"seen": seen, "unchanged": dict(os.environ) == before}))
"""
CASES: dict[str, tuple[dict[str, str], bool, dict[str, object]]] = {
    "nothing is set": ({}, False, {"memory_fraction": 0.6, "allocator": "default"}),
    "the name": ({NEW: "0.3"}, False, {"memory_fraction": 0.3, "allocator": "default"}),
    "the deprecated name": ({OLD: "0.4"}, False, {"memory_fraction": 0.4, "allocator": "default"}),
    "both": ({NEW: "0.3", OLD: "0.4"}, False, {"memory_fraction": 0.3, "allocator": "default"}),
    "sleep mode": ({}, True, {"memory_fraction": 0.6, "allocator": "platform", "preallocate": False}),
    "sleep mode, and an allocator": ({ALLOCATOR: "bfc"}, True, {"memory_fraction": 0.6, "allocator": "bfc"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_jaxlib_is_started_with(case: str) -> None:
    given, sleep, wanted = CASES[case]
    names = (NEW, OLD, ALLOCATOR, PREALLOCATE)
    env = {name: value for name, value in os.environ.items() if name not in names} | given | {"JAX_PLATFORMS": "cpu"}
    code = STARTED.replace("SLEEP", str(sleep))
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    [options] = said["seen"]  # the second engine finds jax running
    assert {name: options.get(name) for name in wanted} == wanted
    assert options.get("preallocate") == wanted.get("preallocate")
    assert said["unchanged"], "what other programs inherit was changed"


def test_jaxlib_refuses_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason why one is left out."""
    monkeypatch.setenv(NEW, "0.3")
    monkeypatch.setenv(OLD, "0.4")
    with pytest.raises(ValueError, match="deprecated"):
        xla_client.generate_pjrt_gpu_plugin_options()


THREADS = """
import json, os, jax, jax.numpy as jnp
from jaxserve import machine
from jaxserve.config import EngineConfig
from jaxserve.engine.execute import jax_start
machine.cpus = lambda: 3  # a container's quota
before = dict(os.environ)
jax_start.start(EngineConfig(model="any", cpu_threads=ASKED))
jax.jit(lambda x: x @ x)(jnp.ones((512, 512))).block_until_ready()
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
said = {"unchanged": dict(os.environ) == before, "known": jax_start.cpu_threads(), "run": names.count("tf_XLAEigen")}
jax_start.start(EngineConfig(model="any", cpu_threads=said["known"]))
try:
    jax_start.start(EngineConfig(model="any", cpu_threads=77))
except Exception as error:
    said["refused"] = str(error)
print(json.dumps(said))
"""
HOW_MANY: dict[str, tuple[dict[str, str], int | None, int]] = {
    "nothing is set": ({}, None, 3),
    "the setting": ({}, 2, 2),
    "the environment": ({"NPROC": "5"}, None, 5),
    "XLA's own variable": ({"NPROC": "5", "PJRT_NPROC": "4"}, None, 4),
    "the setting, and the environment": ({"NPROC": "5", "PJRT_NPROC": "4"}, 1, 1),
}


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("case", HOW_MANY)
def test_threads_that_compute_on_a_cpu(case: str) -> None:
    given, asked, wanted = HOW_MANY[case]
    names = ("NPROC", "PJRT_NPROC", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in names} | given | {"JAX_PLATFORMS": "cpu"}
    code = THREADS.replace("ASKED", str(asked))
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["run"] == said["known"] == wanted and said["unchanged"]
    assert f"cpu_threads is 77, but JAX has already started with {wanted} threads" in said["refused"]


class Device:
    def __init__(self, platform: str, ordinal: int = 0) -> None:
        self.platform, self.local_hardware_id = platform, ordinal


@pytest.mark.parametrize(
    "allocator, platform, returns",
    [
        (None, "cpu", True),
        (None, "gpu", False),
        (None, "tpu", False),
        ("bfc", "gpu", False),
        ("cuda_async", "gpu", False),
        ("platform", "gpu", True),
        ("PLATFORM", "gpu", True),
        ("platform", "tpu", False),
    ],
)
def test_who_gets_freed_memory(
    monkeypatch: pytest.MonkeyPatch, allocator: str | None, platform: str, returns: bool
) -> None:
    monkeypatch.delenv(ALLOCATOR, raising=False)
    if allocator is not None:
        monkeypatch.setenv(ALLOCATOR, allocator)
    assert jax_start.returns_memory(Device(platform)) == returns


# --- the driver -----------------------------------------------------------------------------------------------------


class Driver:
    """CUDA's, with two GPUs. `faulty` is the function that fails."""

    def __init__(self, faulty: str = "") -> None:
        self.faulty, self.current, self.retained = faulty, list[int](), 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            return 1 if name == self.faulty else getattr(self, f"do_{name}")(*args) or 0

        return call

    def do_cuInit(self, flags: int) -> None:
        assert flags == 0

    def do_cuDeviceGet(self, gpu: Any, ordinal: Any) -> int:
        gpu._obj.value = 70 + ordinal.value
        return int(ordinal.value > 1)

    def do_cuDevicePrimaryCtxRetain(self, context: Any, gpu: Any) -> None:
        context._obj.value = gpu.value
        self.retained += 1

    def do_cuDevicePrimaryCtxRelease_v2(self, gpu: Any) -> None:
        self.retained -= 1

    def do_cuCtxPushCurrent_v2(self, context: Any) -> None:
        self.current.append(context.value)

    def do_cuCtxPopCurrent_v2(self, context: Any) -> None:
        self.current.pop()

    def do_cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        total._obj.value, free._obj.value = {70: (2**37, 2**36), 71: (2**35, 2**34)}[self.current[-1]]


def ask(monkeypatch: pytest.MonkeyPatch, driver: Driver, device: Device) -> DriverMemory | None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    found = cuda_driver.memory(device)
    assert driver.current == [] and driver.retained == 0, "a context was left"
    return found


def test_the_driver_is_asked_about_jaxs_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, Driver(), Device("gpu", 0)) == DriverMemory(total=2**37, free=2**36)
    assert ask(monkeypatch, Driver(), Device("gpu", 1)) == DriverMemory(total=2**35, free=2**34)
    assert ask(monkeypatch, Driver(), Device("gpu", 2)) is None
    assert ask(monkeypatch, Driver(), Device("cpu", 0)) is None


@pytest.mark.parametrize(
    "faulty",
    ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemGetInfo_v2"],
)
def test_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch, faulty: str) -> None:
    assert ask(monkeypatch, Driver(faulty), Device("gpu")) is None


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cuda_driver.memory(Device("gpu")) is None
