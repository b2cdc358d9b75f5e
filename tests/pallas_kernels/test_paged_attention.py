# SPDX-License-Identifier: Apache-2.0
"""Paged attention, on CPUs and by the interpreted kernel, against the float64 oracle."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, reference
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged import Ragged
from pallas_kernels.tuning import DecodeTiles, RaggedTiles
from tests.pallas_kernels.batches import Batch, error, make_batch, rounded, stored

MIXED: dict[str, Any] = dict(q_lens=[1, 1, 5, 37, 16, 2], kv_lens=[40, 1, 5, 100, 16, 65], decode_rows=2)
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 6e-3, jnp.float16: 8e-4}
DECODE_TILES = DecodeTiles(block_kv=16, splits=3, num_warps=4, num_stages=2)
RAGGED_TILES = RaggedTiles(block_rows=32, block_kv=16, num_warps=4, num_stages=2)


@cache
def jitted(implementation: dispatch.Implementation, options: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
    """One jit per choice of options, so that equal programs compile once: compiling is most of what these tests do."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array, ragged: Ragged, arrays: Any) -> jax.Array:
        with dispatch.use(implementation):
            return paged_attention(q, k, v, ragged, **arrays, **dict(options))

    return jax.jit(call)


def run(
    batch: Batch,
    implementation: dispatch.Implementation,
    *,
    dtype: Any = jnp.float32,
    kv: Any = None,
    decode_only: bool = False,
    **options: Any,
) -> jax.Array:
    if implementation == "cpu":  # it has no tiles
        options = {name: value for name, value in options.items() if not name.endswith("_tiles")}
    arrays = {name: options.pop(name) for name in ("sinks", "k_scale", "v_scale") if name in options}
    q, k, v = (stored(x, kind) for x, kind in ((batch.q, dtype), (batch.k, kv or dtype), (batch.v, kv or dtype)))
    call = jitted(implementation, tuple(sorted(options.items())))
    return call(q, k, v, batch.decode_only if decode_only else batch.ragged, arrays)


def as_stored(batch: Batch, dtype: Any, kv: Any = None) -> Batch:
    """The batch rounded to its dtypes, which is not an error of the op."""
    k, v = (rounded(x, kv or dtype) for x in (batch.k, batch.v))
    return Batch(rounded(batch.q, dtype), k, v, batch.ragged)


def expect(batch: Batch, **options: Any) -> np.ndarray:
    return reference.paged_attention(batch.q, batch.k, batch.v, batch.ragged, **options)


def check(batch: Batch, *, dtype: Any = jnp.float32, kv: Any = None, **options: Any) -> None:
    """Both implementations against float64, and exact zeros in padding."""
    understood = {k: v for k, v in options.items() if k in ("scale", "window", "soft_cap", "sinks")}
    expected = expect(as_stored(batch, dtype, kv), **understood)
    for implementation in ("cpu", "interpret"):
        got = run(batch, implementation, dtype=dtype, kv=kv, **options)
        assert got.dtype == dtype
        assert error(got, expected) < TOLERANCE[dtype], implementation
        assert not np.asarray(got)[batch.used_tokens :].astype(np.float32).any(), implementation


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_dtypes(dtype: Any) -> None:
    """Of decode rows and of longer ones."""
    check(make_batch(np.random.default_rng(0), **MIXED), dtype=dtype)


def test_decode_only() -> None:
    lengths: dict[str, Any] = dict(q_lens=[1] * 4, kv_lens=[1, 15, 16, 90], decode_rows=4, padding_tokens=1)
    check(make_batch(np.random.default_rng(0), **lengths), dtype=jnp.bfloat16, decode_only=True)


@pytest.mark.parametrize(
    "dim, kv_heads, group, block_size, tiled",
    [
        (8, 1, 71, 16, True),
        (40, 1, 3, 256, True),
        (64, 2, 4, 16, False),
        (72, 1, 7, 32, True),
        (80, 1, 12, 64, True),
        (96, 2, 1, 128, True),
        (112, 1, 16, 8, True),
        (128, 2, 8, 32, False),
        (192, 1, 3, 16, False),
        (256, 2, 1, 64, False),
    ],
)
def test_shapes(dim: int, kv_heads: int, group: int, block_size: int, tiled: bool) -> None:
    """Head dims, head groups and block sizes: every value of each, not every combination. Some rows end at the edge of
    a block or beside it."""
    edge = block_size
    batch = make_batch(
        np.random.default_rng(1),
        q_lens=[1, 1, 1, 1, 1, 5, 37, 16, 2, edge - 1, edge, 3, 2],
        kv_lens=[1, 40, edge - 1, edge, edge + 1, 5, 100, 16, 65, edge - 1, edge, edge + 2, 2 * edge + 5],
        decode_rows=5,
        kv_heads=kv_heads,
        group=group,
        dim=dim,
        block_size=block_size,
    )
    check(batch, **(dict(ragged_tiles=RAGGED_TILES, decode_tiles=DECODE_TILES) if tiled else {}))


def test_values_may_have_another_dim_than_keys() -> None:
    check(make_batch(np.random.default_rng(3), **MIXED, dim=96, v_dim=64))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kv_heads", [2, 16])
def test_cpu_code_at_the_edges_of_its_tiles(kv_heads: int, window: int | None) -> None:
    """Rows of about one tile, with and without a prefix, with narrow and with wide tokens."""
    q_lens = [1, 1, 31, 32, 33, 127, 128, 129, 160, 161, 2]
    past = [99, 200, 0, 400, 96, 95, 0, 700, 1, 0, 128]
    batch = make_batch(
        np.random.default_rng(16),
        q_lens=q_lens,
        kv_lens=[q_len + before for q_len, before in zip(q_lens, past, strict=True)],
        decode_rows=2,
        dim=32,
        kv_heads=kv_heads,
        block_size=16,
    )
    expected = expect(as_stored(batch, jnp.float32), window=window)
    assert error(run(batch, "cpu", window=window), expected) < TOLERANCE[jnp.float32]


@pytest.mark.parametrize("window, splits", [(7, 1), (1, 3), (16, 3), (1000, 3)])
def test_windows(window: int, splits: int) -> None:
    tiles = DecodeTiles(block_kv=16, splits=splits)
    check(make_batch(np.random.default_rng(5), **MIXED, dim=32), window=window, decode_tiles=tiles)


def test_window_never_reads_blocks_before_it() -> None:
    """A sliding-window model frees blocks that have left every window; their table entries become the null block."""
    batch = make_batch(np.random.default_rng(6), q_lens=[1, 4], kv_lens=[100, 90], decode_rows=1, padding_rows=0)
    window, freed = 20, np.array(batch.ragged.block_tables)
    for row, length in enumerate((100, 87)):
        freed[row, : (length - window) // 16] = 0
    narrowed = Batch(batch.q, batch.k, batch.v, replace(batch.ragged, block_tables=freed))
    for implementation in ("cpu", "interpret"):
        expected = np.asarray(run(batch, implementation, window=window))
        np.testing.assert_array_equal(np.asarray(run(narrowed, implementation, window=window)), expected)


def test_scale_soft_cap_and_sinks() -> None:
    rng = np.random.default_rng(7)
    batch = make_batch(rng, **MIXED, group=3, dim=32)
    tiles, unsplit = (DecodeTiles(block_kv=16, splits=splits) for splits in (4, 1))
    sinks = jnp.asarray(rng.standard_normal(6) * 3, jnp.float32)
    check(batch, scale=0.3, soft_cap=2.0, decode_tiles=tiles)
    check(batch, sinks=sinks, decode_tiles=tiles)
    for each in (tiles, unsplit):
        check(batch, scale=0.4, soft_cap=5.0, sinks=sinks, window=24, decode_tiles=each)


@pytest.mark.parametrize(
    "kv, per_slot", [(jnp.int8, False), (jnp.int8, True), (jnp.float8_e4m3fn, True), (jnp.float8_e5m2, False)]
)
def test_one_byte_kv_with_scales(kv: Any, per_slot: bool) -> None:
    rng = np.random.default_rng(8)
    batch = make_batch(rng, **MIXED, dim=32)
    shape = batch.k.shape[:3] if per_slot else (2,)
    scales = [rng.uniform(0.01, 0.03, shape).astype(np.float32) for _ in range(2)]
    stored = []
    for pool, scale in zip((batch.k, batch.v), scales, strict=True):
        codes = np.clip(np.nan_to_num(pool) / scale[..., None], -127, 127)
        stored.append(np.floor(codes) if kv == jnp.int8 else codes)
    # The values in the pool are exact here: quantizing is tested with kv_write.
    k, v = (rounded(x, kv) for x in stored)
    expected = expect(Batch(batch.q, k, v, batch.ragged), k_scale=scales[0], v_scale=scales[1])
    for implementation in ("cpu", "interpret"):
        k_scale, v_scale = (jnp.asarray(s) for s in scales)
        options: dict[str, Any] = dict(kv=kv, k_scale=k_scale, v_scale=v_scale, decode_tiles=DECODE_TILES)
        got = run(Batch(batch.q, stored[0], stored[1], batch.ragged), implementation, **options)
        assert error(got, expected) < 1e-5, implementation


@pytest.mark.parametrize("rows", [1, 2, 64, 1024])
def test_row_counts_with_padding_rows(rows: int) -> None:
    rng = np.random.default_rng(9)
    used = max(1, rows - 3)
    lengths = [int(n) for n in rng.integers(1, 20, used)]
    batch = make_batch(
        rng,
        q_lens=[1] * used,
        kv_lens=lengths,
        decode_rows=used,
        kv_heads=1,
        group=2,
        dim=16,
        block_size=8,
        padding_rows=rows - used,
        padding_tokens=rows - used,
    )
    expected = expect(batch)
    # The interpreter copies every array for every program: it skips the largest batch.
    for implementation in ("cpu", "interpret") if rows <= 64 else ("cpu",):
        got = run(batch, implementation, decode_only=True)
        assert error(got, expected) < 2e-6
        assert not np.asarray(got)[used:].any()


def test_an_empty_batch_gives_zeros() -> None:
    batch = make_batch(np.random.default_rng(10), q_lens=[], kv_lens=[], padding_rows=4, padding_tokens=4)
    for implementation in ("cpu", "interpret"):
        for decode_only in (True, False):
            got = np.asarray(run(batch, implementation, decode_only=decode_only))
            np.testing.assert_array_equal(got, np.zeros_like(got))


def test_rows_without_kv_give_zeros() -> None:
    batch = make_batch(np.random.default_rng(11), q_lens=[1, 1, 4], kv_lens=[9, 0, 0], decode_rows=2)
    choices: list[dict[str, Any]] = [{}, {"sinks": jnp.ones(4, jnp.float32)}]
    for implementation in ("cpu", "interpret"):
        for options in choices:
            got = np.asarray(run(batch, implementation, **options))
            assert got[0].any() and not got[1:].any(), implementation


@pytest.mark.parametrize("implementation", ["cpu", "interpret"])
def test_a_row_does_not_depend_on_its_batch(implementation: dispatch.Implementation) -> None:
    """Bitwise: the same row alone, beside others, and as a decode row of a mixed step."""
    rng = np.random.default_rng(12)
    batch = make_batch(rng, q_lens=[1, 1, 1], kv_lens=[70, 33, 5], decode_rows=3, padding_rows=0, padding_tokens=0)
    options: dict[str, Any] = dict(decode_tiles=DECODE_TILES, ragged_tiles=RAGGED_TILES)
    together = np.asarray(run(batch, implementation, decode_only=True, **options))
    mixed = np.asarray(run(batch, implementation, **options))
    np.testing.assert_array_equal(mixed, together)
    for row in range(3):
        one = Ragged(
            block_tables=batch.ragged.block_tables[row : row + 1],
            kv_lens=batch.ragged.kv_lens[row : row + 1],
            cu_q_lens=np.asarray([0, 1], np.int32),
            distribution=np.asarray([1, 1], np.int32),
        )
        alone = Batch(batch.q[row : row + 1], batch.k, batch.v, one)
        got = np.asarray(run(alone, implementation, decode_only=True, **options))
        np.testing.assert_array_equal(got[0], together[row])


def test_chunked_prefill_equals_whole_prefill() -> None:
    """The last tokens of a prompt see the same KV, whether they come with the rest or in a later chunk."""
    rng = np.random.default_rng(13)
    whole = make_batch(rng, q_lens=[90], kv_lens=[90], padding_rows=0, padding_tokens=0)
    for implementation in ("cpu", "interpret"):
        expected = np.asarray(run(whole, implementation))[50:]
        ragged = replace(whole.ragged, cu_q_lens=np.asarray([0, 40], np.int32))
        chunk = Batch(whole.q[50:], whole.k, whole.v, ragged)
        np.testing.assert_allclose(np.asarray(run(chunk, implementation)), expected, atol=2e-6)


SHAPES: list[dict[str, Any]] = [
    dict(block_size=8, kv_heads=1, group=4, window=40),
    dict(block_size=16, kv_heads=2, group=3, window=5),
    dict(block_size=32, kv_heads=2, group=1, window=None),
]


@settings(max_examples=16)
@given(data=st.data())
def test_random_ragged_batches(data: st.DataObject) -> None:
    """Few shapes, so that few programs serve all examples."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    shape = data.draw(st.sampled_from(SHAPES), label="shape")
    block_size = shape["block_size"]
    decode_rows = data.draw(st.integers(0, 3), label="decode_rows")
    prefix = st.sampled_from([0, 1, block_size - 1, block_size, block_size + 1, 70])
    prefixes = [data.draw(prefix, label="prefix") for _ in range(decode_rows + data.draw(st.integers(0, 3)))]
    q_lens = [1] * decode_rows + [data.draw(st.integers(0, 40), label="q_len") for _ in prefixes[decode_rows:]]
    batch = make_batch(
        rng,
        q_lens=q_lens,
        kv_lens=[p + n for p, n in zip(prefixes, q_lens, strict=True)],
        decode_rows=decode_rows,
        kv_heads=shape["kv_heads"],
        group=shape["group"],
        dim=32,
        block_size=block_size,
        padding_rows=7 - len(q_lens),
        padding_tokens=130 - sum(q_lens),
        blocks=3 + 6 * -(-110 // block_size),
        width=1 + -(-110 // block_size),
    )
    check(batch, window=shape["window"], decode_tiles=DECODE_TILES, ragged_tiles=RAGGED_TILES)


def test_cpu_code_can_be_jitted_over_padded_buckets(forbid_compiles) -> None:
    """One compiled program serves every batch of a bucket."""

    @jax.jit
    def step(q, k, v, ragged):
        return paged_attention(q, k, v, ragged)

    rng = np.random.default_rng(14)
    shapes: dict[str, Any] = dict(kv_heads=1, group=2, dim=16, block_size=8)
    first = make_batch(rng, q_lens=[1, 9], kv_lens=[20, 9], decode_rows=1, padding_tokens=6, **shapes)
    second = make_batch(rng, q_lens=[3, 12], kv_lens=[9, 20], decode_rows=0, padding_tokens=1, **shapes)

    def call(batch: Batch) -> np.ndarray:
        arrays = (jnp.asarray(x, jnp.float32) for x in (batch.q, batch.k, batch.v))
        return np.asarray(step(*arrays, batch.ragged))

    call(first)
    expected = expect(second)
    with forbid_compiles():
        got = call(second)
    assert error(got, expected) < 2e-6
