# SPDX-License-Identifier: Apache-2.0
"""The matmul with weights of 4 or 8 bits, on CPUs and by the interpreted kernel, against the oracle.

The interpreter does not run the kernel's inline assembly: an emulator of its instructions does, over all words.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, reference, tuning
from pallas_kernels.quant_matmul import MOST_ROWS, default_tiles, quant_matmul, takes, tile_key
from pallas_kernels.tuning import QuantTiles
from pallas_kernels.unpack import Form
from tests.pallas_kernels.test_lowering import lower, targeting_h200

BOTH = pytest.mark.parametrize("implementation", ["cpu", "interpret"])
S: Any = jax.ShapeDtypeStruct
F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
KINDS: dict[str, tuple[Any, int, bool]] = {  # codes, bits, zeros
    "int4": (jnp.int8, 4, False),
    "uint4": (jnp.uint8, 4, True),
    "uint4 without zeros": (jnp.uint8, 4, False),
    "int8": (jnp.int8, 8, False),
    "e4m3": (jnp.float8_e4m3fn, 8, False),
    "e5m2": (jnp.float8_e5m2, 8, False),
}
# A column count that two splits of uneven length share, and rows that fit no tile.
N, K = 72, 640
EXACT = 3e-6  # of the norm, where codes are multiplied and sums are scaled, in float32
# Where weights are scaled in 16 bits: a scale and a weight, each rounded.
SCALED = {BF16: 6e-3, F16: 8e-4}


def make(
    kind: str, group: int | None, *, rows: int = 5, n: int = N, k: int = K, dtype: Any = BF16, scales: Any = F16
) -> tuple[Any, ...]:
    """x, codes, scales, and zeros if the kind has them."""
    codes, bits, zeros = KINDS[kind]
    random = np.random.default_rng([zlib.crc32(kind.encode()), group or 0, rows])
    groups = 1 if group is None else k // group
    stored: Any = random.integers(0, 256, (n, k * bits // 8), np.uint8)
    if bits == 8 and codes != jnp.int8:
        stored = np.where((stored & 0x7F) >= 0x7C, stored & 0x80, stored).astype(np.uint8)  # infinity and NaN
    x = jnp.asarray(random.standard_normal((rows, k)), dtype)
    factors = jnp.asarray(random.uniform(0.5, 2, (n, groups)) / 64, scales)
    found = (x, jnp.asarray(stored.view(codes)), factors)
    return (*found, jnp.asarray(random.integers(0, 16, (n, groups), np.uint8))) if zeros else found


def error(out: Any, expected: np.ndarray) -> float:
    found = np.asarray(out).astype(np.float64)
    assert found.shape == expected.shape and np.isfinite(found).all()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def run(implementation: dispatch.Implementation, *arrays: Any, **options: Any) -> jax.Array:
    with dispatch.use(implementation):
        return quant_matmul(*arrays, **options)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group, dtype, scales", [(64, BF16, F16), (320, F16, BF16), (None, BF16, F32)])
def test_sums_are_scaled(
    implementation: dispatch.Implementation, kind: str, group: int | None, dtype: Any, scales: Any
) -> None:
    """Nothing but float32's rounding, in any group and dtype."""
    given = make(kind, group, dtype=dtype, scales=scales)
    out = run(implementation, *given, out_dtype=F32)
    assert out.dtype == F32 and error(out, reference.quant_matmul(*given)) < EXACT


@BOTH
@pytest.mark.parametrize("kind", ["int4", "uint4", "e4m3"])
@pytest.mark.parametrize("rows, group, dtype", [(3, 32, BF16), (33, 32, F16), (40, 64, F16), (100, 128, BF16)])
def test_weights_are_scaled(
    implementation: dispatch.Implementation, kind: str, rows: int, group: int, dtype: Any
) -> None:
    """In small groups, and in tiles of many rows, in 16 bits."""
    given = make(kind, group, rows=rows, dtype=dtype)
    limit = EXACT if implementation == "cpu" else SCALED[dtype]
    assert error(run(implementation, *given, out_dtype=F32), reference.quant_matmul(*given)) < limit


@pytest.mark.parametrize("rows", [1, 8, 9, 17, 64, 65, MOST_ROWS + 1])
def test_any_number_of_rows(rows: int) -> None:
    given = make("uint4", 128, rows=rows, n=96, k=256)
    limit = SCALED[BF16] if rows > 32 else EXACT
    assert error(run("interpret", *given, out_dtype=F32), reference.quant_matmul(*given)) < limit
    assert run("interpret", *given).dtype == BF16


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [64, 100])
def test_splits_and_tiles_that_do_not_fit(splits: int, n: int) -> None:
    given = make("uint4", 64, n=n, k=640)
    tiles = QuantTiles(16, 32, 128, splits, 2, 4)
    out = run("interpret", *given, out_dtype=F32, tiles=tiles)
    assert error(out, reference.quant_matmul(*given)) < EXACT


@BOTH
def test_weights_that_the_kernel_does_not_take(implementation: dispatch.Implementation) -> None:
    """They are decoded, in x's dtype."""
    for given in (
        make("int4", 16, k=320),
        make("uint4", None, k=100),
        make("uint4", 64, dtype=F32),
        make("int8", 8, k=72),
    ):
        assert not takes(*given[:3])
        limit = EXACT if implementation == "cpu" or given[0].dtype == F32 else SCALED[BF16]
        assert error(run(implementation, *given, out_dtype=F32), reference.quant_matmul(*given)) < limit


@BOTH
def test_no_rows(implementation: dispatch.Implementation) -> None:
    x, *weight = make("uint4", 64)
    assert run(implementation, x[:0], *weight).shape == (0, N)


@BOTH
def test_rows_do_not_mix(implementation: dispatch.Implementation) -> None:
    """What a step's padding holds stays in its rows."""
    x, *weight = make("uint4", 64, rows=7)
    alone = run(implementation, x, *weight)
    spoiled = run(implementation, x.at[3].set(jnp.nan), *weight)
    kept = np.array([0, 1, 2, 4, 5, 6])
    np.testing.assert_array_equal(np.asarray(spoiled)[kept], np.asarray(alone)[kept])
    assert np.isnan(np.asarray(spoiled)[3].astype(np.float32)).all()


@BOTH
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_over_two_devices(implementation: dispatch.Implementation, axis: str) -> None:
    """As in tensor parallelism: each has half of the weight's rows, or of its columns, and sums are added."""
    given = make("uint4", 64)
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    cut = P("tensor", None) if axis == "rows" else P(None, "tensor")

    def half(*arrays: jax.Array) -> jax.Array:
        with dispatch.use(implementation):
            out = quant_matmul(*arrays, out_dtype=F32)
        return out if axis == "rows" else jax.lax.psum(out, "tensor")

    specs = (P() if axis == "rows" else cut, cut, cut, cut)
    out_specs = P(None, "tensor") if axis == "rows" else P()
    placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(given, specs, strict=True)]
    product = jax.jit(jax.shard_map(half, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False))
    assert error(product(*placed), reference.quant_matmul(*given)) < EXACT


# --- the assembly -----------------------------------------------------------------------------------------------


def emulate(asm: str, results: int, given: np.ndarray) -> list[np.ndarray]:
    """The results of an assembly text for uint32 arguments."""
    values: dict[str, np.ndarray] = {f"${results}": given.astype(np.uint64)}
    body = asm.strip("{} ").replace(".reg .b32 t, u, v;", "").replace(".reg .b32 t;", "")

    def read(word: str) -> np.ndarray:
        return values[word] if word in values else np.full_like(values[f"${results}"], int(word, 0))

    for instruction in filter(None, (part.strip() for part in body.split(";"))):
        name, rest = instruction.split(" ", 1)
        target, *words = (word.strip() for word in rest.split(","))
        args = [read(word) for word in words]
        match name:
            case "mov.b32":
                found = args[0]
            case "shr.b32":
                found = args[0] >> args[1]
            case "and.b32":
                found = args[0] & args[1]
            case "xor.b32":
                found = args[0] ^ args[1]
            case "prmt.b32":
                both, selector = args[0] | args[1] << np.uint64(32), int(words[2], 0)
                picks = [(selector >> 4 * i & 7) * 8 for i in range(4)]
                found = sum(
                    (both >> np.uint64(pick) & np.uint64(255)) << np.uint64(8 * i) for i, pick in enumerate(picks)
                )
            case "lop3.b32":
                table, found = int(words[3], 0), np.zeros_like(args[0])
                for row in range(8):  # the bit of the table that these three bits select
                    if table >> row & 1:
                        bits = (args[i] if row >> 2 - i & 1 else ~args[i] for i in range(3))
                        found |= np.bitwise_and.reduce(list(bits))
            case _:
                raise AssertionError(f"unknown instruction {name}")
        values[target] = np.asarray(found, np.uint64) & np.uint64(0xFFFFFFFF)
    return [values[f"${i}"].astype(np.uint32) for i in range(results)]


def unpacked(form: Form, words: np.ndarray, place: int, dtype: Any) -> list[np.ndarray]:
    """The assembly's results in float64, for words in pairs, or bytes in fours."""
    results = 1 if form.places == 4 else 2
    given = words.view(np.uint32)
    found = (np.stack(emulate(asm, results, given), axis=-1) for asm in form.assembly(place, jnp.dtype(dtype)))
    return [np.ascontiguousarray(each).view(dtype).reshape(-1).astype(np.float64) for each in found]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("codes", [jnp.int8, jnp.uint8], ids=lambda d: d.__name__)
@pytest.mark.parametrize("place", range(4))
def test_assembly_of_4_bits(codes: Any, place: int, dtype: Any) -> None:
    form = Form(jnp.dtype(codes), 4, 4)
    words = np.random.default_rng(0).permutation(np.arange(2**16, dtype=np.uint16))
    code = (words >> 4 * place & 15).astype(np.int64)
    value = np.where((codes == jnp.int8) & (code > 7), code - 16, code)
    [found] = unpacked(form, words, place, dtype)
    np.testing.assert_array_equal(found - form.bias(jnp.dtype(dtype)), value)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("codes", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda d: d.__name__)
def test_assembly_of_8_bits(codes: Any, dtype: Any) -> None:
    form = Form(jnp.dtype(codes), 8, 1)
    stored = np.arange(256, dtype=np.uint8)
    value = stored.view(codes).astype(np.float64)
    first, *others = unpacked(form, stored, 0, dtype)
    factor = {"float8_e4m3fn": {BF16: 2.0**120, F16: 2.0**8}, "float8_e5m2": {BF16: 2.0**112}}
    finite = np.isfinite(value)
    found = first[finite] * factor.get(jnp.dtype(codes).name, {}).get(dtype, 1.0)
    found = found - (others[0][finite] if others else 0)
    np.testing.assert_array_equal(found - form.bias(jnp.dtype(dtype)), value[finite])


# --- bad input --------------------------------------------------------------------------------------------------


def call(
    x: tuple[int, ...] = (4, 128),
    codes: tuple[int, ...] = (6, 64),
    scales: tuple[int, ...] = (6, 2),
    zeros: tuple[int, ...] | None = (6, 2),
    *,
    dtypes: tuple[Any, Any, Any, Any] = (BF16, jnp.uint8, F16, jnp.uint8),
    **options: Any,
) -> None:
    shapes = (x, codes, scales, zeros)
    arrays: Any = [None if s is None else jnp.ones(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    quant_matmul(*arrays, **options)


U8, I8 = jnp.uint8, jnp.int8
WRONG: list[tuple[str, Callable[[], Any], list[str]]] = [
    ("x rank", lambda: call(x=(4, 2, 64)), ["x", "2 axes", "got 3"]),
    ("codes rank", lambda: call(codes=(64,)), ["codes", "2 axes", "got 1"]),
    ("x dtype", lambda: call(dtypes=(I8, U8, F16, U8)), ["x must be one of", "int8"]),
    ("scales dtype", lambda: call(dtypes=(BF16, U8, U8, U8)), ["scales must be one of", "uint8"]),
    ("codes dtype", lambda: call(dtypes=(BF16, jnp.int32, F16, U8)), ["codes of 4 bits", "int32"]),
    ("codes of 8 bits", lambda: call(codes=(6, 128), zeros=None), ["codes of 8 bits", "float8_e4m3fn", "uint8"]),
    ("columns", lambda: call(codes=(6, 60)), ["60 bytes", "128 columns", "half of it"]),
    ("scales rows", lambda: call(scales=(5, 2)), ["scales", "(5, 2)", "(6, 2)", "6 rows"]),
    ("groups", lambda: call(scales=(6, 3), zeros=(6, 3)), ["3 groups", "128 columns"]),
    ("zeros shape", lambda: call(zeros=(6, 1)), ["zeros", "(6, 1)", "as scales"]),
    ("zeros dtype", lambda: call(dtypes=(BF16, U8, F16, I8)), ["zeros must be uint8", "int8"]),
    ("zeros of 8 bits", lambda: call(codes=(6, 128), dtypes=(BF16, I8, F16, U8)), ["zeros are given", "8 bits"]),
    ("out dtype", lambda: call(out_dtype=jnp.int8), ["out_dtype", "int8"]),
    ("empty", lambda: call(codes=(0, 64), scales=(0, 2), zeros=None), ["(0, 64)", "at least 1"]),
]


@pytest.mark.parametrize("implementation", ["cpu", "kernel"])
@pytest.mark.parametrize("wrong, words", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_arguments(implementation: dispatch.Implementation, wrong: Callable[[], Any], words: list[str]) -> None:
    with dispatch.use(implementation), pytest.raises(ValueError) as caught:
        wrong()
    for word in words:
        assert word in str(caught.value)


def test_right_arguments_pass() -> None:
    call()


# --- lowering for CUDA, and tiles -------------------------------------------------------------------------------

LLAMA_8B = ((4096, 4096), (4096, 14336), (14336, 4096), (6144, 4096))


def shapes(kind: str, rows: int, n: int, k: int, group: int | None, dtype: Any = BF16) -> list[Any]:
    codes, bits, zeros = KINDS[kind]
    factors = (n, 1 if group is None else k // group)
    found = [S((rows, k), dtype), S((n, k * bits // 8), codes), S(factors, F16)]
    return [*found, S(factors, jnp.uint8)] if zeros else found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, group, dtype", [(1, 32, BF16), (16, 128, F16), (64, None, BF16), (64, 64, F16)])
def test_lowers_for_cuda(kind: str, group: int | None, rows: int, dtype: Any) -> None:
    text = lower(quant_matmul, *shapes(kind, rows, 6144, 4096, group, dtype))
    assert text.count("__gpu$xla.gpu.triton") == 1


def test_many_rows_are_a_dense_product() -> None:
    text = lower(quant_matmul, *shapes("uint4", MOST_ROWS + 1, 6144, 4096, 128))
    assert "triton" not in text and "dot_general" in text


def test_measured_tiles_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def choose(op: str, key: str, default: QuantTiles) -> QuantTiles:
        asked.append((op, key))
        return default

    monkeypatch.setattr(tuning, "choose", choose)
    given = shapes("uint4", 5, 6144, 4096, 128)
    with targeting_h200():
        jax.eval_shape(lambda *a: quant_matmul(*a), *given)
    assert asked == [("quant_matmul", tile_key(*given[:3]))]
    assert re.search(r"bits=4 .*group=128 .*k=4096 n=6144 rows=8", asked[0][1])


@pytest.mark.parametrize("n, k", LLAMA_8B)
@pytest.mark.parametrize("rows", [1, 16, 32, 64, 128])
def test_default_tiles(n: int, k: int, rows: int) -> None:
    """There are programs enough to fill an H200, none of which is idle, and tiles that have all rows at once."""
    given = shapes("uint4", rows, n, k, 128)
    tiles = default_tiles(*given[:2])
    assert min(rows, 64) <= tiles.block_rows
    steps = k // tiles.block_inner
    per_split = -(-steps // tiles.splits)
    assert (tiles.splits - 1) * per_split < steps
    assert -(-n // tiles.block_columns) * tiles.splits * -(-rows // tiles.block_rows) >= 132
