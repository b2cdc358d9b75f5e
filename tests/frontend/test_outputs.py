# SPDX-License-Identifier: Apache-2.0
"""Outputs as users see them, compared with decoding all tokens and searching the whole text."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import RequestError
from jaxserve.frontend.outputs import OutputBuilder
from jaxserve.text import tokenizer as tokenizers
from jaxserve.types.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs, Update
from jaxserve.types.request import Abort, Request
from jaxserve.types.sampling_params import RequestOutputKind, SamplingParams
from tests.golden.load import TOKENIZERS

TOKENIZER = tokenizers.load(TOKENIZERS / "byte-level")
PROMPT = TOKENIZER.encode("The server")
CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
KINDS = list(RequestOutputKind)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def builder(*, tokenizer: tokenizers.Tokenizer | None = TOKENIZER, **options: Any) -> OutputBuilder:
    request = Request(id="r", prompt_token_ids=PROMPT, params=SamplingParams(**options), prompt="The server")
    return OutputBuilder(tokenizer, request)


def update(token_ids: Sequence[int] = (), *, index: int = 0, **options: Any) -> Update:
    return Update(request_id="r", index=index, token_ids=list(token_ids), **options)


def shown(output: RequestOutput | None) -> RequestOutput:
    assert output is not None
    return output


def completion(output: RequestOutput | None) -> CompletionOutput:
    [only] = shown(output).outputs
    return only


def entry(token: int, logprob: float, rank: int = 1, top: Sequence[tuple[int, float]] = ()) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, rank, [each for each, _ in top], [value for _, value in top])


# --- the three kinds ------------------------------------------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, list[Update]]:
    """The number of samples, and mixed updates that end all of them."""
    samples = draw(st.integers(1, 3))
    parts = [draw(st.lists(st.lists(st.integers(0, 425), max_size=3), min_size=1, max_size=5)) for _ in range(samples)]
    order = draw(st.permutations([index for index, part in enumerate(parts) for _ in part]))
    updates: list[Update] = []
    left = [list(part) for part in parts]
    for index in order:
        tokens = left[index].pop(0)
        end = None if left[index] else draw(st.sampled_from(["length", "abort"]))
        logprobs = [entry(token, -float(token)) for token in tokens]
        updates.append(update(tokens, index=index, finish_reason=end, logprobs=logprobs))
    return samples, updates


@pytest.mark.parametrize("kind", KINDS)
@given(run=runs())
def test_every_output_kind_reports_all_of_every_sample(kind: RequestOutputKind, run: tuple[int, list[Update]]) -> None:
    samples, updates = run
    build = builder(n=samples, output_kind=kind, logprobs=0)
    outputs: list[RequestOutput] = []
    copies: list[RequestOutput] = []
    for number, each in enumerate(updates, start=1):
        output = build.add(each)
        assert build.finished == (number == len(updates))
        if output is not None:
            assert output.finished == build.finished
            outputs.append(output)
            copies.append(copy.deepcopy(output))
    assert outputs == copies, "an output was changed after it was shown"
    assert outputs[-1].finished
    if kind is FINAL_ONLY:
        assert len(outputs) == 1
    for index in range(samples):
        mine = [each for each in updates if each.index == index]
        tokens = [token for each in mine for token in each.token_ids]
        if kind is DELTA:
            parts = [part for output in outputs for part in output.outputs if part.index == index]
            last = parts[-1]
            reported = (
                "".join(part.text for part in parts),
                [token for part in parts for token in part.token_ids],
                [each for part in parts for each in part.logprobs or []],
            )
        else:
            last = outputs[-1].outputs[index]
            reported = last.text, last.token_ids, last.logprobs
        wanted = [{token: Logprob(-float(token), 1, TOKENIZER.token_text(token))} for token in tokens]
        assert reported == (TOKENIZER.decode([*PROMPT, *tokens]).removeprefix("The server"), tokens, wanted)
        assert last.index == index
        assert last.finish_reason == mine[-1].finish_reason
        assert last.cumulative_logprob == -float(sum(tokens))


def test_cumulative_outputs_have_all_samples_and_delta_outputs_the_new_one() -> None:
    build = builder(n=2)
    first = shown(build.add(update(ids("a"), index=1)))
    assert [(each.index, each.text) for each in first.outputs] == [(0, ""), (1, "a")]
    second = shown(build.add(update(ids("b"), index=0)))
    assert [(each.index, each.text) for each in second.outputs] == [(0, "b"), (1, "a")]
    assert not second.finished
    build = builder(n=2, output_kind=DELTA)
    assert [each.index for each in shown(build.add(update(ids("a"), index=1))).outputs] == [1]


def test_outputs_carry_the_prompt() -> None:
    output = shown(builder().add(update([5])))
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "The server", PROMPT)


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_an_update_without_tokens_shows_nothing_until_the_end(kind: RequestOutputKind) -> None:
    build = builder(output_kind=kind, stop="zzz")
    assert build.add(update(num_cached_tokens=16)) is None
    assert completion(build.add(update(ids("a")))).text == ""  # held back: a stop string may begin so
    output = shown(build.add(update(finish_reason="abort", error="deadline")))
    assert output.finished
    assert output.num_cached_tokens == 16
    last = completion(output)
    assert (last.text, last.finish_reason, last.error, last.finished) == ("a", "abort", "deadline", True)
    assert last.token_ids == ([] if kind is DELTA else ids("a"))


def test_fields_of_updates_are_passed_on() -> None:
    build = builder()
    assert completion(build.add(update([5], policy_version=3))).policy_version == 3
    last = shown(build.add(update([6], policy_version=4, finish_reason="stop", stop_reason=6, num_cached_tokens=32)))
    assert completion(last).policy_version == 4
    assert (completion(last).finish_reason, completion(last).stop_reason) == ("stop", 6)
    assert last.num_cached_tokens == 32
    assert completion(last).text == TOKENIZER.decode([5])  # the stop token is counted, and not shown
    assert completion(last).token_ids == [5, 6]


def test_parts_of_a_character_are_shown_at_the_end() -> None:
    tokens = ids("🙂")
    build = builder()
    assert completion(build.add(update(tokens[:2]))).text == ""
    assert completion(build.add(update(finish_reason="length"))).text == "\ufffd"
    build = builder()
    build.add(update(tokens[:2]))
    assert completion(build.add(update(tokens[2:]))).text == "🙂"


# --- stop strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include", [False, True])
@given(data=st.data(), stop=st.text("ab ", min_size=1, max_size=3))
def test_a_stop_string_ends_its_sample(kind: RequestOutputKind, include: bool, data: st.DataObject, stop: str) -> None:
    texts = [data.draw(st.text("ab ", min_size=1, max_size=20), label="text") for _ in range(2)]
    build = builder(n=2, stop=stop, include_stop_str_in_output=include, output_kind=kind, logprobs=0)
    outputs: list[RequestOutput] = []
    stopped: list[int | None] = []
    for index, text in enumerate(texts):
        tokens = ids(text)
        while tokens:
            size = data.draw(st.integers(1, 4))
            part, tokens = tokens[:size], tokens[size:]
            end = None if tokens else "length"
            logprobs = [entry(token, -1.0) for token in part]
            output = build.add(update(part, index=index, logprobs=logprobs, finish_reason=end))
            outputs += [] if output is None else [output]
            stopped += [abort.index for abort in build.take_aborts("x")]
            assert build.take_aborts("x") == []
            if index in stopped:
                assert build.add(update([5], index=index)) is None
    assert outputs[-1].finished
    assert build.finished
    for index, text in enumerate(texts):
        tokens, wanted, reason = until(text, stop, include=include)
        assert reason == ("stop", stop) or index not in stopped
        parts = [part for output in outputs for part in output.outputs if part.index == index]
        if kind is not DELTA:
            parts = parts[-1:]
        assert "".join(part.text for part in parts) == wanted
        assert [token for part in parts for token in part.token_ids] == tokens
        assert sum(len(part.logprobs or []) for part in parts) == len(tokens)
        assert (parts[-1].finish_reason, parts[-1].stop_reason) == reason
        assert parts[-1].cumulative_logprob == -len(tokens)


def until(text: str, stop: str, *, include: bool) -> tuple[list[int], str, tuple[str, str | None]]:
    """A completion cut at its stop string: its tokens, its text, and its stop reason."""
    tokens, begin = ids(text), text.find(stop)
    if begin < 0:
        return tokens, text, ("length", None)
    end = begin + len(stop)
    count = next(count for count in range(len(tokens) + 1) if len(TOKENIZER.decode(tokens[:count])) >= end)
    return tokens[:count], text[: end if include else begin], ("stop", stop)


def test_a_sample_that_the_engine_ended_needs_no_abort() -> None:
    for reason, error in (("length", None), ("abort", "the deadline has passed")):
        build = builder(stop="a")
        output = completion(build.add(update([*ids("xa"), *ids("b")], finish_reason=reason, error=error)))
        assert (output.text, output.finish_reason, output.stop_reason) == ("x", "stop", "a")
        assert output.error is None
        assert build.take_aborts("x") == []
    build = builder(stop="a")
    build.add(update(ids("xa")))
    assert build.take_aborts("x") == [Abort("x", 0, "stop")]
    assert build.add(update(finish_reason="abort")) is None


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(RequestError) as refused:
        builder(tokenizer=None, stop="a")
    assert refused.value.field == "stop"


# --- log probabilities ----------------------------------------------------------------------------------------------

TOP = [(10, -0.5), (11, -1.0), (12, -1.5), (13, -2.0)]


def test_the_chosen_token_comes_first_then_the_most_likely() -> None:
    position = completion(builder(logprobs=3).add(update([20], logprobs=[entry(20, -3.0, 17, TOP)]))).logprobs
    assert position is not None
    [position] = position
    text = TOKENIZER.token_text
    assert list(position.items()) == [
        (20, Logprob(-3.0, 17, text(20))),
        (10, Logprob(-0.5, 1, text(10))),
        (11, Logprob(-1.0, 2, text(11))),
        (12, Logprob(-1.5, 3, text(12))),
    ]


@pytest.mark.parametrize(
    ("wanted", "kept"), [(0, []), (1, [10]), (4, [10, 12, 13]), (9, [10, 12, 13]), (-1, [10, 12, 13])]
)
def test_as_many_top_tokens_as_requested(wanted: int, kept: list[int]) -> None:
    output = completion(builder(logprobs=wanted).add(update([11], logprobs=[entry(11, -1.0, 5, TOP)])))
    assert output.logprobs is not None
    assert list(output.logprobs[0]) == [11, *kept]
    assert output.logprobs[0][11].rank == 5  # as given, whatever its place
    assert output.cumulative_logprob == -1.0


def test_log_probabilities_only_if_requested() -> None:
    output = shown(builder().add(update([11], logprobs=[entry(11, -1.0)], prompt_logprobs=[entry(5, -1.0)])))
    assert completion(output).logprobs is None
    assert completion(output).cumulative_logprob is None
    assert output.prompt_logprobs is None


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_the_prompt_come_in_chunks(kind: RequestOutputKind) -> None:
    tokens = PROMPT[1:]
    build = builder(prompt_logprobs=1, output_kind=kind)
    assert build.add(update(prompt_logprobs=[entry(token, -2.0, 3, TOP) for token in tokens[:2]])) is None
    rest = [entry(token, -2.0, 3, TOP) for token in tokens[2:]]
    first = build.add(update([5], prompt_logprobs=rest))
    final = shown(build.add(update([6], finish_reason="length")))
    text = TOKENIZER.token_text
    wanted = [None, *({token: Logprob(-2.0, 3, text(token)), 10: Logprob(-0.5, 1, text(10))} for token in tokens)]
    assert len(wanted) == len(PROMPT)
    if kind is not FINAL_ONLY:
        assert shown(first).prompt_logprobs == wanted
    assert final.prompt_logprobs == ([] if kind is DELTA else wanted)


def test_log_probabilities_of_the_prompt_change_in_no_output_shown() -> None:
    build = builder(prompt_logprobs=0)
    first = shown(build.add(update([5], prompt_logprobs=[entry(PROMPT[1], -1.0)])))
    second = shown(build.add(update([5], prompt_logprobs=[entry(PROMPT[2], -1.0)])))
    assert [len(output.prompt_logprobs or []) for output in (first, second)] == [2, 3]


def test_a_prompt_can_be_scored_without_any_output() -> None:
    scores = [entry(token, -1.0) for token in PROMPT[1:]]
    output = shown(
        builder(prompt_logprobs=0, output_kind=FINAL_ONLY).add(update(prompt_logprobs=scores, finish_reason="length"))
    )
    assert output.prompt_logprobs is not None
    assert [position and list(position) for position in output.prompt_logprobs] == [None, *([t] for t in PROMPT[1:])]
    assert (completion(output).text, completion(output).token_ids) == ("", [])


@pytest.mark.parametrize("options", [{"tokenizer": None}, {"detokenize": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_without_text_there_are_ids(kind: RequestOutputKind, options: dict[str, Any]) -> None:
    build = builder(logprobs=0, output_kind=kind, **options)
    output = completion(build.add(update([5, 6], logprobs=[entry(5, -1.0), entry(6, -1.0)], finish_reason="length")))
    assert (output.text, output.token_ids) == ("", [5, 6])
    assert output.logprobs == [{5: Logprob(-1.0, 1, None)}, {6: Logprob(-1.0, 1, None)}]


# --- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_is_an_output_without_a_text(kind: RequestOutputKind) -> None:
    """The prompt's last token is half a character, which cannot be shown yet."""
    prompt = [*PROMPT, TOKENIZER.encode("é", add_special_tokens=False)[0]]
    request = Request(id="r", prompt_token_ids=prompt, params=SamplingParams(output_kind=kind), embed=True)
    values = np.array([0.5, -2, 3e-5], np.float32)
    made = OutputBuilder(TOKENIZER, request)
    output = shown(made.add(update(finish_reason="stop", embedding=values.astype("<f4").tobytes())))
    assert output.finished and made.finished and not made.take_aborts("r")
    assert output.embedding is not None and output.embedding.dtype == np.float32
    np.testing.assert_array_equal(output.embedding, values)
    assert (completion(output).text, completion(output).token_ids) == ("", [])


def test_a_failed_embedding_has_the_reason() -> None:
    made = OutputBuilder(None, Request(id="r", prompt_token_ids=PROMPT, embed=True))
    output = shown(made.add(update(finish_reason="error", error="not finite")))
    assert output.embedding is None and completion(output).error == "not finite"
