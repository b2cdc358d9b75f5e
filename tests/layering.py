# SPDX-License-Identifier: Apache-2.0
"""Reads who imports whom from the AST and says what breaks the order. The rules are data, on top.

All imports count: those inside functions and under TYPE_CHECKING bind the design just the same.
"""

import ast
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("jaxserve", "pallas_kernels", "convert")

# The order of the house. A unit (one line here) may import units of a lower rank, and itself.
RANKS = {
    # The package file. Its lazy names (LLM, ...) lead anywhere: it alone is not held to its rank.
    "jaxserve": 0,
    # The leaves, open to all of jaxserve and convert.
    "jaxserve.errors": 1,
    "jaxserve.cli.client": 2,
    "jaxserve.exit_codes": 2,
    "jaxserve.flags.parsing": 2,
    "jaxserve.host.interrupts": 2,
    "jaxserve.text.text_length": 2,
    "jaxserve.text.token_bytes": 2,
    "jaxserve.types": 2,
    "jaxserve.config": 3,
    "jaxserve.flags.help": 3,
    "jaxserve.types.metrics": 3,
    "jaxserve.engine.execute.profiling": 3,
    # Ranked for those above; below it nothing of ours is open to it, see KERNELS_MAY_IMPORT.
    "pallas_kernels": 4,
    "jaxserve.text.tokenizer": 5,
    "jaxserve.quant": 5,
    "jaxserve.parallel": 5,
    "jaxserve.models": 6,
    "jaxserve.sampling": 7,
    "convert": 7,
    "jaxserve.engine": 8,
    "jaxserve.host.beam_search": 9,
    "jaxserve.frontend.prepare": 9,
    "jaxserve.frontend.streams": 9,
    "jaxserve.host.token_arrays": 10,
    "jaxserve.frontend.client": 10,
    "jaxserve.host.open": 10,
    "jaxserve.host.thread": 10,
    "jaxserve.async_llm": 11,
    "jaxserve.llm": 11,
    "jaxserve.process": 11,
    "jaxserve.server": 12,
    "jaxserve.deploy": 13,
    "jaxserve.demo": 13,
    "jaxserve.cli": 14,
    "jaxserve.__main__": 15,
}

# Host code: a scheduler step or a test of it must never wait for jax.
HOST = {
    *("jaxserve", "jaxserve.errors", "jaxserve.types", "jaxserve.config", "jaxserve.types.metrics"),
    *("jaxserve.engine.schedule.scheduler", "jaxserve.engine.schedule.block_pool", "jaxserve.engine.schedule.packing"),
    *("jaxserve.engine.schedule.block_tables", "jaxserve.engine.schedule.waiting", "jaxserve.engine.schedule.commit"),
    *("jaxserve.engine.schedule.plan", "jaxserve.engine.schedule.admission", "jaxserve.engine.schedule.buckets"),
    *("jaxserve.engine.schedule.sequence", "jaxserve.frontend.outputs", "jaxserve.sampling.grammar"),
    *("jaxserve.text.tokenizer", "jaxserve.text.token_bytes", "jaxserve.text.text_length"),
    *("jaxserve.frontend.prepare", "jaxserve.frontend.streams", "jaxserve.frontend.client"),
    *("jaxserve.frontend.wire", "jaxserve.frontend.process", "jaxserve.frontend.attach", "jaxserve.host.outbox"),
    *(
        "convert.files.header",
        "convert.files.hub",
        "convert.files.hub_faults",
        "convert.files.output",
        "convert.files.progress",
        "convert.files.reader",
        "convert.files.safetensors",
    ),
    *("jaxserve.exit_codes", "jaxserve.server.routes.playground"),
    *("jaxserve.server.lifecycle", "jaxserve.server.app", "jaxserve.server.state", "jaxserve.server.requests"),
    *(
        "jaxserve.server.http.auth",
        "jaxserve.server.http.guard",
        "jaxserve.server.http.listening",
        "jaxserve.server.observe.logs",
    ),
    *(
        "jaxserve.server.routes.admin",
        "jaxserve.server.routes.status",
        "jaxserve.server.observe.prometheus",
        "jaxserve.server.observe.histogram",
    ),
    *(
        "jaxserve.server.config",
        "jaxserve.server.routes.table",
        "jaxserve.server.observe.banner",
        "jaxserve.server.observe.request_record",
    ),
    *(
        "jaxserve.server.params",
        "jaxserve.server.routes.completions",
        "jaxserve.server.routes.chat",
        "jaxserve.server.routes.embeddings",
    ),
    *(
        "jaxserve.server.routes.tokens",
        "jaxserve.server.routes.models",
        "jaxserve.server.routes.openapi",
        "jaxserve.server.errors",
    ),
    *(
        "jaxserve.server.answers.generation",
        "jaxserve.server.answers.replies",
        "jaxserve.server.answers.logprobs",
        "jaxserve.server.answers.sse",
    ),
    *("jaxserve.server.answers.stream_interval", "jaxserve.server.protocol.others"),
    *("jaxserve.demo", "benchmarks.demo.corpus"),
    *("jaxserve.cli.client", "jaxserve.flags.parsing", "jaxserve.flags.help"),
    *("jaxserve.cli", "jaxserve.cli.run", "jaxserve.cli.settings", "jaxserve.cli.preflight", "jaxserve.cli.chat"),
    *("jaxserve.cli.bench_serve", "jaxserve.cli.load", "jaxserve.cli.completion", "jaxserve.cli.terminal"),
}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
KERNELS_MAY_IMPORT = {"jax", "numpy", "pallas_kernels", *sys.stdlib_module_names}


@dataclass
class Module:
    name: str
    ours: set[str] = field(default_factory=set[str])  # modules of our packages that it imports
    others: set[str] = field(default_factory=set[str])  # top-level names of all else

    @property
    def unit(self) -> str:
        """The line of RANKS that it belongs to."""
        parts = self.name.split(".")
        return ".".join(parts[:2]) if parts[0] == "jaxserve" else parts[0]


def read_tree(root: Path) -> dict[str, Module]:
    """Every module of the packages under `root`, by name."""
    files: dict[str, Path] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: _read(name, path, known=files.keys()) for name, path in files.items()}


def _read(name: str, path: Path, *, known: Iterable[str]) -> Module:
    module = Module(name)
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name` means the submodule `name` where there is one.
            full = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if target in known else base for target in full]
        else:
            continue
        for target in targets:
            top = target.split(".")[0]
            if top in PACKAGES:
                module.ours.add(target)
            else:
                module.others.add(top)
    return module


def violations(tree: Mapping[str, Module]) -> list[str]:
    """Everything that breaks the rules, one line each."""
    found: list[str] = []
    for module in tree.values():
        if module.unit not in RANKS:
            found.append(f"{module.name}: new unit {module.unit}; add it to RANKS in {__name__}")
            continue
        found += [
            f"{module.name} imports {target}, which is not below it"
            for target in sorted(module.ours)
            if not _may_import(module, target)
        ]
        if module.unit == "pallas_kernels":
            tops = module.others | {target.split(".")[0] for target in module.ours}
            extra = sorted(tops - KERNELS_MAY_IMPORT)
            found += [f"{module.name} imports {name}; kernels use jax and numpy" for name in extra]
        if module.name in HOST and (road := _road_to_jax(module.name, tree)):
            found.append(f"host module reaches jax: {' -> '.join(road)}")
    edges = {name: {_existing(t, tree) for t in module.ours} for name, module in tree.items()}
    found += [f"module cycle: {' -> '.join(cycle)}" for cycle in _cycles(edges)]
    units: dict[str, set[str]] = {}
    for module in tree.values():
        wanted = {Module(target).unit for target in module.ours}
        units.setdefault(module.unit, set()).update(wanted - {module.unit, "jaxserve"})
    units.pop("jaxserve", None)
    return found + [f"package cycle: {' -> '.join(cycle)}" for cycle in _cycles(units)]


def _may_import(module: Module, target: str) -> bool:
    unit, wanted = module.unit, Module(target).unit
    if unit == wanted or unit == "jaxserve":
        return True
    return wanted in RANKS and RANKS[wanted] < RANKS[unit]


def _existing(target: str, tree: Mapping[str, Module]) -> str:
    """`import a.b.name` may name something inside module a.b."""
    while target not in tree and "." in target:
        target = target.rpartition(".")[0]
    return target


def _road_to_jax(start: str, tree: Mapping[str, Module]) -> list[str] | None:
    """How `start` comes to import jax, through our own modules and the packages they lie in."""
    roads: list[list[str]] = []
    seen: set[str] = set()

    def reach(name: str, road: list[str]) -> None:
        parts = name.split(".")
        for part in (".".join(parts[:n]) for n in range(len(parts), 0, -1)):
            if part in tree and part not in seen:
                seen.add(part)
                roads.append([*road, name] if part == name else [*road, name, part])

    reach(start, [])
    for road in roads:  # grows while it is walked: breadth first, so the road found is the shortest
        module = tree[road[-1]]
        if heavy := module.others & JAX:
            return [*road, min(heavy)]
        for target in sorted(module.ours):
            reach(_existing(target, tree), road)
    return None


def _cycles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """One cycle for each back edge of a depth-first walk; none means there is no cycle at all."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> None:
        if node in trail:
            found.append([*trail[trail.index(node) :], node])
        elif node not in done:
            for target in sorted(edges.get(node, ())):
                if target != node:
                    visit(target, [*trail, node])
            done.add(node)

    for node in sorted(edges):
        visit(node, [])
    return found
