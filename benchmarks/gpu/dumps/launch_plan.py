# SPDX-License-Identifier: Apache-2.0
"""Reads the launch plan that XLA writes with --xla_dump_to: what a program launches, and what of it in CUDA graphs.

Each line of a plan is a launch. A CUDA graph (XLA: command buffer) is a line, too; its launches follow it, indented.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^(\s*)\d+: (k\w+)\s*(?:\[[^\]]*\])?\s*(\S*)")
_OPTIONS = {"xla_dump_hlo_as_text": True}
# A number at the end of a name distinguishes kernels that XLA or we named alike.
_NUMBER = re.compile(r"(_\d+)+$")


@dataclass
class LaunchPlan:
    graphs: int = 0
    launches: list[str] = field(default_factory=list[str])  # by name, in order
    outside: list[str] = field(default_factory=list[str])  # the launches outside all graphs

    def per_layer(self, kernel: str = "kv_write") -> int | None:
        """The number of launches per layer: from the last but one launch of `kernel` to the last."""
        at = [place for place, name in enumerate(self.launches) if name == kernel]
        return at[-1] - at[-2] if len(at) > 1 else None

    def layer(self, kernel: str = "kv_write") -> list[str]:
        """The names of those launches, without numbers."""
        at = [place for place, name in enumerate(self.launches) if name == kernel]
        return [_NUMBER.sub("", name) for name in self.launches[at[-2] : at[-1]]] if len(at) > 1 else []

    def counts(self) -> dict[str, int]:
        return dict(Counter(_NUMBER.sub("", name) for name in self.launches))


def options(folder: str | Path) -> dict[str, Any]:
    """Compiler options that make XLA write the launch plan to `folder`."""
    return {"xla_dump_to": str(folder)} | _OPTIONS


def read(folder: Path) -> LaunchPlan | None:
    """The plan of the only program dumped to `folder`; None if the backend writes none."""
    files = sorted(folder.rglob("*thunk_sequence_after_thunk_passes.txt")) or sorted(
        folder.rglob("*thunk_sequence*.txt")
    )
    return parse(files[-1].read_text()) if files else None


def parse(text: str) -> LaunchPlan:
    plan = LaunchPlan()
    within: int | None = None  # the indentation of the graph that the current lines belong to
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        depth, kind, name = len(found[1]), found[2], found[3]
        if within is not None and depth <= within:
            within = None
        if kind == "kCommandBuffer":
            plan.graphs += within is None
            within = depth if within is None else within
            continue
        launch = name if kind == "kCustomKernel" and name else kind
        plan.launches.append(launch)
        if within is None:
            plan.outside.append(launch)
    return plan
