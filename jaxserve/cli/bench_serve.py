# SPDX-License-Identifier: Apache-2.0
"""`jaxserve bench serve`: load-tests a server and prints vLLM's result table."""

import asyncio
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from jaxserve.cli import bench_datasets, results_file
from jaxserve.cli.bench_datasets import Length, Prompt, TokenSource
from jaxserve.cli.client import DEFAULT_URL, KEY_FILE_HELP, KEY_HELP, URL_HELP, Client, ServerError, key_for
from jaxserve.errors import JaxserveError, UsageError, one_line
from jaxserve.flags.setting import Setting

if TYPE_CHECKING:  # it imports aiohttp, which --help does not need
    from jaxserve.cli.load import Job, Sample

CHAT = "/v1/chat/completions"
LIMITED = (
    "the server limits the rate of this API key: lower --request-rate or --max-concurrency, or use a key with higher "
    "limits"
)
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

    url: Annotated[str, Setting(URL_HELP, spellings=("--base-url",))] = DEFAULT_URL
    host: Annotated[str | None, Setting("Host of the server, instead of --url.")] = None
    port: Annotated[int | None, Setting("Port of the server, instead of --url.", low=1, high=65535)] = None
    backend: Annotated[
        Literal["openai", "vllm", "openai-chat"] | None,
        Setting("Kind of server, as vLLM's benchmark names it: openai and vllm send completions, openai-chat chats."),
    ] = None
    model: Annotated[str | None, Setting("Model name (default: the first model of the server).")] = None
    api_key: Annotated[str | None, Setting(KEY_HELP)] = field(default=None, repr=False)
    api_key_file: Annotated[str | None, Setting(KEY_FILE_HELP, metavar="FILE")] = None
    endpoint: Annotated[
        Literal["/v1/completions", "/v1/chat/completions"] | None,
        Setting("Endpoint to send requests to (default: that of --backend, or /v1/completions)."),
    ] = None
    dataset_name: Annotated[
        Literal["random", "sharegpt", "prefix_repetition", "custom"],
        Setting(
            "Source of prompts: random tokens; conversations of the ShareGPT file at --dataset-path, or without one "
            "random tokens with lengths like theirs; random tokens with shared prefixes; or the JSONL file at "
            '--dataset-path, with {"prompt": "..."} on each line.'
        ),
    ] = "random"
    dataset_path: Annotated[Path | None, Setting("File of prompts, for sharegpt and custom.")] = None
    num_prompts: Annotated[int, Setting("Number of requests.", low=1)] = 1000
    random_input_len: Annotated[int, Setting("Tokens per prompt.", low=1)] = 1024
    random_output_len: Annotated[int, Setting("Maximum number of tokens to generate per request.", low=1)] = 128
    random_prefix_len: Annotated[int, Setting("Tokens of a common prefix, added to every prompt.", low=0)] = 0
    random_range_ratio: Annotated[
        float, Setting("Vary lengths by up to this fraction in both directions.", low=0, below=1)
    ] = 0.0
    sharegpt_output_len: Annotated[
        int | None, Setting("Maximum number of tokens to generate (default: the length of each answer).", low=1)
    ] = None
    prefix_repetition_num_prefixes: Annotated[int, Setting("Number of shared prefixes.", low=1)] = 10
    prefix_repetition_prefix_len: Annotated[int, Setting("Tokens of each shared prefix.", low=1)] = 256
    prefix_repetition_suffix_len: Annotated[int, Setting("Tokens after the shared prefix.", low=1)] = 256
    prefix_repetition_output_len: Annotated[
        int, Setting("Maximum number of tokens to generate per prompt with a shared prefix.", low=1)
    ] = 128
    custom_output_len: Annotated[
        int,
        Setting("Maximum number of tokens to generate per line of the file; -1: the line's output_tokens.", low=-1),
    ] = 256
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
    burstiness: Annotated[
        float,
        Setting(
            "With --request-rate: 1 sends at the times of a Poisson process, less in bursts, more at even intervals.",
            above=0,
        ),
    ] = 1.0
    goodput: Annotated[
        tuple[str, ...],
        Setting(
            "Also report requests per second that keep these limits in milliseconds, such as ttft:200 tpot:50; "
            "e2el is the whole request.",
            metavar="NAME:MS",
        ),
    ] = ()
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
        self._check_server()
        if self.save_result and not self.result_dir.is_dir():
            raise UsageError(f"no such folder: {self.result_dir}", "create it, or name another with --result-dir")
        limits(self.goodput)
        if self.dataset_name == "custom" and self.dataset_path is None:
            raise UsageError("--dataset-name custom needs --dataset-path", "name a JSONL file of prompts")
        if self.dataset_name in ("random", "prefix_repetition") and self.dataset_path is not None:
            hint = "add --dataset-name custom for a JSONL file of prompts, or remove --dataset-path"
            raise UsageError(f"--dataset-name {self.dataset_name} reads no file", hint)
        if self.burstiness not in (0, 1) and self.request_rate == math.inf:
            raise UsageError("--burstiness has no effect without --request-rate", "set --request-rate")
        if self.custom_output_len == 0:
            raise UsageError("--custom-output-len is 0", "use a whole number of at least 1, or -1")

    def _check_server(self) -> None:
        if (self.host is not None or self.port is not None) and self.url != DEFAULT_URL:
            raise UsageError("--host or --port is set together with --url", "set --url alone, or remove it")
        if None not in (self.backend, self.endpoint) and (self.endpoint == CHAT) != (self.backend == "openai-chat"):
            raise UsageError(f"--backend {self.backend} does not use {self.endpoint}", "remove one of them")

    @property
    def address(self) -> str:
        """The server's URL."""
        if self.host is None and self.port is None:
            return self.url
        host = self.host or "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port or 8000}"

    @property
    def path(self) -> str:
        """The endpoint."""
        return self.endpoint or (CHAT if self.backend == "openai-chat" else "/v1/completions")

    def run(self) -> int:
        from jaxserve.cli import load

        key = key_for(self.address, key=self.api_key, file=self.api_key_file)
        client = Client(self.address, api_key=key)
        model = self.model or client.model()
        jobs = self.jobs(model, _pool(client, model), _length(client, model))
        shown = _Bar(self.num_prompts)

        async def measured() -> load.Outcome:
            warm = await load.run(
                client.root, jobs[self.num_prompts :], api_key=key, socket=client.socket, timeout=self.timeout
            )
            if warm.samples and all(sample.error for sample in warm.samples):
                limited = _limited([sample.error or "" for sample in warm.samples])
                usual = "see the server log; prompts that are too long are shortened by --random-input-len"
                hint = LIMITED if limited else usual
                raise JaxserveError(f"the first request failed: {warm.samples[0].error}", hint)
            return await load.run(
                client.root,
                jobs[: self.num_prompts],
                concurrency=self.max_concurrency,
                rate=self.request_rate,
                burstiness=self.burstiness,
                seed=self.seed,
                api_key=key,
                socket=client.socket,
                timeout=self.timeout,
                done=shown.add,
            )

        outcome = asyncio.run(measured())
        shown.close()
        results = load.summary(outcome, limits(self.goodput))
        self._report(model, results, [sample.error for sample in outcome.samples if sample.error])
        return 0 if results["completed"] else 1

    def jobs(self, model: str, pool: Sequence[int] | None, length: Length | None = None) -> "list[Job]":
        """The requests, warmup last; the same seed gives the same requests. Prompts are drawn from the token ids in
        `pool`, or from words if it is None. `length`: how many tokens a text of a file has."""
        from jaxserve.cli.load import Job

        chat = self.path == CHAT
        jobs = list[Job]()
        for prompt in self._prompts(None if chat else pool, length or _words):
            asked = {"prompt": prompt.content}
            if chat:
                asked = {"messages": [{"role": "user", "content": prompt.content}]}
            body: dict[str, Any] = {**asked, "model": model, "max_tokens": prompt.output}
            body |= {"temperature": self.temperature, **({"ignore_eos": True} if self.ignore_eos else {})}
            jobs.append(Job(self.path, body, prompt.tokens))
        return jobs

    def _prompts(self, pool: Sequence[int] | None, length: Length) -> list[Prompt]:
        count, draw = self.num_prompts + self.num_warmups, random.Random(self.seed)
        source = bench_datasets.TokenSource(draw, pool, WORDS.split())
        output = self.sharegpt_output_len
        match self.dataset_name:
            case "random":
                return self._random(source, count)
            case "sharegpt" if self.dataset_path is None:
                return list(islice(bench_datasets.sharegpt_like(source, output=output), count))
            case "sharegpt":
                path = cast(Path, self.dataset_path)
                return bench_datasets.sharegpt(path, draw, count, output=output, length=length)
            case "prefix_repetition":
                return bench_datasets.prefix_repetition(
                    source,
                    count,
                    prefixes=self.prefix_repetition_num_prefixes,
                    prefix=self.prefix_repetition_prefix_len,
                    suffix=self.prefix_repetition_suffix_len,
                    output=self.prefix_repetition_output_len,
                )
            case "custom":
                path = cast(Path, self.dataset_path)
                return bench_datasets.custom(path, draw, count, output=self.custom_output_len, length=length)

    def _random(self, source: TokenSource, count: int) -> list[Prompt]:
        def length(usual: int) -> int:
            low, high = usual * (1 - self.random_range_ratio), usual * (1 + self.random_range_ratio)
            return max(1, source.draw.randint(int(low), -int(-high // 1)))

        prefix, made = source.tokens(self.random_prefix_len), list[Prompt]()
        for _ in range(count):
            tokens = [*prefix, *source.tokens(length(self.random_input_len))]
            made.append(source.prompt(tokens, length(self.random_output_len)))
        return made

    def _report(self, model: str, results: dict[str, float], errors: Sequence[str]) -> None:
        asked = {name: value for name, value in asdict(self).items() if name not in ("api_key", "api_key_file", "json")}
        asked |= {"request_rate": str(self.request_rate) if self.request_rate == math.inf else self.request_rate}
        asked |= {"dataset_path": None if self.dataset_path is None else str(self.dataset_path)}
        asked |= {"url": self.address, "endpoint": self.path, "backend": self.backend or "openai"}
        asked |= {"model_id": model, "date": time.strftime("%Y%m%d-%H%M%S"), "result_dir": str(self.result_dir)}
        result = results_file.text_of({**asked, **results, "errors": list(errors)})
        if str(self.json) == "-":
            print(result)
        else:
            print(table(results, rate=self.request_rate, concurrency=self.max_concurrency))
        for error in list(dict.fromkeys(errors))[:3]:
            print(f"failed: {error}", file=sys.stderr)
        if _limited(errors):
            print(f"hint: {LIMITED}", file=sys.stderr)
        files = [self.json] if self.json is not None and str(self.json) != "-" else list[Path]()
        if self.save_result:
            name = f"{asked['backend']}-{self.request_rate}qps-{model.rpartition('/')[2]}-{asked['date']}.json"
            files.append(self.result_dir / name)
        for file in files:
            file.write_text(result + "\n")


def limits(goodput: Sequence[str]) -> dict[str, float]:
    """The limits of --goodput in seconds, by name of the time."""
    found: dict[str, float] = {}
    for text in goodput:
        name, _, value = text.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise UsageError(f"--goodput has {one_line(text)!r}", "use ttft:MS, tpot:MS or e2el:MS, such as ttft:200")
        if name in found:
            raise UsageError(f"--goodput has {name} twice", "remove one of them")
        try:
            found[name] = float(value) / 1000
        except ValueError:
            found[name] = math.nan
        if not found[name] >= 0:
            raise UsageError(f"--goodput has {one_line(text)!r}", f"give {name} a number of milliseconds")
    return found


def _limited(errors: Sequence[str]) -> bool:
    """Whether the server refused requests because of a rate limit."""
    return any(error.startswith("429") for error in errors)


def _words(text: str) -> int:
    """Roughly the number of tokens."""
    return max(1, round(1.3 * len(text.split())))


def _length(client: Client, model: str) -> Length:
    """The number of tokens of a text, by the server's tokenizer, or else roughly."""

    def length(text: str) -> int:
        try:
            return int(client.post("/tokenize", {"model": model, "prompt": text})["count"])
        except (ServerError, KeyError, TypeError, ValueError):
            return _words(text)

    return length


def _pool(client: Client, model: str) -> list[int] | None:
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
    ("Request goodput (req/s):", "request_goodput", ".2f"),
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
    for name, key, form in _ROWS[2:]:
        if key in figures:
            lines.append(row(name, number(key, form)))
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
