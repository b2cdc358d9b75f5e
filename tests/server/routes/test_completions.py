# SPDX-License-Identifier: Apache-2.0
"""/v1/completions through OpenAI's client, against the dense model."""

import asyncio
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import Completion

from jaxserve.types.sampling_params import BeamSearchParams
from tests.server.routes.checks import check_error
from tests.server.routes.served import Served, flat
from tests.tiny_llm import Reference

PROMPT = "The sum of two"


def ids_of(served: Served, text: str) -> list[int]:
    assert served.serving.tokenizer is not None
    return served.serving.tokenizer.encode(text)


def text_of(served: Served, ids: list[int]) -> str:
    assert served.serving.tokenizer is not None
    return served.serving.tokenizer.decode(ids)


def joined(chunks: Iterable[Completion]) -> dict[int, str]:
    """The text of each choice."""
    texts: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return dict(texts)


def test_greedy_text_is_the_models(served: Served, reference: Reference) -> None:
    ids = ids_of(served, PROMPT)
    expected = reference.greedy(ids, 12)
    answer = served.client().completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=12)
    [choice] = answer.choices
    assert choice.text == text_of(served, expected)
    assert choice.finish_reason == ("length" if len(expected) == 12 else "stop")
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == len(expected)
    assert answer.usage.total_tokens == len(ids) + len(expected)


def test_ids_and_text_give_the_same(served: Served) -> None:
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    create = served.client().completions.create
    by_text = create(prompt=PROMPT, **options)
    by_ids = create(prompt=ids_of(served, PROMPT), **options)
    assert by_text.choices[0].text == by_ids.choices[0].text


def test_choices_go_by_prompts_then_samples(served: Served) -> None:
    create = served.client().completions.create
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "seed": 5, "temperature": 1.0}
    answer = create(prompt=["one", "two"], n=2, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = [create(prompt=prompt, n=2, **options) for prompt in ("one", "two")]
    assert [choice.text for choice in answer.choices] == [choice.text for one in alone for choice in one.choices]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage is not None)
    streamed = joined(create(prompt=["one", "two"], n=2, stream=True, **options))
    assert streamed == {choice.index: choice.text for choice in answer.choices}


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_equals_the_whole_answer(served: Served, echo: bool) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "seed": 7, "temperature": 1.0}
    create = served.client().completions.create
    whole = create(**options, n=3, echo=echo)
    chunks = list(create(**options, n=3, echo=echo, stream=True))
    assert joined(chunks) == {choice.index: choice.text for choice in whole.choices}
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}
    ends = [choice for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert {end.index: end.finish_reason for end in ends} == {c.index: c.finish_reason for c in whole.choices}
    assert len(ends) == 3
    if echo:
        assert all(choice.text.startswith(PROMPT) for choice in whole.choices)


def test_no_character_is_split(served: Served) -> None:
    """Characters of several tokens are not split: the streamed parts add up to the whole text."""
    body = {"prompt": "😀 é", "max_tokens": 60, "temperature": 1.0, "seed": 3, "ignore_eos": True, "stream": True}
    events = served.post("/v1/completions", body).events
    text = "".join(event["choices"][0]["text"] for event in events[:-1])
    whole = served.post("/v1/completions", {**body, "stream": False}).json["choices"][0]["text"]
    assert text == whole
    echoed = served.post("/v1/completions", {**body, "stream": False, "echo": True}).json["choices"][0]["text"]
    assert echoed == "😀 é" + whole


def test_stop_strings(served: Served) -> None:
    client = served.client()
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 20}
    text = client.completions.create(**options).choices[0].text
    stop = text[5:8]
    cut = client.completions.create(**options, stop=["never this", stop]).choices[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"
    assert cut.model_extra is not None and cut.model_extra["stop_reason"] == stop
    kept = client.completions.create(**options, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == text[: text.index(stop) + len(stop)]
    assert joined(client.completions.create(**options, stop=stop, stream=True)) == {0: cut.text}


def test_stop_tokens(served: Served, reference: Reference) -> None:
    expected = reference.greedy(ids_of(served, PROMPT), 8)
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "stop_token_ids": [expected[4]]}
    [choice] = served.post("/v1/completions", body).json["choices"]
    first = expected.index(expected[4])
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == expected[4]
    assert choice["text"] == text_of(served, expected[:first])


def test_logprobs(served: Served, reference: Reference) -> None:
    ids = ids_of(served, PROMPT)
    create = served.client().completions.create
    answer = create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=6, logprobs=3)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    found = choice.logprobs
    assert found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    generated = reference.greedy(ids, 6)
    table = reference.logprobs([*ids, *generated])[len(ids) - 1 :]
    np.testing.assert_allclose(found.token_logprobs, [table[i, t] for i, t in enumerate(generated)], atol=1e-4)
    for place, top in enumerate(found.top_logprobs):
        # The greedy token is among the three most likely; tokens with the same text count once.
        assert 1 <= len(top) <= 3
        best = np.sort(table[place])[::-1][:3]
        assert max(top.values()) == pytest.approx(best[0], abs=1e-4)
        assert all(np.abs(best - value).min() < 1e-4 for value in top.values())
    check_offsets(choice.text, found.tokens, found.text_offset)


def check_offsets(text: str, tokens: list[str], offsets: list[int]) -> None:
    """Check that each token of whole characters is at its offset in the text."""
    assert len(tokens) == len(offsets) and offsets == sorted(offsets)
    for token, at in zip(tokens, offsets, strict=True):
        if "\ufffd" not in token and not token.startswith("<|") and not text[:at].endswith("\ufffd"):
            assert text.startswith(token, at)


def test_echo_scores_the_prompt(served: Served, reference: Reference) -> None:
    """How evaluation harnesses request the likelihood of a text or of ids."""
    ids = ids_of(served, PROMPT)
    for prompt in (PROMPT, ids):
        create = served.client().completions.create
        answer = create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        [choice] = answer.choices
        found = choice.logprobs
        assert found is not None and found.token_logprobs is not None and found.tokens and found.text_offset
        assert choice.text == PROMPT and choice.finish_reason == "length"
        assert len(found.tokens) == len(ids)
        assert found.token_logprobs[0] is None and found.top_logprobs and found.top_logprobs[0] is None
        np.testing.assert_allclose(found.token_logprobs[1:], reference.scores(ids), atol=1e-4)
        check_offsets(choice.text, found.tokens, found.text_offset)
        assert answer.usage is not None and answer.usage.completion_tokens == 0


@pytest.mark.parametrize("count", [1, 2, 127, 128])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_score_of_any_length(served: Served, *, count: int, logprobs: int | None, stream: bool) -> None:
    ids = [token % 300 for token in range(count)]
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": logprobs, "stream": stream}
    reply = served.post("/v1/completions", body)
    assert reply.status == 200
    choices = [event["choices"][0] for event in reply.events[:-1]] if stream else reply.json["choices"]
    assert "".join(choice["text"] for choice in choices) == text_of(served, ids)
    assert choices[-1]["finish_reason"] == "length"
    if logprobs is None:
        assert all(choice["logprobs"] is None for choice in choices)
    else:
        scores = flat(choice["logprobs"]["token_logprobs"] for choice in choices)
        assert scores[0] is None and len(scores) == count and all(score < 0 for score in scores[1:])


def test_echo_with_an_answer(served: Served) -> None:
    body = {"prompt": PROMPT, "max_tokens": 5, "echo": True, "logprobs": 2, "temperature": 0, "n": 1}
    whole = served.post("/v1/completions", body).json["choices"][0]
    count = len(ids_of(served, PROMPT)) + 5
    assert [len(whole["logprobs"][name]) for name in whole["logprobs"]] == [count] * 4
    assert all(len(top) <= 3 for top in whole["logprobs"]["top_logprobs"][1:])
    events = served.post("/v1/completions", {**body, "stream": True}).events[:-1]
    for name, values in whole["logprobs"].items():
        assert flat(event["choices"][0]["logprobs"][name] for event in events) == values
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]


def test_echo_with_several_samples(served: Served) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "echo": True, "logprobs": 1, "temperature": 1, "seed": 1, "n": 3}
    whole = served.post("/v1/completions", body).json["choices"]
    events = served.post("/v1/completions", {**body, "stream": True}).events[:-1]
    for choice in whole:
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert flat(part["logprobs"]["token_logprobs"] for part in parts) == choice["logprobs"]["token_logprobs"]
        assert "".join(part["text"] for part in parts) == choice["text"]


def test_prompt_logprobs(served: Served, reference: Reference) -> None:
    ids = ids_of(served, PROMPT)
    body = {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 2}
    [choice] = served.post("/v1/completions", body).json["choices"]
    reported = choice["prompt_logprobs"]
    assert reported[0] is None and len(reported) == len(ids)
    scores = reference.scores(ids)
    for place, token in enumerate(ids[1:]):
        entry = reported[place + 1][str(token)]
        assert entry["logprob"] == pytest.approx(float(scores[place]), abs=1e-4)
        assert entry["rank"] >= 1 and isinstance(entry["decoded_token"], str)
        assert len(reported[place + 1]) in (2, 3)


def test_token_ids(served: Served, reference: Reference) -> None:
    ids = ids_of(served, PROMPT)
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "return_token_ids": True, "logprobs": 1}
    [choice] = served.post("/v1/completions", {**body, "return_tokens_as_token_ids": True}).json["choices"]
    expected = reference.greedy(ids, 4)
    assert choice["token_ids"] == expected and choice["prompt_token_ids"] == ids
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in expected]
    events = served.post("/v1/completions", {**body, "stream": True}).events[:-1]
    parts = [event["choices"][0] for event in events]
    assert flat(part["token_ids"] for part in parts) == expected
    assert parts[0]["prompt_token_ids"] == ids
    assert all("prompt_token_ids" not in part for part in parts[1:])


def test_a_truncated_prompt(served: Served) -> None:
    ids = list(range(5, 45))
    for side, kept in (("left", ids[-7:]), ("right", ids[:7]), (None, ids[-7:])):
        body = {"prompt": ids, "max_tokens": 1, "truncate_prompt_tokens": 7, "return_token_ids": True}
        [choice] = served.post("/v1/completions", {**body, "truncation_side": side}).json["choices"]
        assert choice["prompt_token_ids"] == kept
    body = {"prompt": ids * 5, "max_tokens": 5, "truncate_prompt_tokens": -1, "return_token_ids": True}
    reply = served.post("/v1/completions", body).json
    assert reply["choices"][0]["prompt_token_ids"] == (ids * 5)[-127:]
    assert reply["usage"]["total_tokens"] == 128


def test_special_tokens(served: Served) -> None:
    body = {"prompt": "hello", "max_tokens": 1, "return_token_ids": True}
    first = served.post("/v1/completions", body).json["choices"][0]["prompt_token_ids"]
    bare = served.post("/v1/completions", {**body, "add_special_tokens": False}).json["choices"][0]["prompt_token_ids"]
    assert first == [420, *bare]


def test_cached_tokens_and_salts(served: Served) -> None:
    def cached(**more: Any) -> int:
        prompt = [7, 8, 9, 10] * 8
        usage = served.post("/v1/completions", {"prompt": prompt, "max_tokens": 1, **more}).json["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    cached(cache_salt="one")
    assert cached(cache_salt="two") == 0
    assert cached(cache_salt="one") >= 16


def test_unlikely_numbers_are_json(served: Served) -> None:
    """Tokens that cannot be sampled have a log probability that JSON can represent."""
    body = {"prompt": [5, 6], "max_tokens": 2, "logprobs": 8, "allowed_token_ids": [9], "temperature": 0}
    found = served.post("/v1/completions", body).json["choices"][0]["logprobs"]
    for top in found["top_logprobs"]:
        assert all(math.isfinite(value) and value >= -9999.0 for value in top.values())


def test_errors_raised_by_the_client(strict: Served) -> None:
    create = strict.client().completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="tiny", prompt="x", temperature=3)
    assert caught.value.param == "temperature" and caught.value.type == "BadRequestError"
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="nope", prompt="x")
    assert missing.value.param == "model" and "The model `nope` does not exist." in str(missing.value)
    with pytest.raises(openai.BadRequestError) as unknown:
        create(model="tiny", prompt="x", extra_body={"best_off": 1})
    assert unknown.value.param == "best_off" and "best_of" in str(unknown.value)


def test_fields_without_effect_change_nothing(served: Served) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4}
    advice = {
        "user": "u",
        "metadata": {"a": "b", "c": {"d": [1, None]}},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
    }
    plain = served.post("/v1/completions", body).json["choices"]
    assert served.post("/v1/completions", {**body, **advice, "safety_identifier": "s"}).json["choices"] == plain
    assert served.post("/v1/completions", {**body, "priority": 3}).json["choices"] == plain
    assert served.post("/v1/completions", {**body, "best_of": 1, "length_penalty": 1}).json["choices"] == plain


def test_ids_of_answers(served: Served) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    assert served.post("/v1/completions", body, X_Request_Id="my-1").json["id"] == "cmpl-my-1"
    assert served.post("/v1/completions", {**body, "request_id": "mine"}).json["id"] == "cmpl-mine"
    both = served.post("/v1/completions", {**body, "request_id": "mine"}, X_Request_Id="header")
    assert both.json["id"] == "cmpl-header"
    for wild in ("a b<c>\t", "é", "x" * 4000):
        id = served.post("/v1/completions", body, X_Request_Id=wild).json["id"]
        assert id.isascii() and id.isprintable() and len(id) <= 80 and " " not in id and "<" not in id


# --- beams ----------------------------------------------------------------------------------------------------------


def test_beams_are_those_of_the_python_api(served: Served) -> None:
    ids = ids_of(served, PROMPT)
    params = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.5, ignore_eos=True)
    expected = asyncio.run(served.llm.beam_search(ids, params)).sequences
    body = {"prompt": [PROMPT, PROMPT], "n": 3, "max_tokens": 6, "length_penalty": 0.5, "ignore_eos": True}
    body |= {"use_beam_search": True, "temperature": 0, "logprobs": 2, "return_token_ids": True}
    answer = served.post("/v1/completions", body).json
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice, beam in zip(answer["choices"], 2 * expected, strict=True):
        assert choice["token_ids"] == beam.tokens[len(ids) :] and choice["finish_reason"] == beam.finish_reason
        assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(beam.cum_logprob, abs=1e-3)
        assert all(1 <= len(top) <= 3 for top in choice["logprobs"]["top_logprobs"])
        assert text_of(served, ids) + choice["text"] == text_of(served, beam.tokens)
    assert answer["usage"]["completion_tokens"] == 36
    # The default values of parameters that do not combine with beams are no faults: many clients always send them.
    chat = {"messages": [{"role": "user", "content": "hello"}], "n": 2, "max_tokens": 4, "use_beam_search": True}
    chat |= {"temperature": 1, "top_p": 1, "presence_penalty": 0, "stop": None}
    choices = served.post("/v1/chat/completions", chat).json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1] and choices[0] != choices[1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "use_beam_search"),
        *(({name: 0.5}, name) for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty")),
        *(({name: 2}, name) for name in ("top_k", "min_tokens", "prompt_logprobs")),
        *(
            ({"stop": "a"}, "stop"),
            ({"logit_bias": {"5": 1}}, "logit_bias"),
            ({"stop_token_ids": [5]}, "stop_token_ids"),
        ),
        *(({"n": 5}, "n"), ({"n": 0}, "n"), ({"logprobs": 9}, "logprobs"), ({"echo": True, "logprobs": 1}, "echo")),
        *(({"max_tokens": 0, "echo": True}, "max_tokens"), ({"length_penalty": 1000}, "length_penalty")),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty"),
    ],
    ids=repr,
)
def test_parameters_that_do_not_combine_with_beams(served: Served, fields: dict[str, Any], param: str) -> None:
    body = {"prompt": "hello", "max_tokens": 2, "use_beam_search": True, **fields}
    check_error(served.post("/v1/completions", body), 400, param)
