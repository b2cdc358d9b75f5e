# SPDX-License-Identifier: Apache-2.0
"""What is known of one HTTP request, for the log."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.frontend.prepare import Ready


@dataclass
class Record:
    """Times are moments on the monotonic clock."""

    id: str
    arrival: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    all_counted: bool = True  # whether these are all that were generated
    first_token: float | None = None
    last_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list[str])
    jobs: "Sequence[Ready]" = ()
    error: str | None = None  # what the client was told instead of an answer
    texts: list[str] = field(default_factory=list[str])  # of the answers, as far as they are to be logged
    text_length: int = 0  # of these
