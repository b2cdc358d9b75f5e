# SPDX-License-Identifier: Apache-2.0
"""`jaxserve bench serve`: load on a running server, and vLLM's table of what it bore."""

import asyncio
import json as json_module
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxserve.cli import settings
from jaxserve.cli.client import DEFAULT_URL, Client, ServerError, key_of_environment
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags.parsing import Arg

if TYPE_CHECKING:
    from jaxserve.cli.load import Job, Sample

# Common words, most of them one token in most vocabularies: prompts where a server does not tokenize for us.
WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know"
)


SLOWEST, LONGEST = 1e-6, 1e9  # requests a second; seconds


@dataclass(frozen=True, kw_only=True)
class BenchServe:
    """Load a running server, and measure."""

    url: Annotated[str, Arg(options=("--base-url",))] = DEFAULT_URL
    """The server, with /v1 or without."""
    model: str | None = None
    """The model's name at the server; its first if not given."""
    api_key: str | None = field(default=None, repr=False)
    """The server's key; JAXSERVE_API_KEY or OPENAI_API_KEY if not given."""
    endpoint: Literal["/v1/completions", "/v1/chat/completions"] = "/v1/completions"
    """What is asked for."""
    dataset_name: Literal["random"] = "random"
    """What the prompts are: tokens drawn at random, so that no two begin alike."""
    num_prompts: int = 1000
    """How many requests."""
    random_input_len: int = 1024
    """Tokens in a prompt."""
    random_output_len: int = 128
    """Tokens in an answer, at most."""
    random_prefix_len: int = 0
    """Tokens, before those, with which all prompts begin."""
    random_range_ratio: float = 0.0
    """Lengths differ by up to this share, either way."""
    max_concurrency: int | None = None
    """How many requests at once; no limit if not given."""
    request_rate: float = float("inf")
    """Requests per second, at random times; inf for all at once."""
    ignore_eos: bool = False
    """Have every answer reach its length."""
    temperature: float = 0.0
    """Of the sampling."""
    seed: int = 0
    """Of prompts and times."""
    num_warmups: int = 1
    """Requests before those that count."""
    timeout: float = 24 * 3600.0
    """Seconds after which a request has failed."""
    json: Path | None = None
    """Write the figures into this file; - for standard output, in place of the table."""
    save_result: bool = False
    """Write the figures into a file named after time and model, as vLLM does."""
    result_dir: Path = Path()
    """Where --save-result writes."""

    def __post_init__(self) -> None:
        for name, low in (("num_prompts", 1), ("random_input_len", 1), ("random_output_len", 1), ("num_warmups", 0)):
            if getattr(self, name) < low:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}", f"give {low} or more")
        if self.random_prefix_len < 0 or (self.max_concurrency is not None and self.max_concurrency < 1):
            raise UsageError("--random-prefix-len or --max-concurrency is too small", "give a positive number")
        if not self.request_rate >= SLOWEST:
            raise UsageError(f"--request-rate is {self.request_rate}", "give a number above 0, or inf")
        if not 0 <= self.random_range_ratio < 1:
            raise UsageError(f"--random-range-ratio is {self.random_range_ratio}", "give a number from 0 to below 1")
        if not 0 < self.timeout <= LONGEST:
            raise UsageError(f"--timeout is {self.timeout}", "give a number of seconds")
        settings.check_place(self.json)
        if self.save_result and not self.result_dir.is_dir():
            raise UsageError(f"there is no folder {self.result_dir}", "make it, or name another with --result-dir")

    def run(self) -> int:
        from jaxserve.cli import load

        key = self.api_key or key_of_environment()
        client = Client(self.url, api_key=key)
        model = self.model or client.model()
        jobs = self.jobs(model, _pool(client, model, self.seed))
        shown = _Bar(self.num_prompts)

        async def measured() -> load.Outcome:
            warm = await load.run(client.root, jobs[self.num_prompts :], api_key=key, timeout=self.timeout)
            if warm.samples and all(sample.error for sample in warm.samples):
                raise JaxserveError(f"the first request failed: {warm.samples[0].error}", "see the server's log")
            return await load.run(
                client.root,
                jobs[: self.num_prompts],
                concurrency=self.max_concurrency,
                rate=self.request_rate,
                seed=self.seed,
                api_key=key,
                timeout=self.timeout,
                done=shown.add,
            )

        outcome = asyncio.run(measured())
        shown.close()
        figures = load.summary(outcome)
        self._report(model, figures, [sample.error for sample in outcome.samples if sample.error])
        return 0 if figures["completed"] else 1

    def jobs(self, model: str, pool: "Sequence[int] | None") -> "list[Job]":
        """The same for the same seed, those for warming up last. `pool` are token ids to draw from, else prompts are
        words."""
        from jaxserve.cli.load import Job

        draw, words = random.Random(self.seed), WORDS.split()
        chat = self.endpoint == "/v1/chat/completions"

        def tokens(count: int) -> list[Any]:
            return draw.choices(words if pool is None or chat else pool, k=count)

        def length(usual: int) -> int:
            low, high = usual * (1 - self.random_range_ratio), usual * (1 + self.random_range_ratio)
            return max(1, draw.randint(int(low), -int(-high // 1)))

        prefix, jobs = tokens(self.random_prefix_len), list[Job]()
        for _ in range(self.num_prompts + self.num_warmups):
            prompt = [*prefix, *tokens(length(self.random_input_len))]
            text = prompt if pool is not None and not chat else " ".join(prompt)
            asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
            body: dict[str, Any] = {**asked, "model": model, "max_tokens": length(self.random_output_len)}
            body |= {"temperature": self.temperature, **({"ignore_eos": True} if self.ignore_eos else {})}
            jobs.append(Job(self.endpoint, body, len(prompt)))
        return jobs

    def _report(self, model: str, figures: dict[str, float], errors: Sequence[str]) -> None:
        asked = {name: value for name, value in asdict(self).items() if name not in ("api_key", "json")}
        asked |= {"request_rate": str(self.request_rate) if self.request_rate == float("inf") else self.request_rate}
        asked |= {"model_id": model, "date": time.strftime("%Y%m%d-%H%M%S"), "result_dir": str(self.result_dir)}
        result = json_module.dumps({**asked, **figures, "errors": list(errors)})
        if str(self.json) == "-":
            print(result)
        else:
            print(table(figures, rate=self.request_rate, concurrency=self.max_concurrency))
        for error in list(dict.fromkeys(errors))[:3]:
            print(f"failed: {error}", file=sys.stderr)
        files = [self.json] if self.json is not None and str(self.json) != "-" else list[Path]()
        if self.save_result:
            name = f"openai-{self.request_rate}qps-{model.rpartition('/')[2]}-{asked['date']}.json"
            files.append(self.result_dir / name)
        for file in files:
            file.write_text(result + "\n")


def _pool(client: Client, model: str, seed: int) -> list[int] | None:
    """Ids of plain tokens, from the server's tokenizer; None if it has no such route."""
    try:
        found = client.post("/tokenize", {"model": model, "prompt": WORDS, "add_special_tokens": False})
        ids = sorted({int(token) for token in found["tokens"]})
    except ServerError as error:
        if error.status is None or error.status in (401, 403, 503):
            raise
        return None
    except (KeyError, TypeError, ValueError):
        return None
    return ids or None


_ROWS = (
    ("Successful requests:", "completed", "d"),
    ("Failed requests:", "failed", "d"),
    ("Benchmark duration (s):", "duration", ".2f"),
    ("Total input tokens:", "total_input_tokens", "d"),
    ("Total generated tokens:", "total_output_tokens", "d"),
    ("Request throughput (req/s):", "request_throughput", ".2f"),
    ("Output token throughput (tok/s):", "output_throughput", ".2f"),
    ("Peak concurrent requests:", "max_concurrent_requests", "d"),
    ("Total token throughput (tok/s):", "total_token_throughput", ".2f"),
)
_TIMES = (
    ("Time to First Token", "TTFT"),
    ("Time per Output Token (excl. 1st token)", "TPOT"),
    ("Inter-token Latency", "ITL"),
)


def table(figures: dict[str, float], *, rate: float, concurrency: int | None) -> str:
    """The rows of `vllm bench serve`, in its words."""

    def row(name: str, value: Any) -> str:
        return f"{name:<40} {value:<10}"

    def number(key: str, form: str) -> str:
        return format(int(figures[key]) if form == "d" else figures[key], form)

    lines = [f"{' Serving Benchmark Result ':=^50}"]
    lines += [row(name, number(key, form)) for name, key, form in _ROWS[:2]]
    if concurrency is not None:
        lines.append(row("Maximum request concurrency:", concurrency))
    if rate != float("inf"):
        lines.append(row("Request rate configured (RPS):", f"{rate:.2f}"))
    lines += [row(name, number(key, form)) for name, key, form in _ROWS[2:]]
    for title, name in _TIMES:
        lines.append(f"{title:-^50}")
        for label, part in (("Mean", "mean"), ("Median", "median"), ("P99", "p99")):
            lines.append(row(f"{label} {name} (ms):", number(f"{part}_{name.lower()}_ms", ".2f")))
    return "\n".join([*lines, "=" * 50])


class _Bar:
    """How many requests are done, on a terminal alone."""

    def __init__(self, count: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=count, dynamic_ncols=True) if sys.stderr.isatty() else None

    def add(self, sample: "Sample") -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
