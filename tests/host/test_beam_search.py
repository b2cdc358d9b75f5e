# SPDX-License-Identifier: Apache-2.0
"""Beam search against a naive one that computes every beam again with a dense forward pass."""

import json
from collections.abc import Set
from typing import Any

import numpy as np
import pytest

from jaxserve.errors import RequestError
from jaxserve.llm import LLM
from jaxserve.text import tokenizer as tokenizers
from jaxserve.types.outputs import BeamSearchSequence
from jaxserve.types.sampling_params import BeamSearchParams, SamplingParams
from tests import tiny_llm
from tests.tiny_llm import Reference

PROMPT = list(range(30, 50))  # two full blocks and a half
TOKENIZER = tokenizers.load(tiny_llm.TOKENIZER)
type Beam = tuple[list[int], float]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(tiny_llm.params())


@pytest.fixture(scope="module")
def ends(reference: Reference) -> Set[int]:
    """End tokens that beams of this model reach early, so that some are completed."""
    [first, *_] = naive(reference, PROMPT, BeamSearchParams(beam_width=2, max_tokens=4), frozenset())
    return frozenset((first[0][len(PROMPT) + 2], int(np.argsort(reference.logprobs(PROMPT)[-1])[-3])))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, ends: Set[int]) -> LLM:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": sorted(ends)}))
    given = {"params": tiny_llm.params(), "tokenizer": str(tiny_llm.TOKENIZER)}
    return LLM(str(folder), **{**tiny_llm.OPTIONS, **given})


def naive(reference: Reference, prompt: list[int], params: BeamSearchParams, ends: Set[int]) -> list[Beam]:
    """A naive beam search, best first."""

    def score(beam: Beam) -> float:
        return beam[1] / (len(beam[0]) - (beam[0][-1] in ends)) ** params.length_penalty

    beams: list[Beam] = [(prompt, 0.0)]
    completed: list[Beam] = []
    for _ in range(params.max_tokens):
        found: list[Beam] = []
        for tokens, total in beams:
            logprobs = reference.logprobs(tokens)[-1]
            for token in np.argsort(-logprobs)[: 2 * params.beam_width].tolist():
                longer = ([*tokens, token], total + float(logprobs[token]))
                (completed if token in ends else found).append(longer)
        beams = sorted(found, key=score, reverse=True)[: params.beam_width]
    return sorted([*completed, *beams], key=score, reverse=True)[: params.beam_width]


def check(found: list[BeamSearchSequence], expected: list[Beam], ends: Set[int], prompt: list[int]) -> None:
    assert [sequence.tokens for sequence in found] == [tokens for tokens, _ in expected]
    for sequence, (tokens, total) in zip(found, expected, strict=True):
        assert sequence.cum_logprob == pytest.approx(total, abs=1e-3)
        new = tokens[len(prompt) :]
        chosen = [position[token].logprob for position, token in zip(sequence.logprobs, new, strict=True)]
        assert sum(chosen) == pytest.approx(total, abs=1e-3)
        ended = tokens[-1] in ends
        assert sequence.finish_reason == ("stop" if ended else "length")
        assert sequence.stop_reason == (tokens[-1] if ended else None)


def assert_empty(llm: LLM) -> None:
    found = llm.metrics()
    assert (found.running, found.waiting, found.used_blocks) == (0, 0, 0)
    assert not llm._engine.unfinished


@pytest.mark.parametrize(("width", "length_penalty"), [(1, 1.0), (2, 0.0), (3, 1.0), (4, -4.0), (4, 3.0)])
def test_beams_are_those_of_the_definition(
    llm: LLM, reference: Reference, ends: Set[int], width: int, length_penalty: float
) -> None:
    params = BeamSearchParams(beam_width=width, max_tokens=6, length_penalty=length_penalty)
    prompts = [PROMPT, [5], [7, 8, 9]]
    before = llm.metrics().finished
    outputs = llm.beam_search(prompts, params)
    after = llm.metrics().finished
    assert {reason: after[reason] - before[reason] for reason in after} == {
        reason: sum(output.sequences[0].finish_reason == reason for output in outputs) for reason in after
    }
    for prompt, output in zip(prompts, outputs, strict=True):
        check(output.sequences, naive(reference, prompt, params, ends), ends, prompt)
    assert_empty(llm)


def test_the_end_of_text_completes_beams_unless_it_is_ignored(llm: LLM, reference: Reference, ends: Set[int]) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.0)
    [output] = llm.beam_search(PROMPT, params)
    reasons = {sequence.finish_reason for sequence in output.sequences}
    assert "stop" in reasons
    [shown] = llm.beam_search(
        PROMPT, BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.0, include_stop_str_in_output=True)
    )
    for sequence, whole in zip(output.sequences, shown.sequences, strict=True):
        ended = sequence.finish_reason == "stop"
        kept = sequence.tokens[:-1] if ended else sequence.tokens
        assert sequence.text == TOKENIZER.decode(kept, skip_special_tokens=False)
        assert whole.text == TOKENIZER.decode(sequence.tokens, skip_special_tokens=False)
    ignoring = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.0, ignore_eos=True)
    [output] = llm.beam_search(PROMPT, ignoring)
    check(output.sequences, naive(reference, PROMPT, ignoring, frozenset()), frozenset(), PROMPT)
    assert_empty(llm)


def test_every_beam_may_end_at_once(llm: LLM, ends: Set[int], reference: Reference) -> None:
    """If all candidates end the text, no beam is left to continue."""
    engine = llm._engine
    likely = np.argsort(-reference.logprobs(PROMPT)[-1])[:2].tolist()
    before = engine.scheduler.limits
    engine.also_ends(likely)
    try:
        [output] = llm.beam_search(PROMPT, BeamSearchParams(beam_width=1, max_tokens=6))
    finally:
        engine.limits = engine.scheduler.limits = before
    assert [sequence.tokens for sequence in output.sequences] == [[*PROMPT, likely[0]]]
    assert_empty(llm)


def used_blocks(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of used blocks after every step."""
    step, used = llm._engine.step, list[int]()

    def noting() -> Any:
        updates = step()
        used.append(llm.metrics().used_blocks)
        return updates

    monkeypatch.setattr(llm._engine, "step", noting)
    return used


def test_beams_share_blocks(llm: LLM, reference: Reference, ends: Set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    used, before = used_blocks(llm, monkeypatch), llm.metrics().preemptions
    params = BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True)
    [output] = llm.beam_search(PROMPT, params)
    check(output.sequences, naive(reference, PROMPT, params, frozenset()), frozenset(), PROMPT)
    # Of 30 tokens in blocks of 8 two are in common for sure, and two more at most of each beam; alone each has four.
    assert 2 + 4 <= max(used) <= 2 + 4 * 2 < 4 * 4
    assert llm.metrics().preemptions == before  # those that are given up make room at once
    assert_empty(llm)


def test_beams_that_do_not_fit_side_by_side_take_turns(
    llm: LLM, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = llm._engine.scheduler.pool
    taken = pool.allocate(pool.available - 5)  # one sequence takes four
    assert taken is not None
    try:
        before = llm.metrics().preemptions
        params = BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True)
        outputs = llm.beam_search([PROMPT, [5]], params)
        assert llm.metrics().preemptions > before
        for prompt, output in zip([PROMPT, [5]], outputs, strict=True):
            check(output.sequences, naive(reference, prompt, params, frozenset()), frozenset(), prompt)
    finally:
        pool.release(taken)
    assert_empty(llm)


def test_beams_end_where_the_model_does(llm: LLM) -> None:
    prompt = [9] * 125
    [output] = llm.beam_search(prompt, BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True))
    assert [len(sequence.tokens) for sequence in output.sequences] == [128, 128]
    assert_empty(llm)


def test_impossible_widths_are_rejected(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"beam_width is 5.*max_logprobs 8"):
        llm.beam_search(PROMPT, BeamSearchParams(beam_width=5, max_tokens=2))
    few = tiny_llm.make(max_num_seqs=2, max_num_batched_tokens=8)
    with pytest.raises(RequestError, match=r"beam_width is 3.*at most 2"):
        few.beam_search(PROMPT, BeamSearchParams(beam_width=3, max_tokens=2))
    with pytest.raises(RequestError, match=r"prompt 1: .*500"):
        llm.beam_search([PROMPT, [500]], BeamSearchParams(beam_width=2, max_tokens=2))
    assert_empty(llm)


def test_a_fault_in_one_beam_ends_only_its_search(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read, count = llm._engine.runner.read, 0

    def faulty(handle: Any) -> Any:
        nonlocal count
        count += 1
        result = read(handle)
        if count == 3:
            result.valid[0] = False
        return result

    [[_, second]] = [llm.generate([[5], [6]], SamplingParams(temperature=0, max_tokens=8))]
    monkeypatch.setattr(llm._engine.runner, "read", faulty)
    before = llm.metrics().finished
    [broken, sound] = llm.beam_search([[5], [6]], BeamSearchParams(beam_width=2, max_tokens=8, ignore_eos=True))
    assert {sequence.finish_reason for sequence in broken.sequences} == {"error"}
    assert {sequence.finish_reason for sequence in sound.sequences} == {"length"}
    assert llm.metrics().finished == {**before, "error": before["error"] + 1, "length": before["length"] + 1}
    assert_empty(llm)
    assert llm.generate([[6]], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids == (
        second.outputs[0].token_ids
    )
