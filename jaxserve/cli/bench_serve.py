# SPDX-License-Identifier: Apache-2.0
"""`jaxserve bench serve`: load-tests a server and prints vLLM's result table."""

import asyncio
import json as json_module
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxserve.cli import results_file
from jaxserve.cli.client import DEFAULT_URL, KEY_FILE_HELP, KEY_HELP, Client, ServerError, key_for
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags.setting import Setting

if TYPE_CHECKING:  # it imports aiohttp, which --help does not need
    from jaxserve.cli.load import Job, Sample

# Common words, mostly one token each: prompts for servers without /tokenize.
WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know"
)


@dataclass(frozen=True, kw_only=True)
class BenchServe:
    """Load-test a running server."""

    url: Annotated[str, Setting("URL of the server, with or without /v1.", spellings=("--base-url",))] = DEFAULT_URL
    model: Annotated[str | None, Setting("Model name (default: the first model of the server).")] = None
    api_key: Annotated[str | None, Setting(KEY_HELP)] = field(default=None, repr=False)
    api_key_file: Annotated[str | None, Setting(KEY_FILE_HELP, metavar="FILE")] = None
    endpoint: Annotated[
        Literal["/v1/completions", "/v1/chat/completions"], Setting("Endpoint to send requests to.")
    ] = "/v1/completions"
    dataset_name: Annotated[
        Literal["random"], Setting("Source of prompts: random tokens, so that no two share a prefix.")
    ] = "random"
    num_prompts: Annotated[int, Setting("Number of requests.", low=1)] = 1000
    random_input_len: Annotated[int, Setting("Tokens per prompt.", low=1)] = 1024
    random_output_len: Annotated[int, Setting("Maximum number of tokens to generate per request.", low=1)] = 128
    random_prefix_len: Annotated[int, Setting("Tokens of a common prefix, added to every prompt.", low=0)] = 0
    random_range_ratio: Annotated[
        float, Setting("Vary lengths by up to this fraction in both directions.", low=0, below=1)
    ] = 0.0
    max_concurrency: Annotated[
        int | None, Setting("Maximum number of concurrent requests (default: no limit).", low=1)
    ] = None
    request_rate: Annotated[
        float,
        Setting(
            "Average number of requests per second, sent at random times; inf sends all at once.",
            low=1e-6,
            high=math.inf,
        ),
    ] = math.inf
    ignore_eos: Annotated[bool, Setting("Ignore EOS; always generate the full length.")] = False
    temperature: Annotated[float, Setting("Sampling temperature.", low=0)] = 0.0
    seed: Annotated[int, Setting("Seed for prompts and request times.")] = 0
    num_warmups: Annotated[int, Setting("Number of warmup requests, which are not measured.", low=0)] = 1
    timeout: Annotated[
        float, Setting("Time after which a request counts as failed.", above=0, high=10**9, unit="seconds")
    ] = 24 * 3600.0
    json: Annotated[
        Path | None, Setting("Write the results as JSON to this file; - for standard output, instead of the table.")
    ] = None
    save_result: Annotated[
        bool, Setting("Write the results to a file named after the time and the model, as vLLM does.")
    ] = False
    result_dir: Annotated[Path, Setting("Folder for --save-result.")] = Path()

    def __post_init__(self) -> None:
        results_file.check(self.json)
        if self.save_result and not self.result_dir.is_dir():
            raise UsageError(f"no such folder: {self.result_dir}", "create it, or name another with --result-dir")

    def run(self) -> int:
        from jaxserve.cli import load

        key = key_for(self.url, key=self.api_key, file=self.api_key_file)
        client = Client(self.url, api_key=key)
        model = self.model or client.model()
        jobs = self.jobs(model, _pool(client, model, self.seed))
        shown = _Bar(self.num_prompts)

        async def measured() -> load.Outcome:
            warm = await load.run(client.root, jobs[self.num_prompts :], api_key=key, timeout=self.timeout)
            if warm.samples and all(sample.error for sample in warm.samples):
                hint = "see the server log; prompts that are too long are shortened by --random-input-len"
                raise JaxserveError(f"the first request failed: {warm.samples[0].error}", hint)
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
        results = load.summary(outcome)
        self._report(model, results, [sample.error for sample in outcome.samples if sample.error])
        return 0 if results["completed"] else 1

    def jobs(self, model: str, pool: "Sequence[int] | None") -> "list[Job]":
        """The requests, warmup last; the same seed gives the same requests. Prompts are drawn from the token ids in
        `pool`, or from words if it is None."""
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

    def _report(self, model: str, results: dict[str, float], errors: Sequence[str]) -> None:
        asked = {name: value for name, value in asdict(self).items() if name not in ("api_key", "api_key_file", "json")}
        asked |= {"request_rate": str(self.request_rate) if self.request_rate == math.inf else self.request_rate}
        asked |= {"model_id": model, "date": time.strftime("%Y%m%d-%H%M%S"), "result_dir": str(self.result_dir)}
        result = json_module.dumps({**asked, **results, "errors": list(errors)})
        if str(self.json) == "-":
            print(result)
        else:
            print(table(results, rate=self.request_rate, concurrency=self.max_concurrency))
        for error in list(dict.fromkeys(errors))[:3]:
            print(f"failed: {error}", file=sys.stderr)
        files = [self.json] if self.json is not None and str(self.json) != "-" else list[Path]()
        if self.save_result:
            name = f"openai-{self.request_rate}qps-{model.rpartition('/')[2]}-{asked['date']}.json"
            files.append(self.result_dir / name)
        for file in files:
            file.write_text(result + "\n")


def _pool(client: Client, model: str, seed: int) -> list[int] | None:
    """Ids of plain tokens, from the server's tokenizer; None if it has no /tokenize."""
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
    """The table of `vllm bench serve`."""

    def row(name: str, value: Any) -> str:
        return f"{name:<40} {value:<10}"

    def number(key: str, form: str) -> str:
        return format(int(figures[key]) if form == "d" else figures[key], form)

    lines = [f"{' Serving Benchmark Result ':=^50}"]
    lines += [row(name, number(key, form)) for name, key, form in _ROWS[:2]]
    if concurrency is not None:
        lines.append(row("Maximum request concurrency:", concurrency))
    if rate != math.inf:
        lines.append(row("Request rate configured (RPS):", f"{rate:.2f}"))
    lines += [row(name, number(key, form)) for name, key, form in _ROWS[2:]]
    for title, name in _TIMES:
        lines.append(f"{title:-^50}")
        for label, part in (("Mean", "mean"), ("Median", "median"), ("P99", "p99")):
            lines.append(row(f"{label} {name} (ms):", number(f"{part}_{name.lower()}_ms", ".2f")))
    return "\n".join([*lines, "=" * 50])


class _Bar:
    """A progress bar, on terminals only."""

    def __init__(self, count: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=count, dynamic_ncols=True) if sys.stderr.isatty() else None

    def add(self, sample: "Sample") -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
