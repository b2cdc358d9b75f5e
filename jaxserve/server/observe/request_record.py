# SPDX-License-Identifier: Apache-2.0
"""What the log line of one HTTP request reports."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.types.request import Request


@dataclass
class RequestRecord:
    """Times are read from the monotonic clock."""

    id: str
    arrival: float
    key: str | None = None  # name of the API key
    body_size: int = 0  # in bytes
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    scheduled: float | None = None  # when the first sequence got a row
    first_token: float | None = None
    last_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list[str])
    prepared: Sequence[Request] = ()  # the requests to the engine
    error: str | None = None  # message of the error response
    texts: list[str] = field(default_factory=list[str])  # generated text, up to the length to log
    text_length: int = 0  # of `texts`, in characters
