# SPDX-License-Identifier: Apache-2.0
"""Compares jaxserve with other servers: `python -m benchmarks.compare --servers jaxserve,vllm=VENV,...`.

All servers run on this machine at the same time, serve one model (`--model`: demo, 110m, or a folder) and get the same
chats over HTTP. Each runs in its default precision, or in the one that follows its name, as in `jaxserve:int8`,
`vllm:float32=VENV` and `llamacpp:q8_0=VENV`; peers/servers.py lists them, starts the servers and says what their
environments need. They take turns: in each round every load goes to one server after another, and the first server
changes from round to round, so that other work on the machine affects all of them alike. Answers have their full
length: the end of a sequence is ignored.

The results are medians over the rounds with their spread, and for each peer the median and range of the ratios round
by round. After Ctrl-C, or if a server dies, the results cover the finished rounds. Before timing, greedy answers are
compared with those of the first server. Between servers in float32 the share of identical answers shows that they
compute the same; below float32 they round differently and their answers part, so what a setting costs in quality is
shown by the perplexity of one text (quality.py), where a server can compute it. `--out NAME` writes NAME.json, NAME.md
and NAME.svg.

report_servers.py has the targets.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import arguments, facts, offline, plot, quality, serving, words
from benchmarks.peers.commands import missing
from benchmarks.peers.servers import ComparedServer
from benchmarks.quality import Passages
from benchmarks.serving import Objectives, Work
from jaxserve import demo
from jaxserve.cli.client import Client, ServerError

MODELS = ("demo", "110m")
CHUNKS = 32  # of the text whose perplexity is computed


@dataclass(frozen=True, kw_only=True)
class ServerResult:
    """One server under one load."""

    server: str
    streams: int
    tokens_per_second: float  # medians over the rounds
    spread: float | None  # interquartile range; None for a single round
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    failed: int
    speeds: tuple[float, ...] = ()  # tokens per second of each round, so that any two servers can be compared
    ttfts_ms: tuple[float, ...] = ()
    speedup: float | None = None  # the first server's tokens per second divided by this one's, median of the rounds
    speedups: tuple[float, float] | None = None  # their range
    ttft_ratio: float | None = None  # this one's TTFT divided by the first server's: above 1, this one is slower


def named(text: str) -> dict[str, Path | None]:
    """Servers by name, with the environments of those that need one."""
    found: dict[str, Path | None] = {}
    for part in arguments.some(str)(text):
        name, _, venv = part.partition("=")
        if name in found:
            raise argparse.ArgumentTypeError(f"{name} is named twice")
        found[name] = Path(venv).resolve() if venv else None
        if problem := missing(name, found[name]):
            raise argparse.ArgumentTypeError(problem)
    return found


def model_folder(name: str, place: Path) -> Path:
    if name == "demo":
        return demo.FOLDER
    if name != "110m":
        folder = Path(name).resolve()
        if not (folder / "config.json").is_file():
            raise SystemExit(f"error: {name} holds no model  hint: use {', '.join(MODELS)} or a model's folder")
        return folder
    shape = offline.LlamaShape()
    folder = offline.make_checkpoint(place / "llama-110m", shape, seed=0)
    words.write_tokenizer(folder, shape.vocab)
    return folder


def agreement(servers: Sequence[Any], work: Work, count: int) -> dict[str, float]:
    """The share of each server's greedy answers that are identical to the first server's."""
    answers = {one.name: one.answers(work, count) for one in servers}
    first = answers[servers[0].name]
    return {
        name: statistics.mean(a == b for a, b in zip(first, theirs, strict=True)) for name, theirs in answers.items()
    }


type Round = dict[tuple[str, int], dict[str, float]]  # by server and number of streams


class Died(Exception):
    """A server died."""


def measure(servers: Sequence[Any], work: Work, *, streams: Sequence[int], rounds: int, each: int) -> Generator[Round]:
    """Yields the figures of each round; `each`: requests per stream and round."""
    for turn in range(rounds + 1):
        found: Round = {}
        for place, count in enumerate(streams):
            seed = work.seed + 1 + turn * len(streams) + place  # no prompt is ever repeated
            asked = Work(**{**asdict(work), "seed": seed, "words": work.words})
            start = (turn + place) % len(servers)
            for server in [*servers[start:], *servers[:start]]:
                found[server.name, count] = server.load(asked, count * each, count)
        if turn:  # the first warms up
            yield found


def rows_of(rounds: Sequence[Round], names: Sequence[str], streams: Sequence[int]) -> list[ServerResult]:
    """The results of all servers, compared with the first."""
    return [_row(name, names[0], count, rounds) for count in streams for name in names]


def _row(name: str, first: str, count: int, rounds: Sequence[Round]) -> ServerResult:
    own, ours = [one[name, count] for one in rounds], [one[first, count] for one in rounds]

    def median(key: str) -> float:
        return statistics.median(one[key] for one in own)

    def ratios(key: str, above: list[dict[str, float]], below: list[dict[str, float]]) -> list[float]:
        pairs = [(a[key], b[key]) for a, b in zip(above, below, strict=True)]
        return sorted(a / b for a, b in pairs) if name != first and all(b for _, b in pairs) else []

    speeds = sorted(one["output_throughput"] for one in own)
    faster, later = ratios("output_throughput", ours, own), ratios("median_ttft_ms", own, ours)
    return ServerResult(
        server=name,
        streams=count,
        tokens_per_second=median("output_throughput"),
        spread=speeds[len(speeds) * 3 // 4] - speeds[len(speeds) // 4] if len(speeds) > 1 else None,
        ttft_p50_ms=median("median_ttft_ms"),
        ttft_p99_ms=median("p99_ttft_ms"),
        tpot_p50_ms=median("median_tpot_ms"),
        failed=int(sum(one["failed"] for one in own)),
        speeds=tuple(one["output_throughput"] for one in own),
        ttfts_ms=tuple(one["median_ttft_ms"] for one in own),
        speedup=statistics.median(faster) if faster else None,
        speedups=(faster[0], faster[-1]) if len(faster) > 1 else None,
        ttft_ratio=statistics.median(later) if later else None,
    )


class TimedServer(ComparedServer):
    """A server that answers, and that can be timed."""

    def answers(self, work: Work, count: int) -> list[str]:
        client = Client(self.target.url)
        bodies = [job.body for job in serving.jobs(self.target, work, count)]
        try:
            answers = [client.post(self.target.path, body)["choices"][0]["message"]["content"] for body in bodies]
        except ServerError as error:
            raise SystemExit(f"error: {self.name}: {error}; its log ends: {self.last_words()}") from None
        return [
            answer.strip() for answer in answers
        ]  # servers differ in whether a space after the prompt is part of the answer

    def load(self, work: Work, count: int, streams: int) -> dict[str, float]:
        target = replace(self.target, extra=self.started.full_length)
        outcome = serving.run(target, serving.jobs(target, work, count), concurrency=streams)
        if self.process.poll() is not None:
            raise Died(f"{self.name} died; its log ends: {self.last_words()}")
        return serving.figures(outcome, Objectives())

    def perplexity(self, those: Passages, folder: Path) -> float | None:
        """The perplexity of these passages; None if this server has no way to compute it."""
        if self.started.perplexity:
            return quality.by_command(self.started.perplexity, those, folder)
        if not self.started.prompt_logprobs:
            return None
        try:
            return quality.by_route(self.target, those)
        except ServerError as error:
            raise SystemExit(f"error: {self.name}: {error}; its log ends: {self.last_words()}") from None


def markdown(rows: Sequence[ServerResult]) -> str:
    first = rows[0].server
    lines = [
        f"| streams | server | output tok/s | spread | TTFT p50 | p99 | TPOT p50 | failed | {first} is "
        f"| its TTFT as a multiple of {first}'s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ends = "" if row.speedups is None else " ({:.2f} to {:.2f})".format(*row.speedups)
        speedup = "" if row.speedup is None else f"{row.speedup:.2f} x as fast{ends}"
        spread = "" if row.spread is None else f"{row.spread:.0f}"
        later = "" if row.ttft_ratio is None else f"{row.ttft_ratio:.2f}"
        times = f"{row.ttft_p50_ms:.1f} ms | {row.ttft_p99_ms:.1f} ms | {row.tpot_p50_ms:.2f} ms"
        lines.append(
            f"| {row.streams} | {row.server} | {row.tokens_per_second:.0f} | {spread} | {times} "
            f"| {row.failed} | {speedup} | {later} |"
        )
    return "\n".join(lines)


def quality_lines(runs: Mapping[str, str], perplexities: Mapping[str, float | None]) -> str:
    lines = ["| server | runs with | perplexity |", "|---|---|---|"]
    for name, how in runs.items():
        found = perplexities.get(name)
        lines.append(f"| {name} | {how} | {'-' if found is None else f'{found:.3f}'} |")
    return "\n".join(lines)


@dataclass(kw_only=True)
class Comparison:
    """What a run has found so far."""

    runs: dict[str, str]  # by server: the setting that it runs with
    same: dict[str, float]
    perplexities: dict[str, float | None]
    rounds: list[Round]
    ended: str | int = 0


def compare(options: argparse.Namespace, folder: Path) -> Comparison:
    """Starts the servers, asks them everything and stops them."""
    work = Work(mix=options.mix, prompt=options.prompt, new=options.new, longest=512)
    found = Comparison(runs={}, same={}, perplexities={}, rounds=[])
    model = model_folder(options.model, folder)
    # The weights of 110m are random: it predicts no text.
    chunks = 0 if options.model == "110m" else options.quality_chunks
    those = quality.passages(model, chunks, options.text) if chunks else None
    servers: list[TimedServer] = []
    try:
        for name, place in options.servers.items():
            servers.append(
                TimedServer(name, model, longest=options.max_model_len, venv=place, log=folder / f"{name}.log")
            )
            found.runs[name] = servers[-1].started.runs
            print(f"{name}: up after {servers[-1].start_seconds:.1f} s", flush=True)
        found.same = agreement(servers, work, 8)
        if those:
            found.perplexities = {server.name: server.perplexity(those, folder) for server in servers}
        for one in measure(servers, work, streams=options.streams, rounds=options.rounds, each=options.each):
            found.rounds.append(one)
    except KeyboardInterrupt:
        found.ended = 130
    except Died as died:
        found.ended = f"error: {died}"
    finally:
        for server in servers:
            server.close()
    return found


def write(out: Path, options: argparse.Namespace, found: Comparison, rows: Sequence[ServerResult], text: str) -> None:
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "servers", "text")}
    settings |= {"servers": list(options.servers), "rounds": len(found.rounds), "runs": found.runs}
    # Without the machine's paths.
    settings |= {"model": Path(options.model).name, "text": options.text.name if options.text else None}
    content: dict[str, Any] = facts.collect() | {"processor": facts.processor()}
    content |= {"settings": settings, "same": found.same, "perplexity": found.perplexities}
    content["rows"] = [asdict(row) for row in rows]
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    out.with_suffix(".md").write_text(text + "\n")
    groups = {f"{count} at once": [row for row in rows if row.streams == count] for count in {r.streams for r in rows}}
    bars = {name: {row.server: row.tokens_per_second for row in group} for name, group in groups.items()}
    out.with_suffix(".svg").write_text(plot.bars(bars, "output tokens per second"))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Compare jaxserve with other servers of the same model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    whole = arguments.whole
    parser.add_argument(
        "--servers",
        type=named,
        default="jaxserve,jaxserve-uncached",
        help="comma-separated names, with settings as NAME:SETTING; a peer as NAME=VENV or NAME:SETTING=VENV",
    )
    parser.add_argument("--model", default="demo", help=f"{', '.join(MODELS)} or a folder")
    parser.add_argument("--mix", default="fixed", choices=serving.MIXES, help="as for benchmarks.serving")
    parser.add_argument("--streams", type=arguments.some(whole), default="1,8,32", help="chats at once")
    parser.add_argument("--prompt", type=whole, default=64, help="words per prompt, or their median")
    parser.add_argument("--new", type=whole, default=64, help="tokens per answer, or their median")
    parser.add_argument("--max-model-len", type=whole, default=1024, help="context length of the servers")
    parser.add_argument("--each", type=whole, default=2, help="requests per stream and round")
    parser.add_argument("--rounds", type=whole, default=3, help="timed rounds, after a warm-up")
    parser.add_argument(
        "--quality-chunks",
        type=arguments.whole_or_none,
        default=CHUNKS,
        help=f"chunks of {quality.CHUNK} tokens whose perplexity is computed; 0 for none",
    )
    parser.add_argument("--text", type=Path, help="file with the text for the perplexity (default: Python's reference)")
    parser.add_argument("--out", type=arguments.file_to_write, metavar="NAME", help="write NAME.json, .md and .svg")
    options = parser.parse_args()
    if options.text and not options.text.is_file():
        parser.error(f"argument --text: there is no file {options.text}")
    if options.quality_chunks and options.max_model_len <= quality.CHUNK:
        parser.error(
            f"argument --max-model-len: the perplexity needs more than {quality.CHUNK} tokens; "
            "raise it or set --quality-chunks 0"
        )
    return options


def main() -> None:
    options = read_options()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(options, Path(folder))
    if not found.rounds:
        raise SystemExit(found.ended)
    if found.ended:
        print(f"{len(found.rounds)} of {options.rounds} rounds were finished")
    names = list(options.servers)
    rows = rows_of(found.rounds, names, options.streams)
    agreed = f"greedy answers identical to those of {names[0]}: "
    agreed += ", ".join(f"{name} {share:.0%}" for name, share in found.same.items() if name != names[0])
    text = "\n\n".join([markdown(rows), quality_lines(found.runs, found.perplexities), agreed])
    print(facts.processor(), text, sep="\n")
    if options.out:
        write(options.out, options, found, rows, text)
    raise SystemExit(found.ended)


if __name__ == "__main__":
    main()
