# SPDX-License-Identifier: Apache-2.0
"""Sampling, on CPUs and by the interpreted kernel, against the oracle, which sorts."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from pallas_kernels import dispatch, reference
from pallas_kernels.reference import survivors
from pallas_kernels.sampling import RowParams, Sampled, sample, token_logprobs
from pallas_kernels.tuning import SamplingTiles

BOTH = pytest.mark.parametrize("implementation", ["cpu", "interpret"])
TILES = SamplingTiles(block=128, pivots=4)  # rows of several chunks, even when they are short
PLAIN = (32, 400)  # rows and entries, where no others are needed: equal shapes share their programs
OFF: dict[str, Any] = dict(top_k=0, top_p=1.0, min_p=0.0)


def params(rows: int, **values: Any) -> RowParams:
    """Filters off, temperature 1, and seeds and positions that differ by row."""
    defaults = dict(temperature=1.0, **OFF, seed=np.arange(rows), position=np.arange(rows) * 7)
    dtypes = {"top_k": np.int32, "position": np.int32, "seed": np.uint32}
    given = (defaults | values).items()
    arrays = {n: np.broadcast_to(np.asarray(v, dtypes.get(n, np.float32)), (rows,)) for n, v in given}
    return RowParams(**{name: jnp.asarray(array) for name, array in arrays.items()})


@functools.cache
def jitted(implementation: dispatch.Implementation, options: tuple[tuple[str, Any], ...]) -> Callable[..., Sampled]:
    """One jit per implementation and options: compiling is what these tests spend their time on."""

    def call(logits: jax.Array, p: RowParams, raw_logits: jax.Array | None) -> Sampled:
        with dispatch.use(implementation):
            return sample(logits, p, tiles=TILES, raw_logits=raw_logits, **dict(options))

    return jax.jit(call)


def run(
    implementation: dispatch.Implementation,
    logits: Any,
    p: RowParams,
    raw_logits: jax.Array | None = None,
    **options: Any,
) -> Sampled:
    return jitted(implementation, tuple(options.items()))(jnp.asarray(logits), p, raw_logits)


def kept_ids(result: Sampled, row: int) -> set[int]:
    """All survivors: the processed log probabilities list them when top_n is the whole vocabulary."""
    assert result.logprobs is not None
    return {int(t) for t in np.asarray(result.logprobs.top_tokens)[row] if t >= 0}


def logits_with_ties(rng: np.random.Generator, rows: int, size: int, *, step: float) -> np.ndarray:
    return (np.round(rng.standard_normal((rows, size)) * 3 / step) * step).astype(np.float32)


@BOTH
def test_survivors_are_those_of_a_sort(implementation: dispatch.Implementation) -> None:
    rng = np.random.default_rng(0)
    rows, size = 24, 300
    logits = np.concatenate([logits_with_ties(rng, 12, size, step=s) for s in (0.5, 1e-3)])
    logits[3, 50:] = -np.inf  # as a grammar would
    asked: list[dict[str, Any]] = [
        dict(
            temperature=float(np.float32(rng.uniform(0.2, 2))),
            top_k=int(rng.choice([0, -1, 1, 2, 7, 60, 299, 300, 5000])),
            top_p=float(np.float32(rng.choice([1.0, 0.05, 0.3, 0.9, 0.999]))),
            min_p=float(np.float32(rng.choice([0.0, 0.01, 0.2, 1.0]))),
        )
        for _ in range(rows)
    ]
    p = params(rows, **{name: [a[name] for a in asked] for name in asked[0]})
    result = run(implementation, logits, p, logprobs="processed", top_n=size)
    for row in range(rows):
        expected = set(np.flatnonzero(survivors(logits[row], **asked[row])))
        assert kept_ids(result, row) == expected, asked[row]
        assert int(result.tokens[row]) in expected


@settings(max_examples=60)
@given(data=st.data())
def test_survivors_of_random_rows(data: st.DataObject) -> None:
    """One shape, so that one compile serves all examples."""
    values = st.floats(-30, 30, width=16) | st.sampled_from([0.0, -0.0, 1.0, 1.5, float("-inf")])
    logits = np.asarray(data.draw(st.lists(values, min_size=12, max_size=12)), np.float32)
    assume((logits > -np.inf).any())
    asked: dict[str, Any] = dict(
        temperature=data.draw(st.floats(0.25, 2, width=16)),
        top_k=data.draw(st.integers(0, 13)),
        top_p=data.draw(st.sampled_from([1.0, 0.7310001, 0.12, 0.911])),
        min_p=data.draw(st.sampled_from([0.0, 0.0613, 0.5021])),
    )
    # Skip limits that are closer to an entry than float32 can resolve.
    near = [asked | {name: asked[name] * f} for name in ("top_p", "min_p") for f in (1 - 1e-5, 1 + 1e-5)]
    expected = survivors(logits, **asked)
    assume(all((survivors(logits, **n) == expected).all() for n in near if n["top_p"] < 1 or asked["top_p"] == 1))
    p = params(1, **asked)
    result = _twelve(jnp.asarray(logits[None]), p)
    assert kept_ids(result, 0) == set(np.flatnonzero(expected))


@jax.jit
def _twelve(logits: jax.Array, p: RowParams) -> Sampled:
    return sample(logits, p, logprobs="processed", top_n=12)


@BOTH
def test_ties(implementation: dispatch.Implementation) -> None:
    """Top-k keeps every tie at the k-th value; top-p keeps as many as the mass needs, higher ids first."""
    logits = np.asarray([[2, 1, 1, 1, 1, 0, 0, 0]] * 4 + [[1.0] * 8] * 2, np.float32)
    weight = np.exp(logits[0].astype(np.float64))
    p_for_two_ties = (weight[0] + 1.5 * weight[1]) / weight.sum()
    asked = params(6, top_k=[3, 1, 0, 0, 0, 4], top_p=[1, 1, p_for_two_ties, 0.01, 0.5, 1])
    result = run(implementation, logits, asked, logprobs="processed", top_n=8)
    assert [kept_ids(result, row) for row in range(6)] == [
        {0, 1, 2, 3, 4},
        {0},
        {0, 3, 4},
        {0},
        {4, 5, 6, 7},
        set(range(8)),
    ]


@BOTH
def test_negative_zero_ties_with_zero(implementation: dispatch.Implementation) -> None:
    logits = np.asarray([[-0.0, 0.0, -1.0, -0.0, -2.0]], np.float32)
    result = run(implementation, logits, params(1, top_k=1), logprobs="processed", top_n=5)
    assert kept_ids(result, 0) == {0, 1, 3}


@BOTH
@pytest.mark.parametrize(
    "values", [[1e30, -1e30, 3.0, 2.9, 2.8], [1e-30, 2e-30, 3e-30, 0, -1e-30], [3e38, -3e38, 0, 1, 2]]
)
def test_extreme_values(implementation: dispatch.Implementation, values: list[float]) -> None:
    """The search ends, and finds the k-th value, when linear steps between the values are useless."""
    logits = np.asarray([values], np.float32)
    for k in range(1, 5):
        result = run(implementation, logits, params(1, top_k=k), logprobs="processed", top_n=5)
        assert kept_ids(result, 0) == set(np.argsort(logits[0])[::-1][:k])


@BOTH
@pytest.mark.parametrize("size", [1, 2, 127, 128, 129])
def test_vocabulary_sizes(implementation: dispatch.Implementation, size: int) -> None:
    logits = np.random.default_rng(1).standard_normal((3, size)).astype(np.float32)
    p = params(3, temperature=[0, 1, 1], top_k=[0, 5, 0], top_p=[1, 1, 0.8])
    result = run(implementation, logits, p, logprobs="processed", top_n=size)
    assert int(result.tokens[0]) == logits[0].argmax()
    assert kept_ids(result, 1) == set(
        np.flatnonzero(survivors(logits[1], temperature=1, top_k=5, top_p=1.0, min_p=0.0))
    )
    assert kept_ids(result, 2) == set(
        np.flatnonzero(survivors(logits[2], temperature=1, top_k=0, top_p=float(np.float32(0.8)), min_p=0.0))
    )


@BOTH
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 20])
def test_survivors_that_share_a_lane(implementation: dispatch.Implementation, top_k: int) -> None:
    """The kernel keeps the two best of each of its 128 lanes; here the best entries all fall into lane 5."""
    rng = np.random.default_rng(11)
    logits = rng.standard_normal((4, 700)).astype(np.float32)
    logits[:, 5::128] += np.asarray([[20], [0], [8], [8]], np.float32)
    logits[3, [5, 133]] = logits[3, 261]  # ties with an entry that is not kept
    asked: dict[str, Any] = dict(temperature=1.0, top_k=top_k, top_p=0.9, min_p=0.0)
    exact: dict[str, Any] = asked | {"top_p": float(np.float32(0.9))}
    result = run(implementation, logits, params(4, **asked), logprobs="processed", top_n=700)
    for row in range(4):
        expected = set(np.flatnonzero(survivors(logits[row], **exact)))
        assert kept_ids(result, row) == expected
        assert int(result.tokens[row]) in expected


@BOTH
def test_tokens_are_the_argmax_of_logits_and_noise(implementation: dispatch.Implementation) -> None:
    """Gumbel-max, with the noise that the oracle computes for (seed, position, id)."""
    rng = np.random.default_rng(2)
    rows, size = PLAIN
    logits = rng.standard_normal((rows, size)).astype(np.float32) * 2
    temperature = rng.uniform(0.3, 2, rows).astype(np.float32)
    p = params(rows, temperature=temperature, top_k=20)
    filters: dict[str, Any] = OFF | {"top_k": 20}
    expected = [
        reference.sample(logits[r], temperature=float(temperature[r]), **filters, seed=r, position=7 * r)
        for r in range(rows)
    ]
    result = run(implementation, logits, p, mode="filtered")
    np.testing.assert_array_equal(np.asarray(result.tokens), expected)


@BOTH
def test_greedy_rows(implementation: dispatch.Implementation) -> None:
    """The lowest id among equals; filters and noise play no part; every mode agrees."""
    logits = np.asarray([[0, 5, 1, 5, 5], [7, 7, 7, 7, 7], [-np.inf, -3, -np.inf, -2, -2]], np.float32)
    rows, size = PLAIN
    logits = np.pad(logits, ((0, rows - 3), (0, size - 5)), constant_values=-np.inf)
    logits[3:, 77] = 0
    filtered = params(rows, temperature=0, top_k=1, top_p=0.1, min_p=0.5)
    for mode, p in (("greedy", filtered), ("filtered", filtered), ("random", params(rows, temperature=0))):
        result = run(implementation, logits, p, mode=mode)
        assert np.asarray(result.tokens).tolist() == [1, 0, 3, *[77] * (rows - 3)], mode
        assert np.asarray(result.valid).all()


@BOTH
def test_modes_agree_where_they_overlap(implementation: dispatch.Implementation) -> None:
    logits = np.random.default_rng(3).standard_normal(PLAIN).astype(np.float32)
    random = run(implementation, logits, params(PLAIN[0]), mode="random")
    filtered = run(implementation, logits, params(PLAIN[0]), mode="filtered")
    np.testing.assert_array_equal(np.asarray(random.tokens), np.asarray(filtered.tokens))


@BOTH
def test_a_row_does_not_depend_on_its_batch(implementation: dispatch.Implementation) -> None:
    """Bitwise the same alone, in another place, and beside rows that are broken."""
    rng = np.random.default_rng(4)
    logits = logits_with_ties(rng, 6, 300, step=0.01)
    asked: dict[str, Any] = dict(
        temperature=[0.7, 0, 1.3, 1, 0.5, 1],
        top_k=[0, 0, 9, 40, 0, 0],
        top_p=[0.9, 1, 0.7, 1, 0.3, 1],
        min_p=[0, 0, 0, 0.05, 0.01, 0],
    )
    options: dict[str, Any] = dict(logprobs="processed", top_n=4)
    p = params(6, **asked)
    together = run(implementation, logits, p, **options)
    order: Any = np.asarray([4, 2, 0, 5, 1, 3])
    broken = logits.copy()
    broken[1], broken[3] = np.nan, -np.inf
    moved = run(implementation, broken[order], RowParams(*(x[order] for x in p)), **options)
    for row in range(6):
        alone = run(implementation, logits[row : row + 1], RowParams(*(x[row : row + 1] for x in p)), **options)
        one = [np.asarray(x)[row] for x in jax.tree.leaves(together)]
        for expected, got in zip(one, jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(np.asarray(got)[0], expected)
        if row in (1, 3):
            continue
        place = int(np.flatnonzero(order == row)[0])
        for expected, got in zip(one, jax.tree.leaves(moved), strict=True):
            np.testing.assert_array_equal(np.asarray(got)[place], expected)


@BOTH
def test_rows_that_are_not_finite(implementation: dispatch.Implementation) -> None:
    logits = np.random.default_rng(5).standard_normal(PLAIN).astype(np.float32)
    logits[0, 3], logits[1, 9], logits[2] = np.nan, np.inf, -np.inf
    logits[3, 1:] = -np.inf
    result = run(implementation, logits, params(PLAIN[0], top_k=5, top_p=0.5), mode="filtered")
    assert np.asarray(result.valid).tolist() == [False, False, False, *[True] * (PLAIN[0] - 3)]
    assert np.asarray(result.tokens)[:4].tolist() == [0, 0, 0, 0]


def in_order(values: np.ndarray) -> np.ndarray:
    """Ids from the largest value down, equals by ascending id."""
    return np.lexsort((np.arange(values.size), -values))


@BOTH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_raw_logprobs(implementation: dispatch.Implementation, dtype: Any) -> None:
    """Of the logits as given, whatever temperature and filters do; bfloat16 makes plenty of ties."""
    logits = jnp.asarray(np.random.default_rng(6).standard_normal((5, 500)) * 4, dtype)
    p = params(5, temperature=[0, 0.5, 1, 1.5, 2], top_k=[0, 3, 0, 50, 0])
    result = run(implementation, logits, p, logprobs="raw", top_n=6)
    given = token_logprobs(logits, result.tokens, top_n=6)
    exact = np.asarray(logits.astype(jnp.float32), np.float64)
    for row, expected in enumerate(log_softmax(exact, axis=1)):
        token = int(result.tokens[row])
        assert result.logprobs is not None
        got = jax.tree.map(lambda x, row=row: np.asarray(x)[row], result.logprobs)
        np.testing.assert_allclose(got.logprobs, expected[token], atol=3e-6)
        assert got.ranks == (exact[row] > exact[row, token]).sum() + 1
        best = in_order(exact[row])[:6]
        np.testing.assert_array_equal(got.top_tokens, best)
        np.testing.assert_allclose(got.top_logprobs, expected[best], atol=3e-6)
        for mine, theirs in zip(got, jax.tree.leaves(given), strict=True):
            np.testing.assert_allclose(np.asarray(theirs)[row], mine, atol=1e-6)


@BOTH
def test_raw_logits_apart_from_those_sampled(implementation: dispatch.Implementation) -> None:
    """Penalties change what is drawn and not what is reported."""
    rng = np.random.default_rng(7)
    raw = rng.standard_normal((3, 50)).astype(np.float32)
    penalised = raw.copy()
    penalised[np.arange(3), raw.argmax(1)] = -np.inf
    result = run(
        implementation,
        penalised,
        params(3, temperature=0),
        mode="greedy",
        logprobs="raw",
        top_n=2,
        raw_logits=jnp.asarray(raw),
    )
    second = np.argsort(raw, axis=1)[:, -2]
    np.testing.assert_array_equal(np.asarray(result.tokens), second)
    assert result.logprobs is not None
    np.testing.assert_array_equal(np.asarray(result.logprobs.ranks), 2)
    np.testing.assert_array_equal(np.asarray(result.logprobs.top_tokens), np.argsort(raw, axis=1)[:, :-3:-1])
    expected = np.asarray(log_softmax(raw.astype(np.float64), axis=1))[np.arange(3), second]
    np.testing.assert_allclose(np.asarray(result.logprobs.logprobs), expected, atol=3e-6)


@BOTH
def test_processed_logprobs(implementation: dispatch.Implementation) -> None:
    """After the temperature, over the survivors alone, and listed no further than they reach."""
    logits = np.random.default_rng(8).standard_normal((4, 100)).astype(np.float32) * 2
    asked: list[dict[str, Any]] = [
        dict(OFF, temperature=t, top_k=k) for t, k in ((0.5, 3), (1.7, 0), (0.0, 0), (1.0, 10))
    ]
    p = params(4, temperature=[a["temperature"] for a in asked], top_k=[a["top_k"] for a in asked])
    result = run(implementation, logits, p, logprobs="processed", top_n=5)
    assert result.logprobs is not None
    for row, a in enumerate(asked):
        kept = survivors(logits[row], **a)
        expected = reference.logprobs(logits[row], kept, temperature=a["temperature"])
        token = int(result.tokens[row])
        np.testing.assert_allclose(float(result.logprobs.logprobs[row]), expected[token], atol=3e-6)
        assert int(result.logprobs.ranks[row]) == (expected > expected[token]).sum() + 1
        best = in_order(expected)[: min(5, kept.sum())]
        top = np.asarray(result.logprobs.top_tokens)[row]
        np.testing.assert_array_equal(top[: best.size], best)
        assert (top[best.size :] == -1).all()
        assert (np.asarray(result.logprobs.top_logprobs)[row][best.size :] == -np.inf).all()


def test_a_large_vocabulary() -> None:
    """At 128k entries, with the values as close as they come there."""
    rng = np.random.default_rng(9)
    logits = rng.standard_normal((3, 128256)).astype(np.float32) * 2.5
    asked: list[dict[str, Any]] = [
        dict(OFF, temperature=1.0, top_k=50),
        dict(OFF, temperature=0.8, top_p=0.9),
        dict(OFF, temperature=1.0),
    ]
    asked[2] |= dict(top_k=1000, top_p=0.5, min_p=0.001)
    p = params(3, **{name: [float(np.float32(a[name])) for a in asked] for name in asked[0]})
    result = jax.jit(lambda x, p: sample(x, p, logprobs="processed"))(jnp.asarray(logits), p)
    assert result.logprobs is not None
    for row, exact in enumerate(asked):
        a: dict[str, Any] = {n: float(np.float32(v)) if isinstance(v, float) else v for n, v in exact.items()}
        kept = survivors(logits[row], **a)
        token = int(result.tokens[row])
        assert kept[token]
        expected = reference.logprobs(logits[row], kept, temperature=a["temperature"])
        # One entry more or less at the edge of the nucleus moves the sum by less than this.
        np.testing.assert_allclose(float(result.logprobs.logprobs[row]), expected[token], atol=2e-5)
