# SPDX-License-Identifier: Apache-2.0
"""Load-tests any OpenAI-compatible server: `python -m benchmarks.serving --url URL [--json FILE]`.

    --concurrency 1,8,32   closed loop: this many requests at once, the next one when one ends
    --rate 2,8             open loop: this many per second at random times (Poisson), however slow the server is
    --mix                  fixed (all lengths equal), sharegpt (lengths like those of real chats), shared (16 prompts
                           each share a prefix of 94 % of their length, as with a long system prompt)

The same seed asks every server for the same work. Prompts are words, so that all routes and tokenizers accept them.
Results per load: output tokens per second; time to first token (TTFT), time per output token after it (TPOT), gaps
between events (ITL) and total time (E2E), each at p50, p90 and p99; failures; and goodput, the requests per second that
met both deadlines. By default the model may end an answer after few tokens: use --ignore-eos to compare speeds.
"""

import argparse
import asyncio
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import arguments, facts
from jaxserve.cli import load
from jaxserve.cli.bench_serve import WORDS
from jaxserve.cli.load import Job, Outcome, Sample

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# The shared mix: how many prompts share a prefix, and what share of their length. These are the proportions of a common
# benchmark of prefix caching: system prompts of 2048 tokens, each with 16 questions of 128 tokens.
GROUP, SHARED = 16, 0.94
# In real chats lengths are roughly log-normal, answers are longer than questions, and some are far longer.
SPREAD = {"prompt": 1.2, "new": 0.9}


@dataclass(frozen=True, kw_only=True)
class Work:
    """The requests of a load. Lengths are words per prompt and tokens per answer; medians if they vary."""

    mix: str = "fixed"
    prompt: int = 128
    new: int = 64
    longest: int = 1024  # limit for both
    seed: int = 0
    words: tuple[str, ...] = tuple(WORDS.split())


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server, and how requests are sent to it."""

    url: str
    model: str
    path: str = COMPLETIONS
    extra: tuple[tuple[str, Any], ...] = ()  # further fields of every body
    api_key: str | None = None
    keep_alive: bool = True  # False: a new connection per request
    timeout: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """Service-level objectives: a request counts for goodput if it meets both."""

    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0


MIXES = ("fixed", "sharegpt", "shared")


def prompts(work: Work, count: int) -> list[tuple[str, int]]:
    """`count` texts, each with the length of its answer."""
    draw = random.Random(f"{work.mix} {work.seed}")

    def text(length: int) -> list[str]:
        return draw.choices(work.words, k=length)

    def near(median: int, spread: float) -> int:
        return max(1, min(work.longest, round(median * math.exp(draw.gauss(0, spread)))))

    made: list[tuple[str, int]] = []
    prefix: list[str] = []
    for place in range(count):
        match work.mix:
            case "fixed":
                words, new = text(work.prompt), work.new
            case "sharegpt":
                words, new = text(near(work.prompt, SPREAD["prompt"])), near(work.new, SPREAD["new"])
            case "shared":
                if place % GROUP == 0:
                    prefix = text(round(SHARED * work.prompt))
                words, new = [*prefix, *text(work.prompt - len(prefix))], work.new
            case _:
                raise SystemExit(f"error: unknown mix {work.mix!r}  hint: one of {', '.join(MIXES)}")
        made.append((" ".join(words), new))
    return made


def jobs(target: Target, work: Work, count: int) -> list[Job]:
    made: list[Job] = []
    for text, new in prompts(work, count):
        asked: dict[str, Any] = {"prompt": text}
        if target.path == CHAT:
            asked = {"messages": [{"role": "user", "content": text}]}
        body = {**asked, "model": target.model, "max_tokens": new, "temperature": 0, **dict(target.extra)}
        made.append(Job(target.path, body, len(text.split())))
    return made


def run(target: Target, work: list[Job], *, concurrency: int | None = None, rate: float = math.inf) -> Outcome:
    options = dict[str, Any](api_key=target.api_key, keep_alive=target.keep_alive, timeout=target.timeout)
    return asyncio.run(load.run(target.url, work, concurrency=concurrency, rate=rate, **options))


def figures(outcome: Outcome, deadlines: Objectives) -> dict[str, float]:
    found = load.summary(outcome)
    met = sum(1 for sample in outcome.samples if _met(sample, deadlines))
    return found | {"goodput": met / max(outcome.seconds, 1e-9)}


def _met(sample: Sample, deadlines: Objectives) -> bool:
    if sample.error is not None or not sample.stamps or sample.ttft * 1000 > deadlines.ttft_ms:
        return False
    return sample.output_tokens < 2 or sample.tpot * 1000 <= deadlines.tpot_ms


def table(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """A line for each load."""
    parts = ("ttft", "tpot", "itl", "e2el")
    heads = "".join(f"{name.upper().replace('E2EL', 'E2E') + ' p50/p90/p99':>26}" for name in parts)
    lines = [f"{'load':>14} {'tok/s':>8} {'req/s':>7} {'good/s':>7} {'failed':>6}{heads}  (ms)"]
    for name, one in rows:
        times = "".join(
            f"{one[f'median_{part}_ms']:>12.1f}{one[f'p90_{part}_ms']:>7.0f}{one[f'p99_{part}_ms']:>7.0f}"
            if one["completed"]
            else f"{'-':>12}{'-':>7}{'-':>7}"
            for part in parts
        )
        lines.append(
            f"{name:>14} {one['output_throughput']:>8.0f} {one['request_throughput']:>7.2f} {one['goodput']:>7.2f} "
            f"{int(one['failed']):>6}{times}"
        )
    return "\n".join(lines)


def faults(outcome: Outcome) -> dict[str, int]:
    """Why requests failed and how many of them, most frequent first."""
    reasons = Counter(sample.error or "an answer without a token" for sample in outcome.samples if _failed(sample))
    return dict(reasons.most_common())


def _failed(sample: Sample) -> bool:
    return sample.error is not None or not sample.stamps


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=_Help,
    )
    counts, rates = arguments.some(arguments.whole), arguments.several(arguments.positive)
    parser.add_argument("--url", type=arguments.url, default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--model", default="", help="model name (default: the first of the server)")
    parser.add_argument("--path", default=COMPLETIONS, choices=(COMPLETIONS, CHAT), help="endpoint to send requests to")
    parser.add_argument("--mix", default="fixed", choices=MIXES, help="how lengths and prefixes vary (see above)")
    parser.add_argument("--prompt", type=arguments.whole, default=Work.prompt, help="words per prompt, or their median")
    parser.add_argument("--new", type=arguments.whole, default=Work.new, help="tokens per answer, or their median")
    parser.add_argument("--concurrency", type=counts, default="1,8,32", help="requests at once; one load per number")
    parser.add_argument("--rate", type=rates, default="", help="requests per second, instead of --concurrency")
    parser.add_argument(
        "--requests", type=arguments.whole_or_none, default=0, help="per load; 0: four times the concurrency"
    )
    parser.add_argument("--seed", type=arguments.whole_or_none, default=0, help="seed of prompts, lengths and times")
    parser.add_argument(
        "--ttft-ms", type=arguments.positive, default=Objectives.ttft_ms, help="TTFT deadline for goodput"
    )
    parser.add_argument(
        "--tpot-ms", type=arguments.positive, default=Objectives.tpot_ms, help="TPOT deadline for goodput"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="always generate the full length")
    parser.add_argument("--no-keep-alive", action="store_true", help="a new connection per request")
    parser.add_argument(
        "--timeout", type=arguments.positive, default=600.0, help="seconds after which a request counts as failed"
    )
    parser.add_argument("--api-key", help="API key of the server")
    parser.add_argument("--json", type=arguments.file_to_write, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    extra = (("ignore_eos", True),) if options.ignore_eos else ()
    model = options.model or model_of(options.url, options.api_key)
    target = Target(
        url=options.url,
        model=model,
        path=options.path,
        extra=extra,
        api_key=options.api_key,
        keep_alive=not options.no_keep_alive,
        timeout=options.timeout,
    )
    deadlines = Objectives(ttft_ms=options.ttft_ms, tpot_ms=options.tpot_ms)
    loads: list[tuple[str, int | None, float]] = [(f"{rate:g}/s", None, rate) for rate in options.rate] or [
        (f"{count} at once", count, math.inf) for count in options.concurrency
    ]
    rows: list[tuple[str, dict[str, float]]] = []
    failed: dict[str, dict[str, int]] = {}
    for place, (name, concurrency, rate) in enumerate(loads):
        count = options.requests or 4 * (concurrency or 16)
        # Another seed for each load, so that no prompt is cached from an earlier one.
        work = Work(mix=options.mix, prompt=options.prompt, new=options.new, seed=options.seed * 1000 + place)
        outcome = run(target, jobs(target, work, count), concurrency=concurrency, rate=rate)
        rows.append((name, figures(outcome, deadlines)))
        failed[name] = faults(outcome)
    print(table(rows))
    for name, reasons in failed.items():
        for problem, count in list(reasons.items())[:3]:
            print(f"{name}: {count} failed: {problem}", file=sys.stderr)
    if options.json:
        content = facts.collect() | {"processor": facts.processor(), "settings": {**vars(options), "api_key": None}}
        content["settings"]["json"] = str(options.json)
        options.json.write_text(json.dumps(content | {"loads": dict(rows), "failures": failed}, indent=1) + "\n")
    if not any(one["completed"] for _, one in rows):
        sys.exit("error: no request succeeded")


def model_of(url: str, api_key: str | None) -> str:
    from jaxserve.cli.client import Client
    from jaxserve.errors import JaxserveError

    try:
        return Client(url, api_key=api_key).model()
    except JaxserveError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
