# SPDX-License-Identifier: Apache-2.0
"""Serves OpenVINO GenAI's continuous batching over HTTP; runs in a Python that has it and nothing of jaxserve.

    python openvino_server.py FOLDER --model-name NAME --port PORT [--rows N] [--precision f32|bf16]

FOLDER is what `optimum-cli export openvino` writes. OpenVINO's Python packages have no server. This one has just what
the comparison asks for: chat completions, streamed or whole, with `max_tokens`, `temperature` 0 and `ignore_eos`; and
completions of token ids with `prompt_logprobs`. The pipeline runs in a process without HTTP, because a step does not
release Python's lock. Text is encoded and decoded by Hugging Face's tokenizers.
"""

import argparse
import asyncio
import json
import multiprocessing
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from aiohttp import web


@dataclass(frozen=True)
class PipelineOrder:
    """A request to the pipeline."""

    number: int
    ids: list[int]
    new: int
    ignore_eos: bool = False
    logprobs: bool = False  # of the prompt's tokens


@dataclass(frozen=True)
class OrderProgress:
    """What a step brought a request."""

    number: int
    ids: list[int]
    logprobs: list[float]
    ended: str | None  # the finish reason


# --- the pipeline's process -----------------------------------------------------------------------------------------


def turn_pipeline(pipe: Connection, folder: str, rows: int, precision: str | None) -> None:
    """Runs the orders that arrive, until the other end is closed. The first message says that it is loaded."""
    import numpy as np
    import openvino  # pyright: ignore[reportMissingImports]
    import openvino_genai as genai  # pyright: ignore[reportMissingImports]

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.enable_prefix_caching = rows, True
    properties = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    properties |= {"KV_CACHE_PRECISION": "f32"} if precision == "f32" else {}
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
    base = pipeline.get_config()

    def begin(order: PipelineOrder) -> Any:
        config = genai.GenerationConfig()
        config.eos_token_id, config.stop_token_ids = base.eos_token_id, base.stop_token_ids
        config.max_new_tokens, config.ignore_eos, config.do_sample = order.new, order.ignore_eos, False
        config.echo, config.logprobs = order.logprobs, int(order.logprobs)
        return pipeline.add_request(order.number, openvino.Tensor(np.array([order.ids], np.int64)), config)

    pipe.send(None)
    going: dict[int, Any] = {}
    while True:
        while pipe.poll(0 if going else None):
            try:
                order = pipe.recv()
            except EOFError:
                return
            going[order.number] = begin(order)
        pipeline.step()
        done = [one for number, handle in going.items() for one in _read(number, handle, genai)]
        for one in done:
            if one.ended:
                del going[one.number]
        if done:
            pipe.send(done)


def _read(number: int, handle: Any, genai: Any) -> list[OrderProgress]:
    found: list[OrderProgress] = []
    reasons = genai.GenerationFinishReason
    while handle.can_read():
        for out in handle.read().values():
            ended = {reasons.NONE: None, reasons.LENGTH: "length"}.get(out.finish_reason, "stop")
            found.append(OrderProgress(number, list(out.generated_ids), list(out.generated_log_probs), ended))
    return found


# --- HTTP -----------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """The text of tokens that arrive a few at a time; a character that is not complete yet is kept back."""

    tokenizer: Any
    ids: list[int] = field(default_factory=list[int])
    shown: int = 0  # the text of the tokens before this one has been returned
    context: int = 0  # decoding starts here: a token's text can depend on the one before it

    def add(self, ids: list[int]) -> str:
        self.ids += ids
        whole = self.tokenizer.decode(self.ids[self.context :])
        before = self.tokenizer.decode(self.ids[self.context : self.shown])
        if whole.endswith("\ufffd"):
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        return whole[len(before) :]


class Server:
    def __init__(self, name: str, pipe: Connection, templates: Any) -> None:
        """`templates`: transformers' tokenizer of the model."""
        self.name, self.pipe = name, pipe
        self.templates, self.tokenizer = templates, templates.backend_tokenizer
        self.waiting: dict[int, asyncio.Queue[OrderProgress]] = {}
        self.count = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/health", healthy), web.post("/v1/chat/completions", self.chat)])
        app.add_routes([web.post("/v1/completions", self.score)])
        app.on_startup.append(self.start)
        return app

    async def start(self, _: web.Application) -> None:
        asyncio.get_running_loop().add_reader(self.pipe.fileno(), self.receive)

    def receive(self) -> None:
        for progress in self.pipe.recv():
            self.waiting[progress.number].put_nowait(progress)

    async def run(self, ids: list[int], **options: Any) -> AsyncGenerator[OrderProgress]:
        number = self.count = self.count + 1
        queue = self.waiting[number] = asyncio.Queue()
        self.pipe.send(PipelineOrder(number, ids, **options))
        ended = None
        while not ended:
            progress = await queue.get()
            ended = progress.ended
            yield progress
        del self.waiting[number]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = self.templates.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        work = self.run(ids, new=body["max_tokens"], ignore_eos=body.get("ignore_eos", False))
        text, made = Text(self.tokenizer), 0
        about = {"id": "chat", "model": self.name, "object": "chat.completion.chunk"}
        if not body.get("stream"):
            said, reason = "", None
            async for progress in work:
                said, reason = said + text.add(progress.ids), progress.ended
            message = {"role": "assistant", "content": said}
            choice = {"index": 0, "message": message, "finish_reason": reason}
            return web.json_response(about | {"object": "chat.completion", "choices": [choice]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for progress in work:
            made += len(progress.ids)
            delta = {"content": text.add(progress.ids)}
            choice = {"index": 0, "delta": delta, "finish_reason": progress.ended}
            await response.write(_event(about | {"choices": [choice]}))
        usage = {"prompt_tokens": len(ids), "completion_tokens": made, "total_tokens": len(ids) + made}
        await response.write(_event(about | {"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        return response

    async def score(self, request: web.Request) -> web.Response:
        """The log probabilities of a prompt, in the form that vLLM has for them."""
        body = await request.json()
        ids: list[int] = body["prompt"]
        logprobs: list[float] = []
        async for progress in self.run(ids, new=1, logprobs=True):
            logprobs += progress.logprobs
        scores = [{str(token): {"logprob": one}} for token, one in zip(ids, logprobs[: len(ids)], strict=True)]
        choice = {"index": 0, "text": "", "prompt_logprobs": [None, *scores[1:]]}
        return web.json_response({"model": self.name, "choices": [choice]})


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


async def healthy(_: web.Request) -> web.Response:
    return web.json_response({})


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description="Serve OpenVINO GenAI's continuous batching.")
    parser.add_argument("folder", type=Path, help="what optimum-cli exported")
    parser.add_argument("--model-name", required=True, help="the name in the responses")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--rows", type=int, default=32, help="concurrent sequences")
    parser.add_argument("--precision", choices=("f32", "bf16"), help="of the products (default: OpenVINO's choice)")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    work = str(options.folder), options.rows, options.precision
    engine = spawn.Process(target=turn_pipeline, args=(theirs, *work), daemon=True)
    engine.start()
    theirs.close()
    try:
        ours.recv()
    except EOFError:
        raise SystemExit("error: OpenVINO did not load the model; see above") from None
    server = Server(options.model_name, ours, AutoTokenizer.from_pretrained(str(options.folder)))
    web.run_app(server.app(), host=options.host, port=options.port, access_log=None)


if __name__ == "__main__":
    main()
