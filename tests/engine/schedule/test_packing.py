# SPDX-License-Identifier: Apache-2.0
"""Packing: block moves in turns against single moves, edits that do not fit, ids out of range."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.buckets import Buckets
from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule import packing
from jaxserve.engine.schedule.packing import Batcher
from jaxserve.engine.schedule.plan import Slice, StepPlan
from jaxserve.engine.schedule.sequence import Sequence
from jaxserve.sampling.columns import COLUMNS
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams

BLOCKS, BLOCK = 50, 4
BUCKETS = Buckets.of(rows=4, tokens=16, score_rows=8)
LIMITS = Limits(
    vocab_size=50,
    max_model_len=40,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    block_size=BLOCK,
    num_blocks=BLOCKS,
    max_logprobs=5,
)


def batcher() -> Batcher:
    return Batcher(LIMITS, BUCKETS)


def sequence(row: int, prompt: list[int], **params: Any) -> Sequence:
    request = Request(id=f"row {row}", prompt_token_ids=prompt, params=SamplingParams(**params))
    made = Sequence(request, index=0, order=(0, row, row, 0), limits=LIMITS, seed=params.get("seed", 0))
    made.row = row
    return made


def plan(slices: list[Slice], **changes: Any) -> StepPlan:
    tokens, entries = sum(s.count for s in slices), sum(s.entries for s in slices)
    changes |= dict(embeds=sum(s.embeds for s in slices), arrivals=[s.sequence for s in slices])
    return StepPlan(slices, tokens, entries, 0, **changes)


def parts(packed: packing.StepMessage) -> dict[str, list[int]]:
    return {name: packed.vector[at].tolist() for name, at in packing.places(packed.layout).items()}


def bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


# --- what lies where ------------------------------------------------------------------------------------------------


def test_a_decoding_step_written_out() -> None:
    known, fed = (
        sequence(2, [7, 8, 9], temperature=0),
        sequence(0, [5], temperature=1, seed=-1, top_p=0.5, max_tokens=3),
    )
    fed.seed, fed.computed, fed.pending = 2**32 - 1, 1, 1
    scored = sequence(1, [3, 4, 5], prompt_logprobs=0)
    slices = [Slice(known, 2, 1, True), Slice(fed, 1, 1, True), Slice(scored, 1, 1, False)]
    slices[2].score_from, slices[2].score_to = 2, 3
    packed = batcher().pack(plan(slices, edits={12: 9}))
    assert packed.layout == packing.decode_layout(4) and packed.entries == 3
    given = parts(packed)
    assert given["tokens"] == [9, -1, 4, -1]
    assert given["rows"] == [2, 0, 1, 4] and given["kv_lens"] == [3, 2, 2, 0]
    assert given["starts"] == [0, 1, 2, 3, 4] and given["distribution"] == [3, 3]
    assert given["cells"] == [12] + [-1] * 11 and given["blocks"][0] == 9
    numbers = [[0, 0, 0, bits(1), 0, 0], [0, -1, bits(1), bits(0.5), 0, 0], [0, 0, bits(1), bits(1), 0, 0]]
    entries = np.reshape(given["entries"], (4, len(packing.ENTRY))).tolist()
    assert entries[0] == [0, 2, 0, -1, 1, *numbers[0]]
    assert entries[1] == [1, 0, 0, -1, 1, *numbers[1]]
    assert entries[2] == [2, 1, 0, 5, 0, *numbers[2]]
    assert entries[3] == [0, 4, 0, -1, 0, *[0] * 6]


def test_a_mixed_step_written_out() -> None:
    single, chunk, fork = (
        sequence(3, [1, 2], temperature=0),
        sequence(1, [4, 5, 6, 7], prompt_logprobs=0),
        sequence(0, []),
    )
    fork.tokens = [4, 5, 6, 7]
    slices = [Slice(single, 1, 1, True), Slice(chunk, 1, 3, True), Slice(fork, 4, 0, True)]
    slices[1].score_from, slices[1].score_to = 2, 4
    slices[2].parent = slices[1]
    packed = batcher().pack(plan(slices))
    assert packed.layout == packing.mixed_layout(16, BUCKETS, BLOCK) and packed.entries == 5
    given = parts(packed)
    assert given["tokens"] == [2, 5, 6, 7, *[0] * 12]
    assert given["rows"] == [3, 1, 4, 4] and given["kv_lens"] == [2, 4, 0, 0]
    assert given["starts"] == [0, 1, 4, 4, 4] and given["distribution"] == [1, 2]
    entries = np.reshape(given["entries"], (12, len(packing.ENTRY)))[:, :5].tolist()
    assert entries[:5] == [[0, 3, 0, -1, 1], [1, 1, 0, 6, 0], [2, 1, 0, 7, 0], [3, 1, 0, -1, 1], [3, 0, 0, -1, 1]]
    assert entries[5:] == [[0, 4, 0, -1, 0]] * 7


def test_embeddings_are_entries_that_sample_nothing() -> None:
    single, chunk = sequence(3, [1, 2]), sequence(1, [4, 5, 6])
    slices = [Slice(single, 1, 1, False), Slice(chunk, 1, 2, False)]
    for each in slices:
        each.embeds = 1
    packed = batcher().pack(plan(slices))
    assert (packed.entries, packed.embeds) == (2, 2)
    entries = np.reshape(parts(packed)["entries"], (12, len(packing.ENTRY)))[:, :5].tolist()
    assert entries[:3] == [[0, 3, 0, -1, 0], [2, 1, 0, -1, 0], [0, 4, 0, -1, 0]]
    packed = batcher().pack(plan(slices[:1]))
    assert packed.layout == packing.decode_layout(1) and packed.embeds == 1
    assert parts(packed)["entries"][:5] == [0, 3, 0, -1, 0]
    slices[1].embeds = 2
    packed = batcher().pack(plan(slices))
    assert (packed.entries, packed.embeds) == (3, 3)
    entries = np.reshape(parts(packed)["entries"], (12, len(packing.ENTRY)))[:, :5].tolist()
    assert entries[:4] == [[0, 3, 0, -1, 0], [1, 1, 0, -1, 0], [2, 1, 0, -1, 0], [0, 4, 0, -1, 0]]


def test_the_head_computes_no_logits_of_embeddings() -> None:
    """Their entries come last."""
    embedded, greedy, mean = sequence(3, [1, 2]), sequence(0, [7, 8], temperature=0), sequence(1, [4] * 9)
    slices = [Slice(embedded, 1, 1, 0), Slice(greedy, 1, 1, 1)]
    slices[0].embeds = 1
    packed = batcher().pack(plan(slices))
    assert (packed.layout, packed.entries, packed.embeds) == (packing.decode_layout(2), 2, 1)
    assert (packed.head.top_n, packed.head_rows, packed.embed_rows) == (None, 1, 4)
    entries = np.reshape(parts(packed)["entries"], (2, len(packing.ENTRY)))[:, :5].tolist()
    assert entries == [[1, 0, 0, -1, 1], [0, 3, 0, -1, 0]]
    slices.append(Slice(mean, 0, 9, 0))
    slices[2].embeds = 9
    packed = batcher().pack(plan(slices))
    assert (packed.head.top_n, packed.head_rows, packed.embed_rows) == (None, 1, 12)
    entries = np.reshape(parts(packed)["entries"], (12, len(packing.ENTRY)))[:, :5].tolist()
    assert entries[:3] == [[1, 0, 0, -1, 1], [0, 3, 0, -1, 0], [2, 1, 0, -1, 0]] and entries[10][0] == 10


def test_drafts_and_a_length_that_only_the_devices_know() -> None:
    unsure, drafted = sequence(3, [1, 2], max_tokens=9), sequence(1, [4, 5], max_tokens=9)
    unsure.computed, unsure.pending, unsure.unsure = 4, 3, 2
    drafted.computed, drafted.pending = 2, 1  # so that its next token is on the device too
    slices = [Slice(unsure, 4, 1, 1), Slice(drafted, 2, 3, 3)]
    slices[1].drafts = [8, 9]
    packed = batcher().pack(plan(slices, unsure=[0]))
    assert packed.layout == packing.mixed_layout(16, BUCKETS, BLOCK) and packed.entries == 4
    given = parts(packed)
    assert given["tokens"][:4] == [-1, -1, 8, 9]
    assert given["rows"] == [3, 1, 4, 4] and given["kv_lens"] == [-1, 5, 0, 0]
    assert given["starts"] == [0, 1, 4, 4, 4] and given["distribution"] == [1, 2]
    entries = np.reshape(given["entries"], (12, len(packing.ENTRY)))[:, :5].tolist()
    assert entries[:5] == [[0, 3, 0, -1, 1], [1, 1, 0, 8, 1], [2, 1, 0, 9, 1], [3, 1, 0, -1, 1], [0, 4, 0, -1, 0]]
    packed = batcher().pack(plan(slices[:1], unsure=[0]))
    assert packed.layout == packing.decode_layout(1) and parts(packed)["kv_lens"] == [-1]


def test_a_row_keeps_its_numbers_until_the_next_arrival() -> None:
    packer = batcher()
    first, later = sequence(1, [1], temperature=2, top_k=3), sequence(1, [1], temperature=0, min_tokens=1)
    at = packing.FIXED + COLUMNS.index("top_k")
    reported: list[int] = []
    for tenant, arrivals in ((first, [first]), (first, []), (later, [later])):
        step = plan([Slice(tenant, 0, 1, True)])
        step.arrivals = arrivals
        packed = packer.pack(step)
        reported.append(parts(packed)["entries"][at])
        assert [vectors[:, 0].tolist() for vectors in packed.controls] == ([[1]] if later in arrivals else [])
    assert reported == [3, 3, 0]


# --- edits and copies -----------------------------------------------------------------------------------------------


def test_edits_that_do_not_fit_go_in_further_vectors() -> None:
    wide = Batcher(replace(LIMITS, max_model_len=2000 * BLOCK, num_blocks=9000), BUCKETS)
    edits = {cell: 1 + cell for cell in range(5000)}
    packed = wide.pack(plan([Slice(sequence(0, [1]), 0, 1, True)], edits=edits, copies=[(3, 4)]))
    assert set(parts(packed)["cells"]) == {-1}
    found: dict[int, int] = {}
    half = packing.EDITS_AT_ONCE
    for vector in packed.edits:
        assert vector.size == packing.EDIT_SIZE
        used = vector[:half] >= 0
        found |= dict(zip(vector[:half][used].tolist(), vector[half : 2 * half][used].tolist(), strict=True))
    assert found == edits
    moved = packed.edits[-1][2 * half :].reshape(2, -1)
    assert moved[:, 0].tolist() == [3, 4] and (moved[:, 1:] == -1).all()
    assert all((vector[2 * half :] == -1).all() for vector in packed.edits[:-1])


def test_edits_that_fit_need_no_call() -> None:
    room = packing.decode_layout(1).edits
    step = plan([Slice(sequence(0, [1]), 0, 1, True)], edits={cell: 9 for cell in range(room)})
    packed = batcher().pack(step)
    assert not packed.edits and parts(packed)["cells"] == list(range(room))
    step.edits[room] = 9
    assert len(batcher().pack(step).edits) == 1


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda pair: pair[0] != pair[1]), max_size=30))
def test_copies_in_turns_are_copies_one_by_one(copies: list[tuple[int, int]]) -> None:
    """A turn may read everything before it writes, or the other way round: both must give the same."""
    one_by_one = list(range(10))
    for source, destination in copies:
        one_by_one[destination] = one_by_one[source]
    at_once, shuffled = list(range(10)), list(range(10))
    for turn in packing.in_turns(copies):
        read = [at_once[source] for source, _ in turn]
        for (_, destination), value in zip(turn, read, strict=True):
            at_once[destination] = value
        for source, destination in reversed(turn):
            shuffled[destination] = shuffled[source]
    assert at_once == shuffled == one_by_one


def test_turns_are_few_and_fit_the_program() -> None:
    copies = [(1, i) for i in range(2, 2 + 2 * packing.COPIES_AT_ONCE)]
    assert [len(turn) for turn in packing.in_turns(copies)] == [packing.COPIES_AT_ONCE] * 2
    assert packing.in_turns([(1, 2), (1, 3), (4, 5)]) == [[(1, 2), (1, 3), (4, 5)]]
    assert packing.in_turns([(1, 2), (2, 3)]) == [[(1, 2)], [(2, 3)]]
    assert packing.in_turns([]) == []


# --- ids that would reach what belongs to others --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(edits={40: 1}), "block table cells range from 40 to 40, expected 0 to 39"),
        (dict(edits={-1: 1}), "block table cells range from -1"),
        (dict(edits={0: BLOCKS}), "blocks range from 50 to 50, expected 0 to 49"),
        (dict(edits={0: -1}), "blocks range from -1"),
        (dict(copies=[(1, BLOCKS)]), "blocks range from 1 to 50, expected 1 to 49"),
        (dict(copies=[(1, 0)]), "blocks range from 0 to 1, expected 1 to 49"),
    ],
)
def test_wrong_blocks_raise(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        batcher().pack(plan([Slice(sequence(0, [1]), 0, 1, True)], **changes))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("row", "start", "said"),
    [
        (0, 40, "lengths range from 4. to 4., expected 1 to 40"),
        (0, -3, "lengths range from -"),
        (4, 0, "rows range from 4 to 4, expected 0 to 3"),
        (-1, 0, "rows range from -1 to -1, expected 0 to 3"),
    ],
)
def test_wrong_rows_and_lengths_raise(count: int, row: int, start: int, said: str) -> None:
    tenant = sequence(0, [1] * 60)
    step = plan([Slice(tenant, start, count, True)])
    step.arrivals = []
    tenant.row = row
    with pytest.raises(RuntimeError, match=said):
        batcher().pack(step)


def test_too_many_tokens_for_a_step_raise() -> None:
    with pytest.raises((RuntimeError, IndexError)):
        batcher().pack(plan([Slice(sequence(0, [1] * 30), 0, 17, True)]))
