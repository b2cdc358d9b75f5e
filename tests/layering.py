# SPDX-License-Identifier: Apache-2.0
"""Reads the imports of all modules from their AST and reports violations. The rules are data and name folders.

All imports count, also those inside functions and under TYPE_CHECKING.
"""

import ast
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("jaxserve", "pallas_kernels", "convert")

# The order of the house, lowest first. A unit, which is a folder or a loose module, may import units of the lines above
# its own, and itself; units of one line do not know each other.
ORDER = (
    ("jaxserve.errors", "jaxserve.unsupported", "pallas_kernels"),
    ("jaxserve.machine",),
    (
        "jaxserve.exit_codes",
        "jaxserve.types",
        "jaxserve.flags",
        "jaxserve.demo",
        "jaxserve.deploy",
    ),
    ("jaxserve.config", "jaxserve.text"),
    ("jaxserve.parallel", "jaxserve.quant"),
    ("jaxserve.models",),
    ("jaxserve.sampling", "convert"),
    ("jaxserve.engine.buckets",),
    ("jaxserve.engine.capacity",),
    ("jaxserve.engine.schedule",),
    ("jaxserve.engine.execute",),
    ("jaxserve.engine",),
    ("jaxserve.frontend",),
    ("jaxserve.host",),
    ("jaxserve.llm", "jaxserve.async_llm", "jaxserve.server"),
    ("jaxserve.cli",),
    ("jaxserve.__main__", "jaxserve.openai_api_server"),
)
RANKS = {unit: rank for rank, line in enumerate(ORDER) for unit in line}
# The package file. Its lazy names (LLM, ...) lead anywhere; all may ask it for the version.
OPEN = "jaxserve"

# Nothing in these folders and loose modules may lead to jax: a scheduler step, a web server and `--help` do not wait
# for it. Modules elsewhere that they import, such as jaxserve.engine.capacity, are thereby free of it too.
JAX_FREE = (
    *("jaxserve.errors", "jaxserve.machine", "jaxserve.unsupported", "jaxserve.exit_codes", "jaxserve.config"),
    *(
        "jaxserve.types",
        "jaxserve.flags",
        "jaxserve.text",
        "jaxserve.demo",
        "jaxserve.models.families",
    ),
    *("jaxserve.engine.schedule", "jaxserve.frontend", "jaxserve.server", "jaxserve.cli"),
    *("convert.files", "convert.gguf"),
)
# Folders inside those, for what starts jax on purpose.
JAX_ALLOWED = ("jaxserve.cli.with_jax",)
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
KERNELS_MAY_IMPORT = {"jax", "numpy", "pallas_kernels", *sys.stdlib_module_names}


def inside(name: str, folders: Iterable[str]) -> str | None:
    """The innermost of these folders and modules that `name` is or lies in."""
    parts = name.split(".")
    folders = set(folders)
    return next((found for n in range(len(parts), 0, -1) if (found := ".".join(parts[:n])) in folders), None)


@dataclass
class Module:
    name: str
    ours: set[str] = field(default_factory=set[str])  # modules of our packages that it imports
    others: set[str] = field(default_factory=set[str])  # top-level names of all else

    @property
    def unit(self) -> str:
        """The unit of ORDER that the module belongs to."""
        parts = self.name.split(".")
        return inside(self.name, RANKS) or ".".join(parts[:2] if parts[0] == "jaxserve" else parts[:1])


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
        if module.unit not in RANKS and module.unit != OPEN:
            found.append(f"{module.name}: new unit {module.unit}; add it to ORDER in {__name__}")
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
        free = inside(module.name, JAX_FREE) and not inside(module.name, JAX_ALLOWED)
        if (free or module.name == OPEN) and (road := road_to_jax(module.name, tree)):
            found.append(f"{module.name} is to be free of jax and reaches it: {' -> '.join(road)}")
    edges = {name: {_existing(t, tree) for t in module.ours} for name, module in tree.items()}
    found += [f"module cycle: {' -> '.join(cycle)}" for cycle in _cycles(edges)]
    units: dict[str, set[str]] = {}
    for module in tree.values():
        wanted = {Module(target).unit for target in module.ours}
        units.setdefault(module.unit, set()).update(wanted - {module.unit, OPEN})
    units.pop(OPEN, None)
    found += [f"{unit} is in the rules and not in the tree" for unit in sorted(_phantoms(tree))]
    return found + [f"package cycle: {' -> '.join(cycle)}" for cycle in _cycles(units)]


def _may_import(module: Module, target: str) -> bool:
    unit, wanted = module.unit, Module(target).unit
    if unit == wanted or OPEN in (unit, wanted):
        return True
    return wanted in RANKS and RANKS[wanted] < RANKS[unit]


def _phantoms(tree: Mapping[str, Module]) -> set[str]:
    """The units that the rules name and that do not exist."""
    return {unit for unit in (*RANKS, *JAX_FREE, *JAX_ALLOWED) if unit not in tree}


def _existing(target: str, tree: Mapping[str, Module]) -> str:
    """`import a.b.name` may name something inside module a.b."""
    while target not in tree and "." in target:
        target = target.rpartition(".")[0]
    return target


def road_to_jax(start: str, tree: Mapping[str, Module]) -> list[str] | None:
    """The chain of imports from `start` to jax, through our own modules and the packages they are in."""
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
