# SPDX-License-Identifier: Apache-2.0
"""The matmul of rows by group, on CPUs and by the interpreted kernel, and its gradients, against the oracle.

Rows of no group hold NaN wherever the specification allows it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, reference, tuning
from pallas_kernels.grouped_matmul import default_tiles, grouped_matmul, row_tile_count, row_tiles, tile_key
from pallas_kernels.tuning import MatmulTiles
from tests.pallas_kernels.test_lowering import lower, targeting_h200, triton_ir

BOTH = pytest.mark.parametrize("implementation", ["cpu", "interpret"])
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}
SMALL = MatmulTiles(16, 16, 16, 4, 2)  # several tiles along every axis of a toy
S: Any = jax.ShapeDtypeStruct
F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32
EVEN = (0, 5, 9, 20)
OFFSETS = {
    "even": EVEN,
    "empty groups": (0, 0, 7, 7, 7, 20, 20),
    "all in one": (0, 0, 20, 20),
    "starts late": (6, 6, 11, 20),
    "ends early": (0, 3, 9),
    "a middle part": (4, 5, 5, 13),
    "empty groups alone": (0, 0, 0),
    "an empty group at the end": (20, 20),
    "one group": (0, 20),
    "one row each": tuple(range(21)),
}
ROWS = 20


def make(
    seed: int, offsets: tuple[int, ...], *, rows: int = ROWS, n: int = 24, k: int = 40, dtype: Any = F32
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    lhs = rng.standard_normal((rows, k))
    lhs[: offsets[0]] = lhs[offsets[-1] :] = np.nan
    rhs = rng.standard_normal((len(offsets) - 1, n, k))
    return jnp.asarray(lhs, dtype), jnp.asarray(rhs, dtype), jnp.asarray(offsets, I32)


def error(out: Any, expected: np.ndarray) -> float:
    found = np.asarray(out).astype(np.float64)
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def run(implementation: dispatch.Implementation, *arrays: jax.Array, **options: Any) -> jax.Array:
    with dispatch.use(implementation):
        return jax.jit(functools.partial(grouped_matmul, **options))(*arrays)


@BOTH
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
def test_groups_of_all_sizes(implementation: dispatch.Implementation, offsets: tuple[int, ...]) -> None:
    given = make(0, offsets)
    out = run(implementation, *given, tiles=SMALL)
    assert error(out, reference.grouped_matmul(*given)) < TOLERANCE["float32"]
    assert (np.asarray(out)[: offsets[0]] == 0).all() and (np.asarray(out)[offsets[-1] :] == 0).all()


@BOTH
@pytest.mark.parametrize("dtype", [F32, BF16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("n, k", [(1, 1), (17, 33), (64, 128), (80, 100)])
def test_sides_that_fit_no_tile(implementation: dispatch.Implementation, dtype: Any, n: int, k: int) -> None:
    """With the default tiles, whose masks come and go with the sides."""
    given = make(1, (2, 2, 9, 18), n=n, k=k, dtype=dtype)
    out = run(implementation, *given)
    assert out.dtype == dtype
    assert error(out, reference.grouped_matmul(*given)) < TOLERANCE[jnp.dtype(dtype).name]


@BOTH
def test_more_rows_than_a_tile_and_more_columns(implementation: dispatch.Implementation) -> None:
    """Several chunks of row tiles, the last one not full."""
    offsets = (3, 3, 200, 230, 1190)
    given = make(2, offsets, rows=1200, n=40, k=24)
    out = run(implementation, *given, tiles=MatmulTiles(256, 16, 16, 4, 2))
    assert error(out, reference.grouped_matmul(*given)) < TOLERANCE["float32"]


@BOTH
def test_wider_results(implementation: dispatch.Implementation) -> None:
    given = make(3, EVEN, dtype=BF16)
    out = run(implementation, *given, out_dtype=F32)
    assert out.dtype == F32 and error(out, reference.grouped_matmul(*given)) < TOLERANCE["float32"]


@BOTH
def test_no_rows(implementation: dispatch.Implementation) -> None:
    lhs, rhs, offsets = make(4, (0, 0, 0), rows=0)
    assert run(implementation, lhs, rhs, offsets).shape == (0, 24)
    with dispatch.use(implementation):
        d_rhs = jax.grad(lambda w: grouped_matmul(lhs, w, offsets).sum())(rhs)
    assert not np.asarray(d_rhs).any()


@BOTH
@settings(max_examples=15)
@example(cuts=[0, 0, 0, 0, 0], seed=0)
@example(cuts=[33, 33, 33, 33, 33], seed=0)
@given(cuts=st.lists(st.integers(0, 33), min_size=5, max_size=5), seed=st.integers(0, 99))
def test_any_offsets(implementation: dispatch.Implementation, cuts: list[int], seed: int) -> None:
    given = make(seed, tuple(sorted(cuts)), rows=33, n=18, k=20)
    assert error(_jitted(implementation)(*given), reference.grouped_matmul(*given)) < TOLERANCE["float32"]


@functools.cache
def _jitted(implementation: dispatch.Implementation) -> Callable[..., jax.Array]:
    def call(*arrays: jax.Array) -> jax.Array:
        with dispatch.use(implementation):
            return grouped_matmul(*arrays, tiles=SMALL)

    return jax.jit(call)


_row_tiles = jax.jit(row_tiles, static_argnums=(1, 2))


@settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, 47), min_size=7, max_size=7), block=st.sampled_from([1, 4, 16]))
def test_every_row_has_one_tile(cuts: list[int], block: int) -> None:
    rows, offsets = 47, np.array(sorted(cuts), np.int32)
    group, first, stop = np.asarray(_row_tiles(offsets, rows, block))
    assert len(group) == row_tile_count(rows, len(offsets) - 1, block)
    owner = np.full(rows, -2)
    for g, begin, end in zip(group, first, stop, strict=True):
        assert end - begin <= block and (owner[begin:end] == -2).all()
        owner[begin:end] = g
    expected = np.searchsorted(offsets, np.arange(rows), side="right") - 1
    expected[expected == len(offsets) - 1] = -1
    np.testing.assert_array_equal(owner, expected)


@BOTH
@pytest.mark.parametrize("offsets", [(-5, 3, 90), (30, 2, 10), (2**31 - 1, -(2**31), 7)])
def test_wrong_offsets_under_jit_stay_in_bounds(
    implementation: dispatch.Implementation, offsets: tuple[int, ...]
) -> None:
    """Under jit nothing can be raised: the rows may be wrong, but the shape is right and no memory is corrupted."""
    lhs, rhs, _ = make(5, (0, 10, ROWS))
    assert run(implementation, lhs, rhs, jnp.asarray(offsets, I32), tiles=SMALL).shape == (ROWS, 24)


def test_weights_of_empty_groups_are_not_read() -> None:
    """A NaN in them would show in the CPU code."""
    lhs, rhs, offsets = make(6, (0, 0, 7, 7, 20))
    rhs = rhs.at[jnp.array([0, 2])].set(jnp.nan)
    for implementation in ("cpu", "interpret"):
        assert np.isfinite(np.asarray(run(implementation, lhs, rhs, offsets, tiles=SMALL))).all()


# --- gradients ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", ["even", "empty groups", "starts late", "ends early", "empty groups alone"])
def test_gradients(implementation: dispatch.Implementation, name: str) -> None:
    offsets = OFFSETS[name]
    lhs, rhs, at = make(7, offsets)
    weight = jnp.asarray(np.random.default_rng(8).standard_normal((ROWS, 24)), F32)
    expected = reference.grouped_matmul_gradients(lhs, rhs, at, weight)
    # The incoming gradient of rows of no group may be anything, too.
    spoiled = weight.at[: offsets[0]].set(jnp.nan).at[offsets[-1] :].set(jnp.nan)

    @jax.jit
    def gradients(lhs: jax.Array, rhs: jax.Array, at: jax.Array) -> Any:
        with dispatch.use(implementation):
            _, back = jax.vjp(lambda x, w: grouped_matmul(x, w, at, tiles=SMALL), lhs, rhs)
        return back(spoiled)  # traced outside of the choice above

    for found, wanted in zip(gradients(lhs, rhs, at), expected, strict=True):
        assert found.dtype == F32 and error(found, np.asarray(wanted)) < TOLERANCE["float32"]


@BOTH
def test_gradients_of_bfloat16(implementation: dispatch.Implementation) -> None:
    lhs, rhs, at = make(9, (0, 0, 8, 20), n=40, k=72, dtype=BF16)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        with dispatch.use(implementation):
            return grouped_matmul(x, w, at, out_dtype=F32).sum()

    d_lhs, d_rhs = jax.grad(loss, (0, 1))(lhs, rhs)
    assert d_lhs.dtype == d_rhs.dtype == BF16
    expected = reference.grouped_matmul_gradients(lhs, rhs, at, np.ones((lhs.shape[0], rhs.shape[1])))
    for found, wanted in zip((d_lhs, d_rhs), expected, strict=True):
        assert error(found, np.asarray(wanted)) < TOLERANCE["bfloat16"]


# --- callers -----------------------------------------------------------------------------------------------------


@BOTH
def test_experts_over_two_devices(implementation: dispatch.Implementation) -> None:
    """As in expert parallelism: each device has half of the groups and sees all rows, and the halves are summed."""
    lhs, rhs, at = make(10, (0, 5, 5, 14, 20))
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])

    def half(lhs: jax.Array, rhs: jax.Array, at: jax.Array) -> jax.Array:
        mine = jax.lax.dynamic_slice_in_dim(at, jax.lax.axis_index("expert") * 2, 3)
        with dispatch.use(implementation):
            return jax.lax.psum(grouped_matmul(lhs, rhs, mine, tiles=SMALL), "expert")

    specs = (P(), P("expert"), P())
    cut = jax.jit(jax.shard_map(half, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
    arrays = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip((lhs, rhs, at), specs, strict=True)]
    assert error(cut(*arrays), reference.grouped_matmul(lhs, rhs, at)) < TOLERANCE["float32"]


def test_numpy_arrays_are_accepted() -> None:
    given: Any = [np.asarray(x) for x in make(11, EVEN)]
    assert error(grouped_matmul(*given), reference.grouped_matmul(*given)) < TOLERANCE["float32"]


# --- bad input ---------------------------------------------------------------------------------------------------


def call(
    lhs: tuple[int, ...] = (4, 8),
    rhs: tuple[int, ...] = (2, 6, 8),
    offsets: Any = (0, 1, 4),
    *,
    dtypes: tuple[Any, Any, Any] = (F32, F32, I32),
    **options: Any,
) -> None:
    arrays = jnp.ones(lhs, dtypes[0]), jnp.ones(rhs, dtypes[1]), jnp.asarray(offsets, dtypes[2])
    grouped_matmul(*arrays, **options)


WRONG: list[tuple[str, Callable[[], Any], list[str]]] = [
    ("lhs rank", lambda: call(lhs=(4, 2, 8)), ["lhs", "2 axes", "got 3"]),
    ("rhs rank", lambda: call(rhs=(6, 8)), ["rhs", "3 axes", "got 2"]),
    ("dtype", lambda: call(dtypes=(I32, I32, I32)), ["int32", "bfloat16"]),
    ("dtypes", lambda: call(dtypes=(F32, BF16, I32)), ["float32", "bfloat16"]),
    ("out dtype", lambda: call(out_dtype=jnp.int8), ["out_dtype", "int8", "float16"]),
    ("k", lambda: call(rhs=(2, 8, 6)), ["rows of 8", "rhs of 6"]),
    ("no groups", lambda: call(rhs=(0, 6, 8), offsets=[0]), ["(0, 6, 8)", "at least 1"]),
    ("offsets shape", lambda: call(offsets=(0, 4)), ["(2,)", "(3,)", "2 groups"]),
    ("offsets dtype", lambda: call(dtypes=(F32, F32, F32)), ["int32", "float32"]),
    ("start", lambda: call(offsets=(-1, 1, 4)), ["starts at -1", "0 or more"]),
    ("falling", lambda: call(offsets=(0, 3, 1)), ["falls at group [1]", "[3] then [1]"]),
    ("end", lambda: call(offsets=(0, 3, 5)), ["ends at 5", "4 rows"]),
]


@pytest.mark.parametrize("implementation", ["cpu", "interpret", "kernel"])
@pytest.mark.parametrize("wrong, words", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_arguments(implementation: dispatch.Implementation, wrong: Callable[[], Any], words: list[str]) -> None:
    with dispatch.use(implementation), pytest.raises(ValueError) as caught:
        wrong()
    for word in words:
        assert word in str(caught.value)


def test_right_arguments_pass() -> None:
    call()


# --- lowering for CUDA, and tiles --------------------------------------------------------------------------------

EXPERTS = {  # groups, hidden, width, experts per token
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "deepseek-v2-lite": (64, 2048, 1408, 6),
    "mixtral-8x7b": (8, 4096, 14336, 2),
    "gpt-oss-20b": (32, 2880, 2880, 4),
}


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("model", EXPERTS)
def test_lowers_for_cuda(model: str, tokens: int) -> None:
    groups, hidden, width, used = EXPERTS[model]
    for n, k in ((2 * width, hidden), (hidden, width)):
        text = lower(grouped_matmul, S((tokens * used, k), BF16), S((groups, n, k), BF16), S((groups + 1,), I32))
        assert text.count("__gpu$xla.gpu.triton") == 1 and "ragged_dot" not in text


@pytest.mark.parametrize("dtype", [F32, BF16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("n, k", [(1536, 2048), (100, 77)])
def test_gradients_lower_for_cuda(dtype: Any, n: int, k: int) -> None:
    def loss(x: jax.Array, w: jax.Array, at: jax.Array) -> jax.Array:
        return grouped_matmul(x, w, at, out_dtype=F32).sum()

    text = lower(jax.grad(loss, (0, 1)), S((512, k), dtype), S((16, n, k), dtype), S((17,), I32))
    assert "grouped_matmul_t" in text and "grouped_outer" in text


@pytest.mark.parametrize("groups, wide", [(511, False), (513, True)])
def test_offsets_are_wide_where_weights_are_large(groups: int, wide: bool) -> None:
    """Beyond 4 GiB."""
    ir = triton_ir(grouped_matmul, S((64, 2048), BF16), S((groups, 2048, 2048), BF16), S((groups + 1,), I32))
    pointers = [line for line in ir.splitlines() if "tt.addptr" in line and "tt.ptr<bf16>" in line]
    assert any("xi64>" in line for line in pointers) is wide


def test_measured_tiles_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def choose(op: str, key: str, default: MatmulTiles) -> MatmulTiles:
        asked.append((op, key))
        return default

    monkeypatch.setattr(tuning, "choose", choose)
    lhs, rhs = S((512, 2048), BF16), S((128, 1536, 2048), BF16)
    with targeting_h200():
        jax.eval_shape(lambda *a: grouped_matmul(*a), lhs, rhs, S((129,), I32))
    assert asked == [("grouped_matmul", tile_key(lhs, rhs, False))]


@pytest.mark.parametrize("model", EXPERTS)
def test_default_tiles(model: str) -> None:
    """Decode has programs enough to fill the GPU, a prompt has tiles that Hopper's matrix instructions fill."""
    groups, hidden, width, used = EXPERTS[model]
    dtype = jnp.dtype(BF16)
    for inner, n in ((hidden, 2 * width), (width, hidden)):
        one = default_tiles(rows=used, groups=groups, inner=inner, width=n, dtype=dtype)
        assert one.block_rows == 16 and inner % one.block_inner == 0
        assert used * -(-n // one.block_columns) >= 128
        many = default_tiles(rows=4096 * used, groups=groups, inner=inner, width=n, dtype=dtype)
        assert (many.block_rows, many.num_warps) == (128, 8) and inner % many.block_inner == 0
