# SPDX-License-Identifier: Apache-2.0
"""The server that the benchmarks put before OpenVINO GenAI, with a pipeline that answers with given tokens."""

import asyncio
import json
import multiprocessing
import threading
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from aiohttp.test_utils import TestClient, TestServer
from tokenizers import Tokenizer

from benchmarks.peers.openvino_server import OrderProgress, PipelineOrder, Server, Text
from jaxserve import demo

TOKENIZER = Tokenizer.from_file(str(demo.FOLDER / "tokenizer.json"))
SAYS = "Grüße, 你好 🙂!"


def test_the_pieces_of_a_text_are_whole_characters() -> None:
    ids = TOKENIZER.encode(SAYS).ids
    text = Text(TOKENIZER)
    pieces = [text.add([token]) for token in ids]
    assert "".join(pieces) == TOKENIZER.decode(ids) == SAYS
    assert "\ufffd" not in "".join(pieces) and "" in pieces, "the bytes of one character come in several tokens"


def pipeline(pipe: Connection) -> None:
    """Answers two orders."""
    for _ in range(2):
        order: PipelineOrder = pipe.recv()
        ids = TOKENIZER.encode(SAYS).ids
        scores = [-float(place) for place in range(len(order.ids) + 1)] if order.logprobs else [0.0]
        pipe.send([OrderProgress(order.number, ids[:1], scores, None)])
        pipe.send([OrderProgress(order.number, ids[1:], [0.0] * (len(ids) - 1), "length")])


def test_its_routes() -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = threading.Thread(target=pipeline, args=(theirs,))
    worker.start()
    templates = SimpleNamespace(backend_tokenizer=TOKENIZER, apply_chat_template=lambda *_, **__: "What is 7 + 5?")

    async def ask() -> tuple[str, Any]:
        async with TestClient(TestServer(Server("m", ours, templates).app())) as client:
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "stream": True}
            stream = await (await client.post("/v1/chat/completions", json=body)).text()
            asked = {"prompt": [5, 6, 7], "prompt_logprobs": 0, "max_tokens": 1}
            return stream, await (await client.post("/v1/completions", json=asked)).json()

    stream, scored = asyncio.run(ask())
    worker.join()
    *events, end = [line.removeprefix("data: ") for line in stream.strip().split("\n\n")]
    found = [json.loads(event) for event in events]
    assert end == "[DONE]" and found[-1]["usage"]["completion_tokens"] == len(TOKENIZER.encode(SAYS).ids)
    choices = [event["choices"][0] for event in found[:-1]]
    assert "".join(choice["delta"]["content"] for choice in choices) == SAYS
    assert [choice["finish_reason"] for choice in choices] == [None, "length"]
    assert scored["choices"][0]["prompt_logprobs"] == [None, {"6": {"logprob": -1.0}}, {"7": {"logprob": -2.0}}]
