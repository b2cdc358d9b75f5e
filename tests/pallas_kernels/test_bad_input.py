# SPDX-License-Identifier: Apache-2.0
"""A wrong argument raises a ValueError that names both values, on every platform and before any device work."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import checks, dispatch
from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.kv_write import kv_write, latent_write
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged import Ragged
from pallas_kernels.sampling import RowParams, sample, token_logprobs

type Shape = tuple[int, ...]


def of(shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


BATCH: dict[str, Any] = dict(
    block_tables=[[1, 2], [3, 4]], kv_lens=[9, 12], cu_q_lens=[0, 1, 4], distribution=[1, 2], decode_only=False
)


def batch(options: dict[str, Any]) -> Ragged:
    """A valid batch, with the changes to it that the options contain."""
    fields = BATCH | {name: options.pop(name) for name in BATCH if name in options}
    made: dict[str, Any] = {k: jnp.asarray(v, jnp.int32) if isinstance(v, list) else v for k, v in fields.items()}
    return Ragged(**made)


def paged(q: Shape = (4, 4, 16), k: Shape = (5, 8, 2, 16), v: Shape | None = None, **changes: Any) -> None:
    dtypes = [changes.pop(name, jnp.float32) for name in ("q_dtype", "k_dtype")]
    ragged, v_dtype = batch(changes), changes.pop("v_dtype", dtypes[1])
    paged_attention(of(q, dtypes[0]), of(k, dtypes[1]), of(v or k, v_dtype), ragged, **changes)


def mla(q: Shape = (4, 4, 48), pool: Shape = (5, 8, 48), dtype: Any = jnp.float32, **changes: Any) -> None:
    ragged, options = batch(changes), dict[str, Any](latent_dim=32, scale=0.2) | changes
    mla_attention(of(q), of(pool, dtype), ragged, **options)


def write(k: Shape = (3, 2, 16), pool: Shape = (5, 8, 2, 16), slots: list[int] | None = None, **options: Any) -> None:
    dtype = options.pop("pool_dtype", jnp.float32)
    ids = jnp.asarray([1, 2, 3] if slots is None else slots, options.pop("slot_dtype", jnp.int32))
    kv_write(of(pool, dtype), of(pool, dtype), of(k), of(k), ids, **options)


K = jnp.ones((2, 2, 8), jnp.float32)  # two tokens


def ids(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def draw(logits: Shape = (2, 8), **changes: Any) -> None:
    options = {n: changes.pop(n) for n in list(changes) if n not in RowParams._fields}
    dtypes = dict(temperature="float32", top_k="int32", top_p="float32", min_p="float32", seed="uint32")
    values = dict(temperature=[1, 1], top_k=[0, 0], top_p=[1, 1], min_p=[0, 0], seed=[0, 0], position=[0, 0]) | changes
    p: dict[str, Any] = {
        n: v if hasattr(v, "dtype") else jnp.asarray(v, dtypes.get(n, "int32")) for n, v in values.items()
    }
    sample(of(logits, options.pop("dtype", jnp.float32)), RowParams(**p), **options)


PAGED: list[tuple[str, Callable[[], Any], list[str]]] = [
    ("q rank", lambda: paged(q=(4, 64)), ["3 axes", "got 2"]),
    ("pool rank", lambda: paged(k=(5, 8, 16)), ["4 axes", "got 3"]),
    ("head dims", lambda: paged(k=(5, 8, 2, 32)), ["q has 16", "k_pool has 32"]),
    ("heads", lambda: paged(k=(5, 8, 3, 16)), ["4 heads", "3 KV heads"]),
    ("K and V", lambda: paged(v=(6, 8, 2, 16)), ["(5, 8, 2, 16)", "(6, 8, 2, 16)"]),
    ("K and V dtypes", lambda: paged(k_dtype=jnp.int8, v_dtype=jnp.float32), ["int8", "float32"]),
    ("head dim", lambda: paged(q=(4, 4, 264), k=(5, 8, 2, 264)), ["264", "256"]),
    ("block size", lambda: paged(k=(5, 24, 2, 16)), ["24", "power of two", "8 to 256"]),
    ("small blocks", lambda: paged(k=(5, 4, 2, 16)), ["4", "8 to 256"]),
    ("large blocks", lambda: paged(k=(5, 512, 2, 16)), ["512", "8 to 256"]),
    ("q dtype", lambda: paged(q_dtype=jnp.int32, k_dtype=jnp.int32), ["int32", "bfloat16"]),
    ("dtype pair", lambda: paged(q_dtype=jnp.bfloat16), ["bfloat16", "float32", "int8"]),
    ("dtype pair", lambda: paged(k_dtype=jnp.uint8), ["float32", "uint8"]),
    ("window", lambda: paged(window=0), ["window is 0", "positive"]),
    ("soft cap", lambda: paged(soft_cap=-1.0), ["-1.0", "positive"]),
    ("sinks", lambda: paged(sinks=of((3,))), ["(3,)", "(4,)"]),
    ("sinks dtype", lambda: paged(sinks=of((4,), jnp.bfloat16)), ["float32", "bfloat16"]),
    ("scale for what", lambda: paged(k_scale=of((2,))), ["k_scale", "float32", "int8"]),
    ("int8 bare", lambda: paged(k_dtype=jnp.int8, k_scale=of((2,))), ["int8", "v_scale None"]),
    ("scale nan", lambda: paged(scale=float("nan")), ["scale is nan", "finite"]),
    ("scale array", lambda: paged(scale=of((1,))), ["scale is", "not an array"]),
    ("window half", lambda: paged(window=2.5), ["window is 2.5", "whole"]),
    ("no rows", lambda: paged(block_tables=of((0, 2), jnp.int32)), ["0 rows", "at least 1"]),
    ("no heads", lambda: paged(q=(4, 0, 16)), ["0 heads", "2 KV heads"]),
    ("no KV heads", lambda: paged(k=(5, 8, 0, 16)), ["(5, 8, 0, 16)", "at least 1"]),
    ("no blocks", lambda: paged(k=(0, 8, 2, 16)), ["(0, 8, 2, 16)", "at least 1"]),
    ("scale shape", lambda: paged(k_dtype=jnp.int8, v_dtype=jnp.int8, k_scale=of((3,))), ["(3,)", "(2,)", "(5, 8, 2)"]),
    ("table rank", lambda: paged(block_tables=[1, 2]), ["2 axes", "got 1"]),
    ("table width", lambda: paged(block_tables=of((2, 0), jnp.int32)), ["too narrow", "0 blocks", "at least 1"]),
    ("table dtype", lambda: paged(block_tables=of((2, 2))), ["int32", "float32"]),
    ("kv_lens", lambda: paged(kv_lens=[1, 2, 3]), ["(3,)", "(2,)", "2 rows"]),
    ("cu_q_lens", lambda: paged(cu_q_lens=[0, 1]), ["(2,)", "(3,)", "2 rows"]),
    ("distribution", lambda: paged(distribution=[1, 1, 2]), ["(3,)", "(2,)"]),
    ("decode only", lambda: paged(decode_only=True), ["4 tokens", "2 rows"]),
    # Values, which are known only outside jit.
    ("narrow table", lambda: paged(kv_lens=[9, 17]), ["too narrow", "17", "16"]),
    ("block id", lambda: paged(block_tables=[[1, 2], [3, 5]]), ["block_tables[1, 1] is 5", "0 to 4", "5 blocks"]),
    ("negative id", lambda: paged(block_tables=[[1, -2], [3, 4]]), ["block_tables[0, 1] is -2", "5 blocks"]),
    ("falling", lambda: paged(cu_q_lens=[0, 3, 1]), ["cu_q_lens falls", "3", "1"]),
    ("start", lambda: paged(cu_q_lens=[1, 2, 3]), ["starts at 1", "expected 0"]),
    ("end", lambda: paged(cu_q_lens=[0, 1, 9]), ["ends at 9", "4 tokens"]),
    ("short kv", lambda: paged(kv_lens=[9, 2]), ["kv_len [2]", "[3] query tokens"]),
    ("decode rows", lambda: paged(cu_q_lens=[0, 2, 4]), ["decode row [0]", "[2] query tokens"]),
    ("rows", lambda: paged(distribution=[2, 1]), ["(2, 1)", "<= 2"]),
    ("many rows", lambda: paged(distribution=[0, 3]), ["(0, 3)", "<= 2"]),
]
OTHERS: list[tuple[str, Callable[[], Any], list[str]]] = [
    ("latent sizes", lambda: mla(pool=(5, 8, 64)), ["48", "64"]),
    ("latent dim", lambda: mla(latent_dim=49), ["49", "48"]),
    ("wide latent", lambda: mla(q=(4, 4, 600), pool=(5, 8, 600), latent_dim=520), ["520", "512"]),
    ("wide rope", lambda: mla(q=(4, 4, 200), pool=(5, 8, 200), latent_dim=40), ["160", "128"]),
    ("latent dtype", lambda: mla(dtype=jnp.bfloat16), ["float32", "bfloat16"]),
    ("latent scale", lambda: mla(dtype=jnp.int8, pool_scale=of((2,))), ["(2,)", "(1,)"]),
    ("latent table", lambda: mla(kv_lens=[9, 17]), ["too narrow", "17", "16"]),
    ("latent heads", lambda: mla(q=(4, 0, 48)), ["0 heads", "at least 1"]),
    ("latent int8", lambda: mla(dtype=jnp.int8), ["int8", "pool_scale is None"]),
    ("latent number", lambda: mla(scale=float("inf")), ["scale is inf", "finite"]),
    (
        "two pools",
        lambda: kv_write(of((4, 8, 2, 8)), of((2, 8, 2, 8)), K, K, ids(3, 4)),
        ["(4, 8, 2, 8)", "(2, 8, 2, 8)"],
    ),
    ("two sizes", lambda: kv_write(of((4, 16, 2, 8)), of((8, 8, 2, 8)), K, K, ids(3, 4)), ["(4, 16, 2", "(8, 8, 2"]),
    (
        "two dtypes",
        lambda: kv_write(of((4, 8, 2, 8)), of((4, 8, 2, 8), jnp.int8), K, K, ids(3, 4)),
        ["float32", "int8"],
    ),
    ("wide write", lambda: write(k=(3, 2, 300), pool=(5, 8, 2, 300)), ["300", "256"]),
    ("empty pool", lambda: write(pool=(0, 8, 2, 16)), ["(0, 8, 2, 16)", "at least 1"]),
    ("empty blocks", lambda: gather_blocks(of((4, 0)), ids(1)), ["(4, 0)", "1 element"]),
    ("write heads", lambda: write(k=(3, 3, 16)), ["(3, 16)", "(2, 16)"]),
    ("write rank", lambda: write(k=(3, 32)), ["3 axes", "got 2"]),
    ("write slots", lambda: write(slots=[1, 2]), ["(2,)", "(3,)"]),
    ("slot dtype", lambda: write(slot_dtype=jnp.uint32), ["int32", "uint32"]),
    ("slot range", lambda: write(slots=[1, 2, 40]), ["slot 40", "40 slots"]),
    ("slot twice", lambda: write(slots=[1, 2, 1]), ["slot [1]", "[2] times"]),
    ("int8 bare", lambda: write(pool_dtype=jnp.int8), ["int8", "scales"]),
    ("write pair", lambda: write(pool_dtype=jnp.bfloat16), ["float32", "bfloat16"]),
    ("latent rank", lambda: latent_write(of((5, 8, 2, 16)), of((3, 16)), ids(1, 2, 3)), ["3 axes", "got 4"]),
    ("copy ids", lambda: copy_blocks(of((4, 8)), ids(1), ids(2, 3)), ["(2,)", "(1,)"]),
    ("copy range", lambda: copy_blocks(of((4, 8)), ids(1), ids(4)), ["block 4", "4 blocks"]),
    ("copy chain", lambda: copy_blocks(of((4, 8)), ids(1, 2), ids(2, 3)), ["[2]", "both source and destination"]),
    ("copy twice", lambda: copy_blocks(of((4, 8)), ids(0, 1), ids(2, 2)), ["[2]", "[2] times"]),
    ("gather range", lambda: gather_blocks(of((4, 8)), ids(9)), ["block 9", "4 blocks"]),
    ("gather none", lambda: gather_blocks(of((4, 8)), ids()), ["0 ids", "at least 1"]),
    ("scatter shape", lambda: scatter_blocks(of((4, 8)), of((1, 9)), ids(1)), ["(1, 9)", "(1, 8)"]),
    ("scatter dtype", lambda: scatter_blocks(of((4, 8)), of((1, 8), jnp.int8), ids(1)), ["int8", "float32"]),
    ("pool rank", lambda: gather_blocks(of((4,)), ids(1)), ["2 axes", "(4,)"]),
    ("logits rank", lambda: draw(logits=(8,)), ["2 axes", "got 1"]),
    ("logits dtype", lambda: draw(dtype=jnp.int32), ["int32", "bfloat16"]),
    ("no vocabulary", lambda: draw(logits=(2, 0)), ["0 entries", "1 to"]),
    ("params rows", lambda: draw(top_k=[0, 0, 0]), ["(3,)", "(2,)"]),
    ("params dtype", lambda: draw(seed=jnp.zeros(2, jnp.int32)), ["uint32", "int32"]),
    ("temperature", lambda: draw(temperature=[1, -0.5]), ["temperature[[1]]", "-0.5", "0 or more"]),
    ("temperature nan", lambda: draw(temperature=[1, float("nan")]), ["nan", "finite"]),
    ("temperature inf", lambda: draw(temperature=[1, float("inf")]), ["inf", "finite"]),
    ("top_p zero", lambda: draw(top_p=[0, 1]), ["top_p[[0]]", "above 0"]),
    ("top_p", lambda: draw(top_p=[1, 1.5]), ["1.5", "up to 1"]),
    ("min_p", lambda: draw(min_p=[0, -1]), ["-1", "0 to 1"]),
    ("mode", lambda: draw(mode="sorted"), ["'sorted'", "filtered"]),
    ("greedy promise", lambda: draw(mode="greedy"), ["'greedy'", "temperature above 0"]),
    ("random promise", lambda: draw(mode="random", top_k=[5, 0]), ["'random'", "top_k"]),
    ("logprobs", lambda: draw(logprobs="both"), ["'both'", "raw or processed"]),
    ("top_n alone", lambda: draw(top_n=3), ["top_n is 3", "logprobs is None"]),
    ("top_n", lambda: draw(logprobs="raw", top_n=9), ["top_n is 9", "8 entries"]),
    ("raw logits", lambda: draw(logprobs="processed", raw_logits=of((2, 8))), ["raw_logits", "'processed'"]),
    ("raw shape", lambda: draw(logprobs="raw", raw_logits=of((2, 9))), ["(2, 9)", "(2, 8)"]),
    ("token range", lambda: token_logprobs(of((2, 8)), ids(1, 8)), ["[8]", "8 entries"]),
    ("token rows", lambda: token_logprobs(of((2, 8)), ids(1)), ["(1,)", "(2,)"]),
]


@pytest.mark.parametrize("implementation", ["cpu", "interpret", "kernel"])
@pytest.mark.parametrize("call, words", [c[1:] for c in PAGED + OTHERS], ids=[c[0] for c in PAGED + OTHERS])
def test_wrong_arguments(implementation: dispatch.Implementation, call: Callable[[], Any], words: list[str]) -> None:
    with dispatch.use(implementation), pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_right_arguments_pass() -> None:
    """The cases above are wrong only in what they change."""
    for call in (paged, mla, write, draw):
        call()


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda d: d.__name__)
def test_one_byte_pools_between_2_and_4_gib(dtype: Any) -> None:
    """Their 32-bit offsets would wrap: the error names the numbers of blocks that work."""
    per_block = 16 * 8 * 128
    below, above = 2**31 // per_block - 1, 2**32 // per_block + 1
    checks.check_pool("k_pool", (below, 16, 8, 128), dtype)
    checks.check_pool("k_pool", (above, 16, 8, 128), dtype)
    for blocks in (below + 1, above - 1):
        with pytest.raises(ValueError, match=f"at most {below} blocks or at least {above}"):
            checks.check_pool("k_pool", (blocks, 16, 8, 128), dtype)
    # Wider elements cross 4 GiB before they cross 2^31 elements: never wrong.
    for wide in (jnp.bfloat16, jnp.float32):
        for blocks in (below, below + 1, above - 1, above, 3 * above):
            checks.check_pool("k_pool", (blocks, 16, 8, 128), wide)


def test_slot_ids_must_fit_int32() -> None:
    checks.check_pool("k_pool", (2**27 - 1, 16, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="2147483648 slots"):
        checks.check_pool("k_pool", (2**27, 16, 1, 64), jnp.bfloat16)


def test_an_op_checks_its_pool_too() -> None:
    """Shapes are enough: nothing of that size is allocated here."""
    pool = jax.ShapeDtypeStruct((2**31 // (16 * 8 * 128), 16, 8, 128), jnp.int8)
    new = jax.ShapeDtypeStruct((4, 8, 128), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((8,), jnp.float32)

    def step(pool: jax.Array, new: jax.Array, slots: jax.Array, scale: jax.Array) -> jax.Array:
        return kv_write(pool, pool, new, new, slots, k_scale=scale, v_scale=scale).k_pool

    slots = jax.ShapeDtypeStruct((4,), jnp.int32)
    with pytest.raises(ValueError, match="cannot be addressed"):
        jax.eval_shape(step, pool, new, slots, scale)
    for move in (lambda p, i: copy_blocks(p, i, i + 4), gather_blocks):
        with pytest.raises(ValueError, match=r"pool of int8 .* cannot be addressed"):
            jax.eval_shape(move, pool, slots)
    small = jax.ShapeDtypeStruct((8, *pool.shape[1:]), jnp.int8)
    many = jax.ShapeDtypeStruct(pool.shape[:1], jnp.int32)
    with pytest.raises(ValueError, match=r"staging array of int8 .* cannot be addressed"):
        jax.eval_shape(gather_blocks, small, many)
    with pytest.raises(ValueError, match=r"staged of int8 .* cannot be addressed"):
        jax.eval_shape(scatter_blocks, small, pool, many)


def test_the_check_ignores_what_is_never_read() -> None:
    """Padding rows and the tails of tables may hold anything."""
    ragged = Ragged(
        block_tables=np.asarray([[1, 2, -7], [3, 99, 99], [-1, -1, -1]], np.int32),
        kv_lens=np.asarray([9, 3, 10**6], np.int32),
        cu_q_lens=np.asarray([0, 1, 4, -5], np.int32),
        distribution=np.asarray([1, 2], np.int32),
    )
    ragged.check(tokens=8, blocks=5, block_size=8)
