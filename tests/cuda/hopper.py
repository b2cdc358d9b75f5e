# SPDX-License-Identifier: Apache-2.0
"""Compiles a jitted function for an H200 without having one, and reads the result.

XLA is given a description of the device (`h200.txtpb`) in place of one, and compiles down to sm_90a machine code.
The PTX of each Pallas kernel is then assembled once more with `ptxas -v` for its registers, spills and shared
memory. Needs the CUDA wheels of jax and a ptxas (both in `.venv-cuda`), no GPU and no driver.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp(prefix="jaxserve-ptx-"))
# XLA reads its flags once, when jax first starts a backend: set before the import below. The emitter filter names
# PTX alone: it also lets Triton's passes be dumped, which takes 20 times as long as the compile.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=3"  # the other tests are content with 0
    f" --xla_dump_to={DUMP} --xla_dump_hlo_as_text --xla_dump_emitter_re=ptx"
)

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from pallas_kernels import dispatch  # noqa: E402

ABSTRACT_H200 = jax.sharding.AbstractMesh(
    (),
    (),
    (),
    abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
)


# One line of XLA's launch plan.
LAUNCH = r"kCustomKernel.*?(\w+) grid: \[([\d, ]+)\] threads: \[(\d+).*?shared_memory: (\d+)"


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports about one kernel."""

    name: str
    registers: int
    spill_bytes: int
    wgmma: int  # Hopper's warp-group matrix instructions
    mma: int  # the older, warp-wide ones
    cp_async: tuple[int, ...]  # the bytes of each asynchronous copy

    @property
    def tensor_cores(self) -> int:
        return self.wgmma + self.mma


@dataclass(frozen=True)
class Launch:
    """How XLA launches a kernel."""

    grid: tuple[int, ...]
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    hlo: str
    alias_bytes: int
    temp_bytes: int
    kernels: dict[str, Kernel]
    launches: dict[str, Launch]


def ptxas() -> str:
    """ptxas of the CUDA wheel, else one on the PATH."""
    import importlib.util

    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        for found in Path(root).glob("*/bin/ptxas"):
            return str(found)
    found = shutil.which("ptxas")
    if found is None:
        raise RuntimeError("no ptxas: install the nvidia-cuda-nvcc wheel")
    return found


def h200() -> Any:
    description = Path(__file__).with_name("h200.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=description, topology="1x1x1").devices[0]


def specs(tree: Any) -> Any:
    """Arrays or ShapeDtypeStructs -> abstract arrays on the described device."""
    sharding = jax.sharding.SingleDeviceSharding(h200())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_for_h200(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Compiled:
    for old in DUMP.iterdir():
        old.unlink() if old.is_file() else shutil.rmtree(old)
    with dispatch.use("kernel"), jax.sharding.use_abstract_mesh(ABSTRACT_H200):
        lowered = jax.jit(function, donate_argnums=donate).trace(*specs(arguments)).lower()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    kernels = {k.name: k for path in sorted(DUMP.glob("*.ptx")) for k in _kernels(path.read_text())}
    launches = {
        name: Launch(tuple(int(n) for n in grid.split(",")), int(threads), int(shared))
        for path in DUMP.glob("*thunk_sequence.txt")
        for name, grid, threads, shared in re.findall(LAUNCH, path.read_text())
    }
    hlo = compiled.as_text()
    assert memory is not None and hlo is not None  # XLA:GPU has both
    return Compiled(hlo, memory.alias_size_in_bytes, memory.temp_size_in_bytes, kernels, launches)


def _kernels(ptx: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas(), "-v", "-arch=sm_90a", str(source), "-o", f"{folder}/kernel.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = []
    # A kernel's entry runs up to the next one.
    bodies = {m[1]: m[0] for m in re.finditer(r"\.entry\s+(\w+)\(.*?(?=\.entry|\Z)", ptx, re.S)}
    for name, spills, registers in re.findall(
        r"Function properties for (\w+)\n.*?(\d+) bytes spill stores.*?\n.*?Used (\d+) registers",
        log,
    ):
        body = bodies.get(name, "")
        found.append(
            Kernel(
                name=name,
                registers=int(registers),
                spill_bytes=int(spills),
                wgmma=len(re.findall(r"wgmma\.mma_async", body)),
                mma=len(re.findall(r"\bmma\.sync", body)),
                cp_async=tuple(int(size, 16) for size in re.findall(r"cp\.async\.c.*, 0x(\w+),", body)),
            )
        )
    return found
