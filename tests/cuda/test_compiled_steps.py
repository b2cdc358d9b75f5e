# SPDX-License-Identifier: Apache-2.0
"""A step of real models as the engine runs it, with abstract weights, compiles for an H200 into what it should:
nothing as large as a weight matrix or a KV pool is copied, state is updated in place, temporaries are small.

`steps.json` records the bytes of temporaries: JAXSERVE_RECORD=1 records them anew.
"""

import json
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.published import MODELS
from jaxserve.engine.execute import programs
from jaxserve.engine.execute.model_programs import StepSpec
from jaxserve.engine.schedule import need, packing
from jaxserve.engine.schedule.need import Variant
from jaxserve.models import kv_cache, param_layout
from jaxserve.models.cache_groups import one_group
from jaxserve.models.spec import ModelSpec
from jaxserve.sampling import controls
from tests.cuda.hopper import Compiled, compile_for_h200

RECORD = Path(__file__).with_name("steps.json")
ROWS, BLOCKS, BLOCK_SIZE, WIDTH, ENTRIES, TOP_N = 64, 2048, 16, 512, 128, 20


def ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def compile_model(spec: ModelSpec) -> tuple[Compiled, Any, Any]:
    params = param_layout.abstract_params(spec, jnp.bfloat16)
    cache = kv_cache.abstract_cache(spec, blocks=BLOCKS, block_size=BLOCK_SIZE, dtype=jnp.bfloat16)
    decode = packing.decode_layout(ROWS)
    program = partial(programs.model, StepSpec(spec, one_group(spec), decode, ENTRIES, 0, BLOCK_SIZE))
    arguments = params, cache, ints(1, ROWS, WIDTH), ints(ROWS, 2), ints(decode.size)
    return compile_for_h200(program, *arguments, donate=(1, 2)), params, cache


def launched(compiled: Compiled) -> list[str]:
    """The instructions of the entry computation: what is not inside of a kernel or a fusion."""
    return compiled.hlo[compiled.hlo.index("\nENTRY ") :].splitlines()


def large_copies(compiled: Compiled, at_least: int) -> list[str]:
    """Instructions that make an array of so many elements, also as one of several results."""
    found: list[str] = []
    for line in launched(compiled):
        made = re.search(r"= (\([^=]*?\)|\w+\[[\d,]*\]\S*) (copy|copy-start|fusion|transpose|convert|pad)\(", line)
        sizes = re.findall(r"\w+\[([\d,]+)\]", made[1]) if made else []
        if any(math.prod(int(n) for n in size.split(",")) >= at_least for size in sizes):
            found.append(line.strip()[:200])
    return found


def nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_recorded(name: str, compiled: Compiled) -> None:
    seen = {"temp_bytes": compiled.temp_bytes}
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("JAXSERVE_RECORD"):
        RECORD.write_text(json.dumps(recorded | {name: seen}, indent=1, sort_keys=True) + "\n")
    else:
        assert seen == recorded.get(name), "differs from steps.json; if that is meant, record it: see above"


@pytest.mark.parametrize("name", MODELS)
def test_decoding(name: str) -> None:
    compiled, params, cache = compile_model(MODELS[name]())
    # Matrices smaller than this are few, and of no account.
    large = ROWS * MODELS[name]().vocab_size + 1
    assert large_copies(compiled, large) == []
    assert any(math.prod(leaf.shape) > large for leaf in jax.tree.leaves(params["layers"][0]))
    # No loop and no sort: both are many launches.
    assert not [line for line in launched(compiled) if re.search(r" (while|sort|conditional)\(", line)]
    assert compiled.alias_bytes == nbytes(cache) + 4 * ROWS * WIDTH
    check_recorded(name, compiled)


@pytest.mark.parametrize("head", need.variants(TOP_N).values(), ids=repr)
def test_head(head: Variant) -> None:
    """Of the model with the widest vocabulary: the matrix is read once, the logits stay on the device."""
    name, spec = max(((name, of()) for name, of in MODELS.items()), key=lambda item: item[1].vocab_size)
    params = param_layout.abstract_params(spec, jnp.bfloat16)
    kept = controls.abstract(ROWS, spec.vocab_size) if head.controlled else None
    hidden = jax.ShapeDtypeStruct((ENTRIES, spec.hidden), jnp.bfloat16)
    program = partial(programs.head, spec, ROWS, head, False)
    arguments = params, ints(ROWS, 2), kept, hidden, ints(ENTRIES, len(packing.ENTRY))
    compiled = compile_for_h200(program, *arguments, donate=(1, 2))
    assert large_copies(compiled, ROWS * spec.vocab_size + 1) == []
    assert not [line for line in launched(compiled) if re.search(r" (while|sort|conditional)\(", line)]
    assert compiled.alias_bytes >= nbytes(kept) + 8 * ROWS
    check_recorded(f"head {head} {name}", compiled)
