# SPDX-License-Identifier: Apache-2.0
"""A server that keeps what clients send and answers like OpenAI's, with one fixed text."""

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEXT = "7 + 5 = 12"
LONGEST = 300  # characters of a text that are kept: prompts of coding agents fill pages
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
# Of these headers, clients differ in ways that a server may notice.
HEADERS = ("accept", "accept-encoding", "anthropic-version", "content-type", "openai-beta", "x-api-key")


class Recorder(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Recorder
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._keep(None)
        self._send({"object": "list", "data": [{"id": "demo", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self._keep(body)
        path = self.path.partition("?")[0]
        if path.endswith("/embeddings"):
            self._send({"object": "list", "model": "demo", "usage": USAGE, "data": [vector(0)]})
        elif path.endswith("/completions"):
            self._answer(body, chat="/chat/" in path)
        else:
            self.send_error(404)

    def _answer(self, body: dict[str, Any], *, chat: bool) -> None:
        prompts = body.get("prompt")
        count = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
        if not body.get("stream"):
            choices = [choice(chat, index, body) for index in range(count)]
            self._send({**head(chat, "chat.completion"), "choices": choices, "usage": USAGE})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for last in (False, True):
            piece: dict[str, Any] = {"index": 0, "finish_reason": "stop" if last else None}
            piece |= (
                {"delta": {"role": "assistant", "content": TEXT * (not last)}} if chat else {"text": TEXT * (not last)}
            )
            self._event({**head(chat, "chat.completion.chunk"), "choices": [piece]})
        if (body.get("stream_options") or {}).get("include_usage"):
            self._event({**head(chat, "chat.completion.chunk"), "choices": [], "usage": USAGE})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, content: object) -> None:
        self.wfile.write(b"data: %b\n\n" % json.dumps(content).encode())
        self.wfile.flush()

    def _send(self, content: object) -> None:
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _keep(self, body: Any) -> None:
        headers = {name: self.headers[name] for name in HEADERS if name in self.headers}
        self.server.seen.append(
            {"method": self.command, "path": self.path, "headers": headers, "body": shortened(body)}
        )

    def log_message(self, format: str, *args: Any) -> None:
        pass


def head(chat: bool, kind: str) -> dict[str, Any]:
    return {"id": "x", "object": kind if chat else "text_completion", "created": 0, "model": "demo"}


def choice(chat: bool, index: int, body: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"index": index, "finish_reason": "stop", "logprobs": None}
    if chat:
        return made | {"message": {"role": "assistant", "content": TEXT}}
    if body.get("echo"):  # the log probabilities of a prompt, which lm-eval reads
        prompt: Any = body["prompt"]
        tokens = [str(each) for each in (prompt[index] if prompt and isinstance(prompt[0], list) else prompt)] + ["x"]
        values: list[Any] = [None, *[-1.0] * (len(tokens) - 1)]
        tops = [None, *({token: -1.0} for token in tokens[1:])]
        made["logprobs"] = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
    return made | {"text": TEXT}


def vector(index: int) -> dict[str, Any]:
    return {"object": "embedding", "index": index, "embedding": [0.6, 0.8]}


def shortened(value: Any) -> Any:
    """The same with long texts cut."""
    if isinstance(value, dict):
        return {name: shortened(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shortened(each) for each in value]
    return value[:LONGEST] if isinstance(value, str) else value


@contextmanager
def recording() -> Generator[Recorder]:
    with Recorder() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
