# SPDX-License-Identifier: Apache-2.0
"""Prompts of a load test: drawn at random, like ShareGPT's, with shared prefixes, or read from a file.

A prompt is token ids where the server has a tokenizer to name some, else words. The same seed gives the same prompts.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

from jaxserve.errors import UsageError

# vLLM's bounds for conversations of ShareGPT: tokens of a prompt or an answer, of a prompt, of both.
LEAST, MOST_OF_PROMPT, MOST = 4, 1024, 2048
# Median and sigma of log-normal distributions. Within these bounds, prompts have about 210 tokens on average and
# answers 200, as vLLM's selection from ShareGPT has.
PROMPT_LENGTHS, ANSWER_LENGTHS = (150, 1.7), (125, 1.0)

type Length = Callable[[str], int]
"""The number of tokens of a text."""


@dataclass(frozen=True)
class Prompt:
    content: str | list[int]
    tokens: int
    output: int  # tokens to generate


@dataclass(frozen=True)
class TokenSource:
    """Draws tokens: ids of `pool`, or words if it is None."""

    draw: random.Random
    pool: Sequence[int] | None
    words: Sequence[str]

    def tokens(self, count: int) -> list[Any]:
        return self.draw.choices(self.words if self.pool is None else self.pool, k=count)

    def prompt(self, tokens: list[Any], output: int) -> Prompt:
        return Prompt(" ".join(tokens) if self.pool is None else tokens, len(tokens), output)


def sharegpt_like(source: TokenSource, *, output: int | None) -> Iterator[Prompt]:
    """Random tokens with lengths like those of ShareGPT's conversations."""
    while True:
        prompt = _log_normal(source.draw, PROMPT_LENGTHS)
        answer = _log_normal(source.draw, ANSWER_LENGTHS) if output is None else output
        if _fits(prompt, answer, checked=output is None):
            yield source.prompt(source.tokens(prompt), answer)


def prefix_repetition(
    source: TokenSource, count: int, *, prefixes: int, prefix: int, suffix: int, output: int
) -> list[Prompt]:
    """Prompts that share one of a few prefixes, in random order."""
    shared = [source.tokens(prefix) for _ in range(prefixes)]
    made = [source.prompt(shared[place % prefixes] + source.tokens(suffix), output) for place in range(count)]
    source.draw.shuffle(made)
    return made


def custom(path: Path, draw: random.Random, count: int, *, output: int, length: Length) -> list[Prompt]:
    """The lines of a JSONL file, in random order and repeated if they are too few. `output` -1: each line's
    output_tokens."""
    found: list[Prompt] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
        except ValueError:
            entry = None
        entry = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        prompt = entry.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise UsageError(f"{path}, line {number}: there is no prompt", 'write {"prompt": "..."} on each line')
        tokens = entry.get("output_tokens") if output == -1 else output
        if not isinstance(tokens, int) or tokens < 1:
            raise UsageError(f"{path}, line {number}: there is no output_tokens", "set --custom-output-len")
        found.append(Prompt(prompt, length(prompt), tokens))
    return _drawn(found, path, draw, count)


def sharegpt(path: Path, draw: random.Random, count: int, *, output: int | None, length: Length) -> list[Prompt]:
    """The first question of each conversation in a file of ShareGPT, with the length of its answer."""
    try:
        content: Any = json.loads(_text(path))
    except ValueError:
        content = None
    talks: list[Any] = cast("list[Any]", content) if isinstance(content, list) else []
    draw.shuffle(talks)
    found: list[Prompt] = []
    for talk in talks:
        if len(found) == count:
            break
        try:
            question, answer = (str(talk["conversations"][turn]["value"]) for turn in (0, 1))
        except (IndexError, KeyError, TypeError):
            continue
        prompt, wanted = length(question), length(answer) if output is None else output
        if _fits(prompt, wanted, checked=output is None):
            found.append(Prompt(question, prompt, wanted))
    return _drawn(found, path, draw, count)


def _fits(prompt: int, answer: int, *, checked: bool) -> bool:
    return prompt >= LEAST and (answer >= LEAST or not checked) and prompt <= MOST_OF_PROMPT and prompt + answer <= MOST


def _log_normal(draw: random.Random, lengths: tuple[float, float]) -> int:
    median, sigma = lengths
    return round(draw.lognormvariate(math.log(median), sigma))


def _text(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"cannot read {path}: {reason}", "check --dataset-path") from None


def _drawn(found: list[Prompt], path: Path, draw: random.Random, count: int) -> list[Prompt]:
    if not found:
        raise UsageError(f"{path} has no prompts", "check --dataset-path and --dataset-name")
    draw.shuffle(found)
    return list(islice(cycle(found), count))
