# SPDX-License-Identifier: Apache-2.0
"""The edits of logits against an oracle, in walks of requests that arrive, generate, are preempted and end."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.types.sampling_params import SamplingParams
from tests.sampling.oracle import Asked, completions, edits
from tests.sampling.rows import APPLY, Rows

VOCAB, ROWS, PLACES = 70, 4, 3  # a mask of three words, the last in part
FEW = st.sampled_from([0, 1, 2, 69])  # tokens that come again and again, so that counts and bad words matter
TOKENS = FEW | st.integers(0, VOCAB - 1)

type Floats = npt.NDArray[np.float32]


def plain(**values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=None, **values)


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    params = plain(
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.6, 2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -1.1])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.3, -2.0])),
        logit_bias=draw(st.none() | st.dictionaries(TOKENS, st.floats(-100, 100, width=32), max_size=8)),
        allowed_token_ids=draw(st.none() | st.lists(TOKENS, min_size=1, max_size=40)),
        min_tokens=draw(st.integers(0, 4)),
    )
    words = st.lists(FEW, min_size=1, max_size=4).map(tuple)
    return Asked(
        params,
        prompt=draw(st.lists(TOKENS, min_size=1, max_size=12)),
        output=draw(st.lists(TOKENS, max_size=3)),
        stops=draw(st.lists(TOKENS, max_size=3)),
        bad_words=draw(st.lists(words, max_size=5)),
    )


def some_logits(seed: int, rows: int = PLACES, vocab_size: int = VOCAB) -> Floats:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 5, (rows, vocab_size)).astype(np.float32)
    odd = np.array([-np.inf, 0.0, -0.0, 1e-40, 3e4], np.float32)
    return np.where(rng.random(logits.shape) < 0.1, rng.choice(odd, logits.shape), logits)


def assert_edited(found: Floats, logits: Floats, asked: Asked) -> None:
    expected = edits(logits, asked)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-5)
    assert_same_bits(found[expected == logits], logits[expected == logits])


def assert_same_bits(found: Floats, expected: Floats) -> None:
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


def assert_same_row(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array.view(np.int32), expected[name].view(np.int32), err_msg=name)


# --- walks ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data())
def test_walks_of_requests_over_rows(data: st.DataObject) -> None:
    rows, twin, held = Rows(ROWS, VOCAB), Rows(ROWS, VOCAB), dict[int, Asked]()
    for step in range(data.draw(st.integers(1, 8), label="steps")):
        if not held or data.draw(st.booleans(), label="a new request"):
            row = data.draw(st.integers(0, ROWS - 1), label="its row")
            held[row] = data.draw(requests(), label="request")
            rows.put(row, held[row])
        chosen = data.draw(st.lists(st.sampled_from(sorted(held)), min_size=1, max_size=PLACES, unique=True))
        places = data.draw(st.permutations([*chosen, *[-1] * (PLACES - len(chosen))]), label="rows by place")
        run_step(rows, held, places, seed=step, data=data)
        for row, asked in held.items():  # what a preempted request would come back to
            twin.put(row, asked)
            assert_same_row(twin.row(row), rows.row(row))


def run_step(rows: Rows, held: dict[int, Asked], places: list[int], *, seed: int, data: st.DataObject) -> None:
    active = [row >= 0 for row in places]
    anything = st.sampled_from([0, ROWS - 1, ROWS, -1, 2**31 - 1, -(2**31)])
    ids = [row if row >= 0 else data.draw(anything, label="row of no one") for row in places]
    positions = [len(held[row].prompt) + len(held[row].output) if row >= 0 else 0 for row in places]
    logits = some_logits(seed)
    found = rows.apply(logits, ids, positions, active)
    tokens = [data.draw(TOKENS, label="sampled") for _ in places]
    rows.update(ids, tokens, active)
    for place, row in enumerate(places):
        if row >= 0:
            assert_edited(found[place], logits[place], held[row])
            held[row].output.append(tokens[place])
        else:
            assert_same_bits(found[place], logits[place])


def test_a_row_is_edited_independently_of_its_place_and_its_neighbours() -> None:
    """Bit for bit: what a request samples must not depend on its batch."""
    rng = np.random.default_rng(0)
    asked = Asked(
        plain(repetition_penalty=1.37, frequency_penalty=0.71, presence_penalty=-0.13, logit_bias={3: 0.3, 9: -7.7}),
        prompt=rng.integers(0, VOCAB, 40).tolist(),
        output=rng.integers(0, VOCAB, 90).tolist(),
    )
    rows, logits = Rows(ROWS, VOCAB), some_logits(1, rows=1)
    rows.put(1, asked)
    rows.put(2, Asked(plain(repetition_penalty=3), prompt=range(VOCAB)))
    [alone] = rows.apply(logits, [1], [130], [True])
    for size in (PLACES, 8):
        for place in range(size):
            batch, ids = some_logits(size, rows=size), [2] * size
            batch[place], ids[place] = logits[0], 1
            found = rows.apply(batch, ids, [130] * size, [True] * size)
            assert_same_bits(found[place], alone)


# --- rules one by one -----------------------------------------------------------------------------------------------


def row_of(asked: Asked, *logits: float) -> Floats:
    """The first logits of a row after its edits; those not given are 0."""
    rows, batch = Rows(ROWS, VOCAB), np.zeros((PLACES, VOCAB), np.float32)
    rows.put(1, asked)
    batch[0, : len(logits)] = logits
    found = rows.apply(batch, [1, 0, 0], [len(asked.prompt) + len(asked.output)] * PLACES, [True, False, False])
    return found[0, : len(logits)]


def test_arithmetic_of_the_penalties() -> None:
    params = plain(repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5)
    found = row_of(Asked(params, prompt=[0, 1, 1], output=[1, 2, 2, 3]), 2, -2, 2, -2, 2, 2)
    assert found.tolist() == [1, -4.75, 0, -4.75, 2, 2]


def test_biases_come_before_penalties() -> None:
    params = plain(repetition_penalty=2.0, logit_bias={0: 3.0, 1: -3.0})
    found = row_of(Asked(params, prompt=[0, 1]), -1, 1, 1)
    assert found.tolist() == [1, -4, 1]


def test_a_bias_does_not_allow_masked_tokens() -> None:
    params = plain(allowed_token_ids=[0, 1], logit_bias={2: 100.0, 0: 1.0})
    found = row_of(Asked(params, prompt=[0]), 0, 0, 0, 0)
    assert found.tolist() == [1, 0, -np.inf, -np.inf]


@pytest.mark.parametrize(("generated", "masked"), [(0, True), (2, True), (3, False)])
def test_stops_are_masked_until_min_tokens_even_with_a_bias(generated: int, masked: bool) -> None:
    params = plain(min_tokens=3, logit_bias={1: 100.0})
    asked = Asked(params, prompt=[0] * 5, output=[2] * generated, stops=(1, 3))
    found = row_of(asked, 1, 1, 1, 1)
    assert found.tolist() == [1, -np.inf if masked else 101, 1, -np.inf if masked else 1]


def test_the_longest_minimum_does_not_overflow() -> None:
    asked = Asked(plain(min_tokens=2**31 - 1), prompt=[0] * 5, stops=(1,))
    assert np.isneginf(row_of(asked, 0, 0)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("output", "banned"),
    [([], [4]), ([1], [4]), ([1, 2], [3, 4]), ([0, 1, 2], [3, 4]), ([2, 1], [4]), ([1, 2, 0], [4])],
)
def test_bad_words_depend_only_on_the_output(output: list[int], banned: list[int]) -> None:
    asked = Asked(plain(), prompt=[1, 2], output=output, bad_words=[(1, 2, 3), (4,)])
    assert np.flatnonzero(np.isneginf(row_of(asked, *[0] * VOCAB))).tolist() == banned


@pytest.mark.parametrize("penalty", [5e-324, 1e-30, 1e6])
def test_extreme_repetition_penalties_stay_finite(penalty: float) -> None:
    found = row_of(Asked(plain(repetition_penalty=penalty), prompt=range(4)), 30, -30, 0, -np.inf, 7)
    assert np.isfinite(found).tolist() == [True, True, True, False, True]
    assert found[0] > 0 and found[1] < 0 and found[2] == 0 and found[4] == 7
    assert (found[0] > 1e6) == (penalty < 1)


def odd_logits() -> Floats:
    """Every kind of float, NaNs with a payload among them."""
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, (PLACES, VOCAB)).astype(np.int32)
    bits[:, :8] = np.array([0, -(2**31), 1, 0x7F800000, 0xFF800000 - 2**32, 0x7FC00001, 0x7F800001, -1])
    return bits.view(np.float32)


@pytest.mark.parametrize("active", [True, False])
def test_logits_without_edits_keep_their_bits(active: bool) -> None:
    """Infinities, NaNs, negative zeros and subnormals too."""
    rows, logits = Rows(ROWS, VOCAB), odd_logits()
    busy = Asked(plain(repetition_penalty=2, frequency_penalty=1), prompt=range(VOCAB), bad_words=[(1,)])
    idle = Asked(
        plain(presence_penalty=-0.0, min_tokens=2, logit_bias=dict.fromkeys(range(8), 0.0)),
        prompt=range(VOCAB),
        output=[0, 1, 2],
        stops=range(9),
    )
    for row in range(PLACES):
        rows.put(row, idle if active else busy)
    assert_same_bits(rows.apply(logits, range(PLACES), [73] * PLACES, [active] * PLACES), logits)


@pytest.mark.parametrize("params", [dict(frequency_penalty=1), dict(presence_penalty=1)])
def test_penalties_of_the_output_leave_the_prompt_alone(params: dict[str, float]) -> None:
    rows, logits = Rows(ROWS, VOCAB), odd_logits()
    rows.put(0, Asked(plain(**params), prompt=range(VOCAB), output=[50]))
    found = rows.apply(logits, [0] * PLACES, [2] * PLACES, [True] * PLACES)
    unseen = np.delete(np.arange(VOCAB), 50)
    assert_same_bits(found[:, unseen], logits[:, unseen])


def test_a_mask_hides_nan() -> None:
    found = row_of(Asked(plain(allowed_token_ids=[0]), prompt=[0]), 1, np.nan)
    assert found.tolist() == [1, -np.inf]


# --- limits ---------------------------------------------------------------------------------------------------------


def test_the_maximum_of_every_control() -> None:
    vocab_size, rng = 5003, np.random.default_rng(3)
    params = plain(
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        presence_penalty=0.5,
        logit_bias={int(token): rng.normal(0, 9) for token in rng.permutation(vocab_size)[:1024]},
        allowed_token_ids=rng.permutation(vocab_size)[:4000].tolist(),
        min_tokens=9000,
    )
    output = rng.integers(0, vocab_size, 6000).tolist()
    words = [(*output[-31:], token) for token in range(64)] + [(*output[-32:-1], token) for token in range(64, 128)]
    stops = rng.permutation(vocab_size)[:256].tolist()
    asked = Asked(params, prompt=rng.permutation(vocab_size).tolist(), output=output, stops=stops, bad_words=words)
    assert completions(output, words) == set(range(64))

    rows, other = Rows(2, vocab_size), Asked(plain(), prompt=[0], bad_words=[(7,)])
    assert rows.put(1, asked) == 3  # vectors of 2048 tokens
    logits = some_logits(4, rows=2, vocab_size=vocab_size)
    found = rows.apply(logits, [1, 0], [vocab_size + 6000, 0], [True, False])
    assert_edited(found[0], logits[0], asked)
    assert_same_bits(found[1], logits[1])
    rows.put(1, other)
    found = rows.apply(logits, [1, 0], [1, 0], [True, False])
    assert_edited(found[0], logits[0], other)


@pytest.mark.parametrize("generated", [30, 31, 40])
def test_bad_words_of_every_length(generated: int) -> None:
    """Word n is complete except for its last token after n - 1 tokens; each word has a different last token."""
    output = [index % 7 for index in range(generated)]
    words = [(*output[generated - length + 1 :], 35 + length) for length in range(1, min(generated + 1, 32) + 1)]
    too_early = [(8, *output[generated - length + 2 :], 1 + length) for length in range(2, 33)]
    asked = Asked(plain(), prompt=[0], output=output, bad_words=words + too_early)
    found = row_of(asked, *[0] * VOCAB)
    assert np.flatnonzero(np.isneginf(found)).tolist() == [word[-1] for word in words]


@pytest.mark.parametrize("vocab_size", [64, VOCAB])
def test_every_bit_of_the_mask(vocab_size: int) -> None:
    rows, logits = Rows(ROWS, vocab_size), np.zeros((PLACES, vocab_size), np.float32)
    for token in range(vocab_size):
        rows.put(3, Asked(plain(allowed_token_ids=[token]), prompt=[0]))
        found = rows.apply(logits, [3] * PLACES, [1] * PLACES, [True] * PLACES)
        assert np.flatnonzero(found[0] == 0).tolist() == [token]


# --- many at once, and parts of them --------------------------------------------------------------------------------


def test_rows_that_are_taken_together_are_as_rows_taken_one_by_one() -> None:
    params = (plain(repetition_penalty=1.5), plain(min_tokens=3), plain(logit_bias={5: 2}), plain(presence_penalty=1))
    asked = {
        row: Asked(each, prompt=range(row, 20 + row), output=[3, 9, 9][:row], stops=[row], bad_words=[(9, row)])
        for row, each in enumerate(params)
    }
    together, alone = Rows(ROWS, VOCAB), Rows(ROWS, VOCAB)
    together.put_all(asked)
    for row, each in asked.items():
        alone.put(row, each)
    for row in asked:
        assert_same_row(together.row(row), alone.row(row))


@pytest.mark.parametrize("edits", [True, False])
@pytest.mark.parametrize("masks", [True, False])
def test_variants_apply_what_is_asked_of_them(edits: bool, masks: bool) -> None:
    """A step without rows that want one kind runs a program without it."""
    both = dict(presence_penalty=1.5 * edits, logit_bias={5: 3.0} if edits else None, min_tokens=9 * edits)
    asked = Asked(
        plain(allowed_token_ids=[2, 5, 7, 69] if masks else None, **both), prompt=[1], output=[7], stops=[2] * edits
    )
    rows, logits = Rows(ROWS, VOCAB), some_logits(5)
    rows.put(2, asked)
    at = dict(rows=np.array([2, 0, 2], np.int32), positions=np.full(3, 2, np.int32))
    found = np.asarray(
        APPLY(rows.controls, logits, **at, active=np.array([True, False, True]), edits=edits, masks=masks)
    )
    for place in (0, 2):
        assert_edited(found[place], logits[place], asked)
    assert_same_bits(found[1], logits[1])
