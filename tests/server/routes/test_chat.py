# SPDX-License-Identifier: Apache-2.0
"""/v1/chat/completions through OpenAI's client."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.server.routes.served import Served, flat
from tests.text.chats import chat_ids
from tests.tiny_llm import Reference

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
OPTIONS: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}


def prompt_ids(served: Served, messages: Any = MESSAGES, **options: Any) -> list[int]:
    assert served.serving.tokenizer is not None
    return chat_ids(served.serving.tokenizer, messages, **options)


def test_an_answer(served: Served, reference: Reference) -> None:
    ids = prompt_ids(served)
    expected = reference.greedy(ids, 8)
    answer = served.client().chat.completions.create(**OPTIONS, logprobs=True, top_logprobs=2)
    [choice] = answer.choices
    assert served.serving.tokenizer is not None
    assert choice.message.content == served.serving.tokenizer.decode(expected)
    assert choice.message.role == "assistant" and choice.finish_reason in ("length", "stop")
    assert choice.message.refusal is None and choice.message.tool_calls is None
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    # Log probabilities in the shape of chats.
    assert choice.logprobs is not None and choice.logprobs.content is not None
    table = reference.logprobs([*ids, *expected])[len(ids) - 1 :]
    for place, entry in enumerate(choice.logprobs.content):
        assert entry.logprob == pytest.approx(float(table[place, expected[place]]), abs=1e-4)
        assert len(entry.top_logprobs) == 2
        best = np.sort(table[place])[::-1][:2]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.tolist(), abs=1e-4)
        # A part of a character alone has bytes, and U+FFFD for a text.
        assert entry.bytes is not None and bytes(entry.bytes).decode(errors="replace") == entry.token


def test_a_stream_equals_the_whole_answer(served: Served) -> None:
    create = served.client().chat.completions.create
    more: dict[str, Any] = {"n": 2, "seed": 11, "temperature": 1.0, "max_tokens": 30}
    whole = create(**{**OPTIONS, **more})
    texts, ends = {0: "", 1: ""}, dict[int, Any]()
    for chunk in create(**{**OPTIONS, **more}, stream=True):
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}


def test_the_order_of_chunks(served: Served) -> None:
    body = {**OPTIONS, "n": 2, "temperature": 1.0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = served.post("/v1/chat/completions", body).events
    assert done == "[DONE]"
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[0]["finish_reason"] is None
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert [choice["finish_reason"] is not None for choice in own] == [False] * (len(own) - 1) + [True]
        assert "stop_reason" in own[-1]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 16
    assert all("usage" not in chunk for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, last]}) == 1


def test_streamed_logprobs(served: Served) -> None:
    body = {**OPTIONS, "logprobs": True, "top_logprobs": 3}
    whole = served.post("/v1/chat/completions", body).json["choices"][0]["logprobs"]["content"]
    chunks = served.post("/v1/chat/completions", {**body, "stream": True}).events[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert parts[0] is None  # of the opening
    assert flat(part["content"] for part in parts[1:]) == whole


def test_lengths(served: Served) -> None:
    create = served.client().chat.completions.create
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "extra_body": {"ignore_eos": True}}
    answer = create(**options, max_completion_tokens=3, max_tokens=5)
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    answer = create(**options)  # the rest of the context
    assert answer.usage is not None and answer.usage.total_tokens == 128
    assert answer.choices[0].finish_reason == "length"


def test_parts_of_text(served: Served) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    body = {"messages": parts, "max_tokens": 1, "return_token_ids": True, "return_prompt_text": True}
    reply = served.post("/v1/chat/completions", body).json
    assert reply["prompt_token_ids"] == prompt_ids(served, [{"role": "user", "content": "a\nb"}])
    assert "a\nb" in reply["prompt_text"]


def test_continuing_the_last_message(served: Served) -> None:
    begun: Any = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    body = {
        "messages": begun,
        "max_tokens": 4,
        "temperature": 0,
        "continue_final_message": True,
        "return_token_ids": True,
    }
    reply = served.post("/v1/chat/completions", body).json
    ids = prompt_ids(served, begun, add_generation_prompt=False, continue_final_message=True)
    assert reply["prompt_token_ids"] == ids
    text = reply["choices"][0]["message"]["content"]
    echoed = served.post("/v1/chat/completions", {**body, "echo": True}).json["choices"][0]["message"]["content"]
    assert echoed == "It is" + text
    events = served.post("/v1/chat/completions", {**body, "echo": True, "stream": True}).events[:-1]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[1] == {"content": "It is"}
    assert "".join(delta.get("content", "") for delta in deltas) == echoed


def test_no_generation_prompt(served: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "add_generation_prompt": False, "return_token_ids": True}
    reply = served.post("/v1/chat/completions", body).json
    assert reply["prompt_token_ids"] == prompt_ids(served, add_generation_prompt=False)
    assert reply["choices"][0]["message"]["role"] == "user"


def test_a_returned_answer_is_accepted_as_a_message(served: Served) -> None:
    answer = served.client().chat.completions.create(**OPTIONS)
    back: Any = [*MESSAGES, answer.choices[0].message.model_dump(), {"role": "user", "content": "and"}]
    assert served.client().chat.completions.create(model="tiny", messages=back, max_tokens=1).choices


def test_concurrent_requests_with_the_same_id(served: Served) -> None:
    """An id sent by a client does not have to be unique."""

    def ask(_: int) -> tuple[str, str]:
        body = {**OPTIONS, "request_id": "same"}
        reply = served.post("/v1/chat/completions", body, X_Request_Id="same").json
        return reply["id"], reply["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(6) as pool:
        answers = set(pool.map(ask, range(6)))
    assert len(answers) == 1 and answers.pop()[0] == "chatcmpl-same"


def test_prompt_logprobs(served: Served) -> None:
    reply = served.post("/v1/chat/completions", {**OPTIONS, "max_tokens": 1, "prompt_logprobs": 0}).json
    ids = prompt_ids(served)
    assert reply["prompt_logprobs"][0] is None
    assert [list(position) for position in reply["prompt_logprobs"][1:]] == [[str(token)] for token in ids[1:]]
