# SPDX-License-Identifier: Apache-2.0
"""OpenAI's client against the real server, in a separate process with the engine in a child, under `python -O`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.server.live import Live
from tests.server.routes.served import openai_client

MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai_client(live.port) as client:
        yield client


def test_completions(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": ["one", "two"], "n": 2, "max_tokens": 12, "seed": 1}
    options["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**options, logprobs=2)
    texts = ["", "", "", ""]
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert all(choice.logprobs and len(choice.logprobs.tokens or ()) == 12 for choice in whole.choices)


def test_scores(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=[5, 6, 7, 8], max_tokens=0, echo=True, logprobs=0)
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None
    assert found.token_logprobs[0] is None and all(value < 0 for value in found.token_logprobs[1:])


def test_chat(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=["one", "two", "one"])
    one, two, again = (np.asarray(item.embedding) for item in answer.data)
    np.testing.assert_allclose(one, again, atol=1e-6)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5) and np.abs(one - two).max() > 1e-3


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    assert [model.id for model in client.models.list()] == ["tiny"]
