# SPDX-License-Identifier: Apache-2.0
"""The part of this machine that the process may use: memory and CPUs, within the limits of its control groups; and
what these CPUs compute fast.

A container's limit is that of a cgroup, which `sysconf` and `os.cpu_count` do not know. Both versions are read, and all
parents, since each group is limited by the ones that contain it. Without Linux or cgroups, the machine is the limit.
"""

import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import JaxserveError


@dataclass(frozen=True)
class Cgroups:
    """The control groups of this process; tests replace both paths."""

    mounted: Path = Path("/sys/fs/cgroup")
    listed: Path = Path("/proc/self/cgroup")

    def folders(self, *controllers: str) -> Iterator[Path]:
        """The folders of the group that limits any of these resources, and those of its parents, innermost first."""
        try:
            lines = [line.split(":", 2) for line in self.listed.read_text().splitlines()]
        except OSError:
            return
        for _, names, path in (line for line in lines if len(line) == 3):
            if names and not set(names.split(",")) & set(controllers):
                continue
            # Version 1 has a tree for each resource, or for several. Version 2 has one, and lists no names.
            places = (names, *controllers) if names else ("", "unified")
            for root in (self.mounted / place for place in dict.fromkeys(places)):
                group = root / path.lstrip("/")
                # A container may see its own group as the root, but be listed with the path outside.
                yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))

    def memory(self) -> Iterator[tuple[int, int]]:
        """Of every limited group: the limit, and the bytes in use. Cached files that can be dropped are not in use."""
        for folder in self.folders("memory"):
            for limit, used, cached in (
                ("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            ):
                most = _number(folder / limit)
                if most is not None:
                    yield most, max((_number(folder / used) or 0) - _entry(folder / "memory.stat", cached), 0)

    def cpus(self) -> Iterator[float]:
        """The CPUs of every limited group: the time that it may compute, as a multiple of the time that passes."""
        for folder in self.folders("cpu"):
            quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            with suppress(OSError, ValueError):
                quota, period = map(int, (folder / "cpu.max").read_text().split())  # "max 100000": no limit
            if quota and period and quota > 0:  # -1: no limit
                yield quota / period


def _number(file: Path) -> int | None:
    """None if the file is absent, or says `max`."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _entry(file: Path, name: str) -> int:
    """A line's value in memory.stat."""
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


CGROUPS = Cgroups()


def total_memory() -> int | None:
    """The bytes of memory that this process can have at most; None if unknown."""
    there = _pages("SC_PHYS_PAGES")
    return None if there is None else min([there, *(limit for limit, _ in CGROUPS.memory())])


def free_memory() -> int | None:
    """The bytes of memory that are still free for this process; None if unknown."""
    free = _pages("SC_AVPHYS_PAGES")
    return None if free is None else min([free, *(max(limit - used, 0) for limit, used in CGROUPS.memory())])


def _pages(name: str) -> int | None:
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def cpus() -> int:
    """The CPUs that this process can keep busy, at least 1: for the number of its threads."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([here, *(math.ceil(share) for share in CGROUPS.cpus())]))


# --- the processor --------------------------------------------------------------------------------------------------

CPUINFO = Path("/proc/cpuinfo")  # tests replace it
CPU_DTYPE = "JAXSERVE_CPU_DTYPE"
_BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86's names, and Arm's


def processor() -> str:
    """The processor's model and features; two with equal ones compute alike."""
    try:
        first = CPUINFO.read_text().split("\n\n")[0]
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    named = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", first, re.MULTILINE)
    return f"{platform.machine()} {named}"


def cpu_dtype(stored: str) -> str:
    """The dtype of parameters on a CPU, if none is set, of a checkpoint in this one: bfloat16 where both the checkpoint
    and the processor have it, else float32, because 16-bit arithmetic is slow without units for it. JAXSERVE_CPU_DTYPE
    sets another, such as the one that all machines of a fleet have."""
    if wanted := os.environ.get(CPU_DTYPE):
        if wanted not in ("bfloat16", "float16", "float32"):
            problem = f"{CPU_DTYPE} is {wanted!r}, which is not a supported dtype"
            raise JaxserveError(problem, "choose bfloat16, float16 or float32")
        return wanted
    has_units = bool(_BFLOAT16_UNITS & {*processor().replace("'", " ").split()})
    return "bfloat16" if stored == "bfloat16" and has_units else "float32"
