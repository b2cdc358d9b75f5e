# SPDX-License-Identifier: Apache-2.0
"""Measures continuous batching and KV memory: `python -m benchmarks.batching --peer PYTHON [--out NAME]`.

    chats    N requests at once, N = 1 ... 256, with prompt and answer lengths like those of real chats
    offline  1000 requests of about 100 tokens
    memory   KV memory in blocks against reserving the maximum length (kv_memory.py); needs no peer

The first two run in jaxserve's LLM in this process, and in transformers' `generate` in the Python that --peer names,
which needs torch and transformers (without --peer, only jaxserve is timed). transformers runs the requests one at a
time, and in static batches of 16 in order of arrival, padded to the longest prompt and run to the longest answer.
All generate greedily in float32 and ignore end tokens; only requested tokens count. Loading and compilation are not
timed. The three take turns in each round; the results are medians, interquartile ranges, and the median of the rounds'
ratios. Because transformers may take long, its turn ends after --seconds, when the current request or batch is done;
the results say how many requests were timed. The requests are in random order, and the first ones are timed.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks import arguments, compare, facts, kv_memory, offline
from benchmarks.batching_requests import FULL, LONGEST, TINY, Asked, Scale, chats, even
from jaxserve import LLM, SamplingParams

PARTS = ("chats", "offline", "memory")
SIDES = {"sequential": 1, "static": 16}  # requests in a batch, of transformers
LEAST = 16  # the fewest requests in a turn: a turn with fewer at once runs several batches
_PEER = Path(__file__).parent / "peers" / "transformers_generate.py"


@dataclass(frozen=True)
class Generated:
    """What one side generated, for the requests that it completed."""

    seconds: float
    tokens: list[list[int]]

    @property
    def speed(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


@dataclass(frozen=True)
class Peer:
    """transformers with one way of batching, compared with jaxserve."""

    tokens_per_second: float
    spread: float
    speedup: float  # jaxserve's tokens per second divided by these
    timed: int  # requests that were timed, the fewest of all rounds
    same: float  # share of answers identical to jaxserve's, token by token


@dataclass(frozen=True)
class BatchingResult:
    load: str
    requests: int  # at once
    asked: int  # requests in a turn
    tokens_per_second: float
    spread: float
    peers: dict[str, Peer] = field(default_factory=dict[str, Peer])


class Theirs(offline.GeneratorProcess):
    """transformers, in a separate process."""

    def batch(self, requests: Sequence[Asked]) -> Generated:
        assert self.process.stdin
        asked = {"prompts": [one.prompt for one in requests], "max_tokens": [one.new for one in requests]}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        content = self._line()
        return Generated(content["seconds"], content["tokens"])


class Jaxserve:
    """jaxserve, in this process."""

    def __init__(self, model: str, sizes: Scale, *, warmup: bool) -> None:
        self._llm = LLM(
            model=model,
            dtype="float32",
            max_model_len=LONGEST,
            max_num_seqs=sizes.rows,
            max_num_batched_tokens=sizes.tokens,
            skip_tokenizer_init=True,
            warmup=warmup,
        )

    def batch(self, requests: Sequence[Asked]) -> Generated:
        prompts = [{"prompt_token_ids": one.prompt} for one in requests]
        params = [SamplingParams(temperature=0, max_tokens=one.new, ignore_eos=True) for one in requests]
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return Generated(seconds, [list(output.outputs[0].token_ids) for output in outputs])


# --- speed ----------------------------------------------------------------------------------------------------------


def in_batches(side: Any, requests: Sequence[Asked], *, size: int, seconds: float = math.inf) -> Generated:
    """Generate for the requests in order until the time is up; at least one batch."""
    spent, tokens = 0.0, list[list[int]]()
    for start in range(0, len(requests), size):
        answer = side.batch(requests[start : start + size])
        spent += answer.seconds
        tokens += answer.tokens
        if spent >= seconds:
            break
    return Generated(spent, tokens)


def measure(
    ours: Any,
    theirs: Any,
    load: str,
    draw: Callable[[int, int], list[Asked]],
    *,
    counts: Sequence[int],
    rounds: int,
    seconds: float,
) -> list[BatchingResult]:
    """`draw` makes requests from a seed and a count; `theirs` is None without a peer."""
    found: dict[int, list[dict[str, Generated]]] = {count: [] for count in counts}
    for turn in range(rounds):
        for place, count in enumerate(counts):
            requests = draw(turn, count * max(1, LEAST // count))
            ways = {"jaxserve": partial(in_batches, ours, requests, size=count)}
            for name, size in SIDES.items():
                if theirs is not None and (size == 1 or count > 1):  # a static batch of one is sequential
                    ways[name] = partial(in_batches, theirs, requests, size=min(size, count), seconds=seconds)
            names = list(ways)
            start = (turn + place) % len(names)
            answers = {name: ways[name]() for name in names[start:] + names[:start]}
            for name, answer in answers.items():
                _check(name, requests, answer)
            assert len(answers["jaxserve"].tokens) == len(requests)
            found[count].append(answers)
    return [_row(load, count, found[count]) for count in counts]


def _check(name: str, requests: Sequence[Asked], answer: Generated) -> None:
    wanted = [one.new for one in requests[: len(answer.tokens)]]
    if [len(tokens) for tokens in answer.tokens] != wanted:
        raise SystemExit(f"error: {name} returned a different number of tokens than requested")


def _row(load: str, count: int, rounds: Sequence[dict[str, Generated]]) -> BatchingResult:
    ours = [answers["jaxserve"] for answers in rounds]
    peers: dict[str, Peer] = {}
    for name in SIDES:
        if name not in rounds[0]:
            continue
        own = [answers[name] for answers in rounds]
        pairs = [pair for a, b in zip(ours, own, strict=True) for pair in zip(a.tokens, b.tokens, strict=False)]
        peers[name] = Peer(
            tokens_per_second=statistics.median(one.speed for one in own),
            spread=_spread([one.speed for one in own]),
            speedup=statistics.median(a.speed / b.speed for a, b in zip(ours, own, strict=True)),
            timed=min(len(one.tokens) for one in own),
            same=statistics.mean(a == b for a, b in pairs),
        )
    speeds = [one.speed for one in ours]
    return BatchingResult(load, count, len(ours[0].tokens), statistics.median(speeds), _spread(speeds), peers)


def _spread(values: Sequence[float]) -> float:
    """The interquartile range."""
    ordered = sorted(values)
    return ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]


def table(rows: Sequence[BatchingResult]) -> str:
    """As Markdown."""
    names = [name for name in SIDES if any(name in row.peers for row in rows)]
    heads = "".join(f" {name} tok/s | spread | timed | same | jaxserve is |" for name in names)
    lines = [f"| load | requests | jaxserve tok/s | spread |{heads}", "|---" * (4 + 5 * len(names)) + "|"]
    for row in rows:
        line = f"| {row.load} | {row.requests} | {row.tokens_per_second:.0f} | {row.spread:.0f} |"
        for name in names:
            peer = row.peers.get(name)
            if peer is None:
                line += " - |" * 5
                continue
            line += f" {peer.tokens_per_second:.0f} | {peer.spread:.0f} | {peer.timed} of {row.asked} |"
            line += f" {peer.same:.0%} | {peer.speedup:.1f} x as fast |"
        lines.append(line)
    return "\n".join(lines)


# --- all of it ------------------------------------------------------------------------------------------------------


def speeds(folder: Path, vocab: int, options: argparse.Namespace, sizes: Scale) -> tuple[list[BatchingResult], Any]:
    """The results of chats and offline, and the peer's versions."""
    theirs = Theirs([options.peer, str(_PEER), str(folder)]) if options.peer else None
    loads: dict[str, tuple[Sequence[int], Callable[[int, int], list[Asked]]]] = {
        "chats": (sizes.counts, lambda seed, count: chats(replace(sizes.chats, seed=seed), vocab, count)),
        "offline": ((sizes.offline,), lambda seed, count: even(sizes, vocab, count, seed=seed)),
    }
    rows: list[BatchingResult] = []
    try:
        ours = Jaxserve(str(folder), sizes, warmup=not options.tiny)
        ahead = [one._replace(new=4) for one in even(sizes, vocab, 32, seed=options.rounds)]
        for side in [ours] if theirs is None else [ours, theirs]:
            side.batch(ahead)  # warms up
        for load, (counts, draw) in loads.items():
            if load in options.parts:
                rows += measure(ours, theirs, load, draw, counts=counts, rounds=options.rounds, seconds=options.seconds)
    finally:
        if theirs is not None:
            theirs.close()
    return rows, theirs and theirs.versions


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batching",
        description="Compare continuous batching and KV memory with transformers' generate.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--peer", type=arguments.python, metavar="PYTHON", help="a Python that has torch and transformers"
    )
    parser.add_argument("--model", default="demo", help=f"{', '.join(compare.MODELS)} or a folder")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to measure")
    parser.add_argument(
        "--requests",
        type=arguments.some(arguments.whole),
        default=",".join(map(str, FULL.counts)),
        help="chats at once",
    )
    parser.add_argument("--rounds", type=arguments.whole, default=3, help="timed rounds")
    parser.add_argument("--seconds", type=arguments.positive, default=20.0, help="time limit of a turn of transformers")
    parser.add_argument("--out", type=arguments.file_to_write, metavar="NAME", help="write NAME.json and NAME.md")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to check that it runs")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments_of(given)
    jax.config.update("jax_platforms", "cpu")
    sizes = TINY if options.tiny else replace(FULL, counts=tuple(options.requests))
    content: dict[str, Any] = {"model": "tiny" if options.tiny else options.model, "parts": options.parts}
    content |= {"rounds": options.rounds, "seconds": options.seconds, "sizes": asdict(sizes)}
    shown: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        if options.tiny:
            folder = offline.make_checkpoint(Path(place, "model"), offline.TINY, seed=0)
        else:
            folder = compare.model_folder(options.model, Path(place))
        vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        if set(options.parts) != {"memory"}:
            rows, content["peer"] = speeds(folder, vocab, options, sizes)
            content["rows"] = [asdict(row) for row in rows]
            shown.append(table(rows))
        if "memory" in options.parts:
            requests = chats(sizes.memory, vocab, sizes.memory_requests)
            memory = kv_memory.measure(
                str(folder),
                requests,
                longest=sizes.memory_longest,
                rows=sizes.memory_rows,
                tokens=sizes.tokens,
                reservations=sizes.reservations,
            )
            content["memory"] = asdict(memory)
            shown.append(kv_memory.table(memory))
    print(facts.processor(), *shown, sep="\n\n")
    if options.out:
        content = facts.collect() | {"processor": facts.processor()} | content
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        options.out.with_suffix(".md").write_text("\n\n".join(shown) + "\n")


if __name__ == "__main__":
    main()
