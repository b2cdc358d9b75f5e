# SPDX-License-Identifier: Apache-2.0
"""The shapes of answers, whole and in chunks, as defined by OpenAI and vLLM.

A chunk is assembled from text prepared once per answer and the separately encoded new part; encoding the whole object
for every token would cost several times as much.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from aiohttp import web

from jaxserve import __version__
from jaxserve.errors import one_line
from jaxserve.server.errors import ApiError, scrubbed
from jaxserve.types.outputs import CompletionOutput, RequestOutput

FINGERPRINT = f"jaxserve-{__version__}"

encode = msgspec.json.Encoder().encode


MANY = 64  # elements of a list that are encoded in one call


def encode_long(value: Any) -> bytes:
    """Encodes long lists in parts: other threads run only between two calls of `encode`."""
    parts: list[bytes] = []
    _encode(value, parts)
    return b"".join(parts)


def _encode(value: Any, parts: list[bytes]) -> None:
    if not _long(value):
        parts.append(encode(value))
    elif isinstance(value, dict):
        for place, (name, item) in enumerate(cast("dict[str, Any]", value).items()):
            parts.append((b"," if place else b"{") + encode(name) + b":")
            _encode(item, parts)
        parts.append(b"}")
    elif _long(value[0]):
        for place, item in enumerate(value):
            parts.append(b"," if place else b"[")
            _encode(item, parts)
        parts.append(b"]")
    else:
        for begin in range(0, len(value), MANY):
            parts += (b"," if begin else b"[", encode(value[begin : begin + MANY])[1:-1])
        parts.append(b"]")


def _long(value: Any) -> bool:
    """Whether there is a long list in it. All elements of a list are taken to be like the first."""
    if isinstance(value, list):
        listed = cast("list[Any]", value)
        return len(listed) > MANY or (bool(listed) and _long(listed[0]))
    return isinstance(value, dict) and any(map(_long, cast("dict[str, Any]", value).values()))


def json_response(value: object) -> web.Response:
    return web.Response(body=encode_long(value), content_type="application/json", charset="utf-8")


@dataclass(slots=True)
class Usage:
    """An answer's token counts so far."""

    prompt: int
    completion: int = 0
    cached: int = 0

    def shape(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput]) -> "Usage":
        """The usage of whole answers."""
        return cls(
            prompt=sum(len(output.prompt_token_ids) for output in outputs),
            completion=sum(len(sample.token_ids) for output in outputs for sample in output.outputs),
            cached=sum(output.num_cached_tokens for output in outputs),
        )


@dataclass(frozen=True, slots=True)
class Envelope:
    """The first members of an answer and of each of its chunks."""

    id: str
    object: str
    model: str
    created: int

    @classmethod
    def new(cls, id: str, kind: str, model: str) -> "Envelope":
        return cls(id, kind, model, int(time.time()))

    def shape(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.object, "created": self.created, "model": self.model}

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Usage, **more: Any) -> dict[str, Any]:
        rest = {"service_tier": None, "system_fingerprint": FINGERPRINT, "usage": usage.shape()}
        return {**self.shape(), "choices": choices, **rest, **more}


class Chunks:
    """Writes the chunks of one streamed answer as events."""

    def __init__(self, envelope: Envelope, *, continuous_usage: bool) -> None:
        self._begin = b"data: " + encode(envelope.shape())[:-1] + b',"choices":['
        self._end = b"]" + b',"system_fingerprint":' + encode(FINGERPRINT)
        self._continuous = continuous_usage

    def chunk(self, choice: bytes, usage: Usage, more: bytes = b"") -> bytes:
        """A chunk with one choice. `more`: further members of the chunk, each preceded by a comma."""
        if self._continuous:
            more += b',"usage":' + encode(usage.shape())
        return b"%b%b%b%b}\n\n" % (self._begin, choice, self._end, more)

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        """What precedes and follows the new part of a chunk, for chunks of which nothing else changes."""
        return self._begin + before, after + self._end + b"}\n\n"

    def usage(self, usage: Usage) -> bytes:
        return b'%b%b,"usage":%b}\n\n' % (self._begin, self._end, encode(usage.shape()))


def finish(sample: CompletionOutput) -> bytes:
    """The last members of a choice."""
    if sample.finish_reason is None:
        return b',"finish_reason":null}'
    return b',"finish_reason":%b,"stop_reason":%b}' % (encode(sample.finish_reason), encode(sample.stop_reason))


def check_sound(output: RequestOutput) -> None:
    """Raise an error for the client if the engine could not continue this request."""
    for sample in output.outputs:
        if sample.finish_reason == "error":
            reason = one_line(scrubbed(sample.error or "the model returned numbers that are not finite"), limit=300)
            raise ApiError(500, f"The engine failed on this request: {reason}.")
