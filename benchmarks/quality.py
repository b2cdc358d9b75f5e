# SPDX-License-Identifier: Apache-2.0
"""The perplexity of one text for the servers of a comparison: what a setting costs in quality.

All servers score the same tokens in the same way, that of llama.cpp's `llama-perplexity`: the text is cut into chunks,
and in each chunk the tokens of the second half are scored. A chunk has 256 tokens, the longest prompt whose log
probabilities OpenVINO GenAI returns whole. Without --text the text is the language reference that comes with Python:
English prose with code, which a run needs not download. It differs between Python versions, and perplexities of
different texts cannot be compared. A server whose routes return no log probabilities of prompts has no perplexity,
unless it has another program for that (llama.cpp).
"""

import math
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer

from benchmarks.serving import COMPLETIONS, Target
from jaxserve.cli.client import Client

CHUNK = 256
UNSCORED = CHUNK // 2 + 1  # tokens at the beginning of a chunk; the first of the second half is not scored either


@dataclass(frozen=True)
class Passages:
    """A text, and as many chunks of its tokens as are scored."""

    text: str
    chunks: Sequence[Sequence[int]]

    @property
    def scored(self) -> int:
        return len(self.chunks) * (CHUNK - UNSCORED)


def passages(model: Path, count: int, file: Path | None = None) -> Passages:
    text = file.read_text() if file else "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer: Any = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) < count * CHUNK:
        where, needed = file or "Python's reference", f"{count} chunks need {count * CHUNK:,}"
        raise SystemExit(f"error: {where} has {len(ids):,} tokens, {needed}  hint: set a smaller --quality-chunks")
    return Passages(text, [ids[start : start + CHUNK] for start in range(0, count * CHUNK, CHUNK)])


def by_route(target: Target, those: Passages) -> float:
    """The perplexity that a server computes, through the log probabilities of its completions route."""
    client, logprobs = Client(target.url), list[float]()
    for ids in those.chunks:
        body = {"model": target.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        scores = client.post(COMPLETIONS, body)["choices"][0]["prompt_logprobs"]
        logprobs += [scores[place][str(ids[place])]["logprob"] for place in range(UNSCORED, CHUNK)]
    return math.exp(-statistics.fmean(logprobs))


def by_command(command: Sequence[str], those: Passages, folder: Path) -> float:
    """The perplexity that llama-perplexity prints."""
    file = folder / "perplexity.txt"
    file.write_text(those.text)
    sizes = ["--ctx-size", str(CHUNK), "--chunks", str(len(those.chunks))]
    done = subprocess.run([*command, "--file", str(file), *sizes], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    found = re.search(r"Final estimate: PPL = ([\d.]+)", said)
    if done.returncode or not found:
        raise SystemExit(f"error: {command[0]} printed no perplexity; it ends: {' | '.join(said.splitlines()[-3:])}")
    return float(found[1])
