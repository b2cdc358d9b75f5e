# SPDX-License-Identifier: Apache-2.0
"""The programs of an engine with the settings that a GPU has by default, compiled for an H200 from abstract weights:
Llama-3.1-8B cut to three layers, which shows all that a layer adds, 256 rows, 2048 tokens, 131072 of context.

What counts on the device is held fast: every launch lies in one CUDA graph, nothing as large as a weight or a pool is
copied, all state is updated in place, and of how many launches a layer consists. `steps.json` records launches and
temporaries: JAXSERVE_RECORD=1 records them anew. Matrix products are XLA's choice without a device to try them on; on a
GPU it may choose others, with a launch more or less.
"""

import json
import math
import os
import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu.dumps import launch_plan
from benchmarks.published import llama_8b
from jaxserve.engine.buckets import Buckets
from jaxserve.engine.execute import programs
from jaxserve.engine.execute.model_programs import StepSpec
from jaxserve.engine.schedule import need, packing
from jaxserve.models import kv_cache, param_layout
from jaxserve.models.cache_groups import groups_of, one_group
from jaxserve.sampling import controls
from tests.cuda.hopper import DUMP, Compiled, compile_for_h200

RECORD = Path(__file__).with_name("steps.json")
LAYERS, BLOCKS, BLOCK_SIZE, WIDTH = 3, 4096, 16, 8192
BUCKETS = Buckets.of(rows=256, tokens=2048, score_rows=256)
SPEC = replace(llama_8b(), layers=llama_8b().layers[:LAYERS])
HEADS = [*need.variants(20).values()]
# Each costs some microseconds, 32 times in a step.
MOST_PER_LAYER = 17
# Into these XLA compiles our kernels and its own products. All of them can be captured.
CUSTOM_CALLS = {"__gpu$xla.gpu.triton", "__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8"}


def ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@cache
def params() -> Any:
    return param_layout.abstract_params(SPEC, jnp.bfloat16)


@cache
def pools(kv: str = "bfloat16") -> Any:
    return kv_cache.abstract_cache(SPEC, blocks=BLOCKS, block_size=BLOCK_SIZE, dtype=jnp.dtype(kv))


def nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def copied(compiled: Compiled, at_least: int) -> list[str]:
    """Instructions, of kernels too, that make an array of so many elements and are no product."""
    found: list[str] = []
    for line in compiled.hlo[compiled.hlo.index("\nENTRY ") :].splitlines():
        made = re.search(r"= (\([^=]*?\)|\w+\[[\d,]*\]\S*) (copy|copy-start|fusion|transpose|convert|pad)\(", line)
        sizes = re.findall(r"\w+\[([\d,]+)\]", made[1]) if made else []
        if any(math.prod(int(n) for n in size.split(",")) >= at_least for size in sizes):
            found.append(line.strip()[:200])
    return found


def check(name: str, compiled: Compiled) -> launch_plan.LaunchPlan:
    """Check what holds for every program, and compare with the record."""
    plan = launch_plan.read(DUMP)
    assert plan is not None
    called = set(re.findall(r'custom_call_target="([^"]+)"', compiled.hlo))
    assert called <= CUSTOM_CALLS
    assert (plan.graphs, plan.outside) == (1, []), "launched outside of the one CUDA graph"
    seen = {"temp_bytes": compiled.temp_bytes, "launches": len(plan.launches)}
    if plan.layer():
        seen |= {"layer": plan.layer()}
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("JAXSERVE_RECORD"):
        RECORD.write_text(json.dumps(recorded | {name: seen}, indent=1, sort_keys=True) + "\n")
    else:
        assert seen == recorded.get(name), "differs from steps.json; if that is meant, record it: see above"
    return plan


def check_model(name: str, shape: packing.Layout, *, kv: str = "bfloat16") -> None:
    arguments = params(), pools(kv), ints(1, BUCKETS.rows, WIDTH), ints(BUCKETS.rows, 2), ints(shape.size)
    program = partial(programs.model, StepSpec(SPEC, one_group(SPEC), shape, BUCKETS.entries, 0, BLOCK_SIZE))
    compiled = compile_for_h200(program, *arguments, donate=(1, 2))
    # The block tables of all rows are gathered: the largest array except for those that a layer computes.
    largest = max(BUCKETS.rows * WIDTH, shape.tokens * 2 * SPEC.layers[0].mlp.width)  # pyright: ignore
    assert copied(compiled, largest + 1) == []
    assert compiled.alias_bytes == nbytes(pools(kv)) + 4 * BUCKETS.rows * WIDTH
    plan = check(name, compiled)
    assert plan.launches.count("kv_write") == LAYERS
    assert (plan.per_layer() or 0) <= MOST_PER_LAYER


@pytest.mark.parametrize("rows", [1, 8, 64, 256])
def test_decode(rows: int) -> None:
    check_model(f"engine decode[{rows}]", packing.decode_layout(rows))


@pytest.mark.parametrize("kv", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_one_byte_kv(kv: str) -> None:
    check_model(f"engine decode[64] kv {kv}", packing.decode_layout(64), kv=kv)


@pytest.mark.parametrize("tokens", [64, 2048])
def test_mixed(tokens: int) -> None:
    check_model(f"engine mixed[{tokens}]", packing.mixed_layout(tokens, BUCKETS, BLOCK_SIZE))


def test_layers_with_a_window_beside_others() -> None:
    """Layers of two cache groups write to the same pools one after the other, which must copy none."""
    full, windowed = (
        replace(layer, attention=replace(layer.attention, window=window))
        for layer, window in zip(SPEC.layers, (None, 4096), strict=False)
    )
    spec = replace(SPEC, layers=(windowed, full, full, windowed))
    groups = groups_of(spec, WIDTH * BLOCK_SIZE)
    assert (groups.windows, groups.places) == ((None, 4096), 2)
    shape = packing.decode_layout(64, groups=2)
    own = param_layout.abstract_params(spec, jnp.bfloat16)
    pools = kv_cache.abstract_cache(spec, blocks=BLOCKS, block_size=BLOCK_SIZE, dtype=jnp.bfloat16, groups=groups)
    arguments = own, pools, ints(2, BUCKETS.rows, WIDTH), ints(BUCKETS.rows, 2), ints(shape.size)
    program = partial(programs.model, StepSpec(spec, groups, shape, BUCKETS.entries, 0, BLOCK_SIZE))
    compiled = compile_for_h200(program, *arguments, donate=(1, 2))
    assert copied(compiled, 2 * BUCKETS.rows * WIDTH + 1) == []
    assert compiled.alias_bytes == nbytes(pools) + 2 * 4 * BUCKETS.rows * WIDTH
    plan = check("engine decode[64] of two cache groups", compiled)
    assert plan.launches.count("kv_write") == 4


@pytest.mark.parametrize(("rows", "head"), [(1, 0), (256, 0), (64, 1), (256, 2), (64, 3), (64, -1)])
def test_head(rows: int, head: int) -> None:
    variant = HEADS[head]
    kept = controls.abstract(BUCKETS.rows, SPEC.vocab_size) if variant.controlled else None
    hidden = jax.ShapeDtypeStruct((BUCKETS.entries, SPEC.hidden), jnp.bfloat16)
    arguments = params(), ints(BUCKETS.rows, 2), kept, hidden, ints(BUCKETS.entries, len(packing.ENTRY))
    compiled = compile_for_h200(partial(programs.head, SPEC, rows, variant, False), *arguments, donate=(1, 2))
    # The matrix of the head is the largest thing there is; the controls are smaller.
    assert copied(compiled, max(rows, BUCKETS.rows) * SPEC.vocab_size + 1) == []
    assert compiled.alias_bytes >= nbytes(kept) + 8 * BUCKETS.rows
    check(f"engine head {variant}[{rows}]", compiled)


def test_block_moves_and_edits() -> None:
    arguments = pools(), ints(1, BUCKETS.rows, WIDTH), ints(packing.EDIT_SIZE)
    compiled = compile_for_h200(programs.edit, *arguments, donate=(0, 1))
    assert copied(compiled, math.prod(pools()[0]["k"].shape)) == []
    assert compiled.alias_bytes == nbytes(pools()) + 4 * BUCKETS.rows * WIDTH
    check("engine edit", compiled)
