# SPDX-License-Identifier: Apache-2.0
"""The decode step of real models, with abstract weights, compiles for an H200 into what it should: nothing as large
as a weight matrix or a KV pool is copied, the cache is updated in place, temporaries are small.

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
from jaxserve.models import decoder, kv_cache, layout
from jaxserve.models.inputs import ModelInputs
from jaxserve.models.spec import ModelSpec
from tests.cuda.hopper import Compiled, compile_for_h200

RECORD = Path(__file__).with_name("steps.json")
ROWS, BLOCKS, BLOCK_SIZE, WIDTH = 64, 2048, 16, 512


def decode_inputs(rows: int) -> ModelInputs:
    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return ModelInputs(
        tokens=ints(rows),
        positions=ints(rows),
        slots=ints(rows),
        block_tables=ints(rows, WIDTH),
        kv_lens=ints(rows),
        cu_q_lens=ints(rows + 1),
        distribution=ints(2),
        sampled=ints(rows),
        decode_only=True,
    )


def compile_step(spec: ModelSpec) -> tuple[Compiled, Any, Any]:
    params = layout.abstract_params(spec, jnp.bfloat16)
    cache = kv_cache.abstract_cache(spec, blocks=BLOCKS, block_size=BLOCK_SIZE, dtype=jnp.bfloat16)
    step = partial(decoder.step, spec)
    return compile_for_h200(step, params, cache, decode_inputs(ROWS), donate=(1,)), params, cache


def launched(compiled: Compiled) -> list[str]:
    """The instructions of the entry computation: what is not inside of a kernel or a fusion."""
    return compiled.hlo[compiled.hlo.index("\nENTRY ") :].splitlines()


def large_copies(compiled: Compiled, at_least: int) -> list[str]:
    """Instructions that make an array of so many elements, be it one of several results."""
    found: list[str] = []
    for line in launched(compiled):
        made = re.search(r"= (\([^=]*?\)|\w+\[[\d,]*\]\S*) (copy|copy-start|fusion|transpose|convert|pad)\(", line)
        sizes = re.findall(r"\w+\[([\d,]+)\]", made[1]) if made else []
        if any(math.prod(int(n) for n in size.split(",")) >= at_least for size in sizes):
            found.append(line.strip()[:200])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_decode_step(name: str) -> None:
    spec = MODELS[name]()
    compiled, params, cache = compile_step(spec)
    # Logits are the widest result of ROWS rows; matrices smaller than they are few, and of no account.
    assert large_copies(compiled, ROWS * spec.vocab_size + 1) == []
    assert any(math.prod(leaf.shape) > ROWS * spec.vocab_size for leaf in jax.tree.leaves(params["layers"][0]))
    # No loop and no sort: both are many launches.
    assert not [line for line in launched(compiled) if re.search(r" (while|sort|conditional)\(", line)]
    cache_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert compiled.alias_bytes == cache_bytes
    seen = {"temp_bytes": compiled.temp_bytes}
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("JAXSERVE_RECORD"):
        RECORD.write_text(json.dumps(recorded | {name: seen}, indent=1, sort_keys=True) + "\n")
    else:
        assert seen == recorded.get(name), "differs from steps.json; if that is meant, record it: see above"
