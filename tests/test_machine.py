# SPDX-License-Identifier: Apache-2.0
"""What control groups leave of a machine: both versions, limits of parents, containers; on made-up file trees."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from jaxserve import machine
from jaxserve.cli import preflight
from jaxserve.config import EngineConfig
from jaxserve.engine.execute import memory
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.machine import Cgroups

MIB, GIB = 2**20, 2**30
NO_LIMIT = 9223372036854771712  # version 1 says so


def groups(folder: Path, listed: str, files: Mapping[str, object]) -> Cgroups:
    for name, content in files.items():
        file = folder / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    (folder / "listed").write_text(listed)
    return Cgroups(mounted=folder / "fs", listed=folder / "listed")


@pytest.fixture
def big(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GiB, 48 of them free, and 16 CPUs."""
    pages = {"SC_PHYS_PAGES": 64 * GIB // 4096, "SC_AVPHYS_PAGES": 48 * GIB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


V1 = "9:memory:/pod/box\n5:cpu,cpuacct:/pod/box\n3:name=systemd:/pod\n"
CASES = {
    "no limits": ("0::/", {"memory.max": "max", "cpu.max": "max 100000"}, (64 * GIB, 48 * GIB, 16)),
    "version 2": (
        "0::/",
        {"memory.max": 8 * GIB, "memory.current": 3 * GIB, "cpu.max": "250000 100000"},
        (8 * GIB, 5 * GIB, 3),
    ),
    "cached files are free": (
        "0::/",
        {"memory.max": 8 * GIB, "memory.current": 7 * GIB, "memory.stat": f"anon {GIB}\ninactive_file {6 * GIB}"},
        (8 * GIB, 7 * GIB, 16),
    ),
    "a parent's limit": (
        "0::/pod/box",
        {
            "pod/box/memory.max": "max",
            "pod/box/memory.current": MIB,
            "pod/memory.max": 2 * GIB,
            "pod/memory.current": GIB,
            "pod/cpu.max": "50000 100000",
        },
        (2 * GIB, GIB, 1),
    ),
    "the smallest room of all groups": (
        "0::/pod/box",
        {
            "pod/box/memory.max": 2 * GIB,
            "pod/box/memory.current": 0,
            "pod/memory.max": 4 * GIB,
            "pod/memory.current": 3 * GIB,
        },
        (2 * GIB, GIB, 16),
    ),
    "full": ("0::/", {"memory.max": GIB, "memory.current": GIB + 5}, (GIB, 0, 16)),
    "version 1": (
        V1,
        {
            "memory/memory.limit_in_bytes": NO_LIMIT,
            "memory/pod/box/memory.limit_in_bytes": 6 * GIB,
            "memory/pod/box/memory.usage_in_bytes": 4 * GIB,
            "memory/pod/box/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}",
            "cpu,cpuacct/pod/cpu.cfs_quota_us": 400000,
            "cpu,cpuacct/pod/cpu.cfs_period_us": 100000,
            "cpu,cpuacct/pod/box/cpu.cfs_quota_us": -1,
        },
        (6 * GIB, 3 * GIB, 4),
    ),
    "version 1, listed with the path outside of the container": (
        "9:memory:/docker/0123\n5:cpu:/docker/0123\n",
        {
            "memory/memory.limit_in_bytes": 3 * GIB,
            "memory/memory.usage_in_bytes": GIB,
            "cpu/cpu.cfs_quota_us": 150000,
            "cpu/cpu.cfs_period_us": 100000,
        },
        (3 * GIB, 2 * GIB, 2),
    ),
    "both versions": (
        "4:memory:/\n0::/app\n",
        {"memory/memory.limit_in_bytes": 9 * GIB, "unified/app/cpu.max": "200000 100000"},
        (9 * GIB, 9 * GIB, 2),
    ),
    "a limit above the machine": (
        "0::/",
        {"memory.max": 512 * GIB, "cpu.max": "99900000 100000"},
        (64 * GIB, 48 * GIB, 16),
    ),
    "nonsense": ("what\n0::\n1:\n", {"memory.max": "lots", "cpu.max": "0 0"}, (64 * GIB, 48 * GIB, 16)),
}


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("case", CASES)
def test_what_the_groups_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str) -> None:
    listed, files, wanted = CASES[case]
    monkeypatch.setattr(machine, "CGROUPS", groups(tmp_path, listed, files))
    assert (machine.total_memory(), machine.free_memory(), machine.cpus()) == wanted


@pytest.mark.usefixtures("big")
def test_without_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CGROUPS", Cgroups(tmp_path / "none", tmp_path / "nothing"))
    assert (machine.total_memory(), machine.free_memory(), machine.cpus()) == (64 * GIB, 48 * GIB, 16)


@pytest.mark.usefixtures("big")
def test_the_engine_and_the_checks_before_it_keep_within_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    limited = groups(tmp_path, "0::/", {"memory.max": 2 * GIB, "memory.current": GIB})
    monkeypatch.setattr(machine, "CGROUPS", limited)
    assert memory.free_on_cpu() == GIB
    preflight.check_machine(EngineConfig(model="any", kv_cache_memory_bytes=GIB))
    with pytest.raises(UsageError, match=f"{3 * GIB:,}, but this machine has {2 * GIB:,} bytes of memory for it"):
        preflight.check_machine(EngineConfig(model="any", kv_cache_memory_bytes=3 * GIB))


# --- the processor ----------------------------------------------------------------------------------------------------

CPUINFO = "processor\t: 0\nmodel name\t: {name}\nflags\t\t: fpu {flags} sse\n\nprocessor\t: 1\nflags\t\t: amx_bf16\n"


@pytest.mark.parametrize(
    ("flags", "stored", "dtype"),
    [
        ("avx512_bf16", "bfloat16", "bfloat16"),
        ("amx_bf16", "bfloat16", "bfloat16"),
        ("avx512f", "bfloat16", "float32"),
        ("avx512_bf16x", "bfloat16", "float32"),
        ("avx512_bf16", "float16", "float32"),
        ("avx512_bf16", "float32", "float32"),
    ],
)
def test_bfloat16_where_checkpoint_and_processor_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, stored: str, dtype: str
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO.format(name="A processor", flags=flags))
    monkeypatch.setattr(machine, "CPUINFO", file)
    monkeypatch.delenv("JAXSERVE_CPU_DTYPE")
    assert machine.cpu_dtype(stored) == dtype
    assert "A processor" in machine.processor() and flags in machine.processor()
    monkeypatch.setenv("JAXSERVE_CPU_DTYPE", "float16")
    assert machine.cpu_dtype(stored) == "float16"
    monkeypatch.setenv("JAXSERVE_CPU_DTYPE", "int8")
    with pytest.raises(JaxserveError, match=r"JAXSERVE_CPU_DTYPE is 'int8'.*; choose bfloat16, float16 or float32"):
        machine.cpu_dtype(stored)


def test_a_machine_without_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "absent")
    monkeypatch.delenv("JAXSERVE_CPU_DTYPE")
    assert machine.processor() and machine.cpu_dtype("bfloat16") == "float32"
