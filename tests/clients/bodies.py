# SPDX-License-Identifier: Apache-2.0
"""What clients send: recorded/ by running packages, written/ from the documentation of other clients."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEXT = 24  # characters of a text: the tests' model reads 128 tokens
MODEL = "tiny"


@dataclass(frozen=True)
class Sent:
    """A request of a client."""

    client: str  # with its version
    file: str
    shape: str
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None

    def __str__(self) -> str:
        return f"{self.file}-{self.shape}"

    @property
    def fitted(self) -> bytes:
        """The body as a model of a few tokens can take it: with short texts, few tokens and the model's name."""
        body = dict(self.body or {})
        if "model" in body:
            body["model"] = MODEL
        for name in ("max_tokens", "max_completion_tokens"):
            if name in body:
                body[name] = min(body[name], 4)
        if "messages" in body:
            body["messages"] = [each | {"content": _short(each.get("content"))} for each in body["messages"][-3:]]
        for name in ("prompt", "input"):
            if name in body:
                body[name] = _short(body[name])
        return json.dumps(body).encode() if self.body is not None else b""


def _short(value: Any) -> Any:
    match value:
        case str():
            return value[:TEXT]
        case int():  # a token of the demo's tokenizer
            return value % 400
        case list():
            return [_short(each) for each in value[:TEXT]]
        case {"text": str() as text}:
            return {**value, "text": text[:TEXT]}
        case _:
            return value


def sent() -> Iterator[Sent]:
    for path in sorted([*(HERE / "recorded").glob("*.json"), *(HERE / "written").glob("*.json")]):
        found = json.loads(path.read_text())
        for each in found["requests"]:
            yield Sent(client=f"{found['package']} {found['version']}", file=path.stem, **each)
