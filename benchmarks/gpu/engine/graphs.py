# SPDX-License-Identifier: Apache-2.0
"""Section `engine_graphs`: whether the engine's programs run as CUDA graphs, according to XLA's launch plans.

A row is right if nothing is launched outside a graph. `per_layer` is the number of launches per layer.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.dumps import launch_plan
from benchmarks.gpu.engine.rig import Rig, rig_of
from jaxserve.engine.execute import programs

COLUMNS = ("graphs", "launches", "outside", "per_layer", "temp_mb", "ok", "note")


def compile_with_plan(program: programs.Program) -> tuple[Any, launch_plan.LaunchPlan | None]:
    """The program as the engine compiles it, and its plan."""
    jitted = jax.jit(
        program.function,
        static_argnames=programs.STATIC.get(program.function, ()),
        donate_argnames=programs.DONATED[program.function],
    )
    with tempfile.TemporaryDirectory() as folder:
        lowered = jitted.lower(*program.static, *program.shapes)
        return lowered.compile(compiler_options=launch_plan.options(folder)), launch_plan.read(Path(folder))


def measure(rig: Rig, key: Any) -> Row:
    with rig.runner.on_mesh():
        compiled, plan = compile_with_plan(rig.runner.program(key))
    memory = compiled.memory_analysis()
    row: Row = {"temp_mb": memory.temp_size_in_bytes / 1e6 if memory else None}
    if plan is None:
        return row | {"note": "no plan"}  # because this backend writes none
    row |= {"graphs": plan.graphs, "launches": len(plan.launches), "outside": len(plan.outside)}
    row |= {"per_layer": plan.per_layer(), "names_outside": plan.outside[:20], "layer": plan.layer()}
    on_gpu = jax.default_backend() == "gpu"
    return row | ({"ok": plan.graphs > 0 and not plan.outside} if on_gpu else {})


def run(page: Page) -> None:
    rig = rig_of(page)
    rows, tokens = ((2,), ()) if page.settings.tiny else ((64, 1), (2048,))
    cases = {f"decode[{n}]": rig.runner.decode_layout(n) for n in rows}
    cases |= {f"mixed[{n}]": rig.runner.mixed_layout(n) for n in tokens}
    cases |= {f"head[{n}]": (n, rig.runner.heads[0]) for n in rows[:1]}
    page.each(cases.items(), lambda case: measure(rig, case[1]), name=lambda case: case[0])
