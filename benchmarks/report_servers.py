# SPDX-License-Identifier: Apache-2.0
"""The tables of servers compared over HTTP (compare.py), and their targets.

In results without `runs` in their settings all servers ran in float32; in the others each ran with its own setting.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report_tables import Content, Rows, judged, table

# Targets in float32: jaxserve's output tokens per second divided by a peer's; the peer's TTFT divided by jaxserve's.
FIXED_AIMS = {"vllm": (1.2, 1.0), "transformers": (2.0, 1.0)}
FIXED_STREAMS = (1, 8, 32)
SHARED_AIMS = {"jaxserve-uncached": (3.0, None)}
MIXES = {"fixed": "fixed lengths", "sharegpt": "chat-like lengths", "shared": "shared prefixes"}


@dataclass(frozen=True, kw_only=True)
class ServerAim:
    """A target for the output tokens per second and the TTFT of some of our settings relative to a peer's."""

    ours: tuple[str, ...]
    peers: tuple[str, ...]
    speed: float
    alone: float | None = None  # instead of `speed`, with one stream
    ttft: float | None = None  # the peer's TTFT divided by ours
    mix: str = "fixed"

    def at(self, streams: int) -> float:
        return self.alone if self.alone is not None and streams == 1 else self.speed

    @property
    def shown(self) -> str:
        return f"{self.speed:g}" + (f" ({self.alone:g} at 1 stream)" if self.alone is not None else "")


_BFLOAT16 = ("jaxserve", "jaxserve:bfloat16"), ("vllm", "vllm:bfloat16")
AIMS = (
    ServerAim(ours=_BFLOAT16[0], peers=_BFLOAT16[1], speed=1.2, ttft=1.0),
    ServerAim(ours=("jaxserve:float32",), peers=("vllm:float32",), speed=1.2, ttft=1.0),
    ServerAim(ours=("jaxserve:float32",), peers=("transformers:float32",), speed=2.0, ttft=1.0),
    ServerAim(ours=("jaxserve:int8",), peers=_BFLOAT16[1], speed=1.8),
    ServerAim(ours=("jaxserve:int8",), peers=("llamacpp:q8_0", "openvino:int8"), speed=1.1, alone=0.9),
    ServerAim(ours=("jaxserve",), peers=("jaxserve-uncached",), speed=3.0, mix="shared"),
)
# How much higher than that of float32 the perplexity may be, in percent.
QUALITY_AIMS = {"jaxserve:bfloat16": 0.2, "jaxserve:int8": 0.5}
# The settings that others are compared with, the first that a result has.
EXACT = ("jaxserve:float32", "vllm:float32", "llamacpp:f32", "openvino:f32")


def compare_rows(content: Content) -> Rows:
    settings = content["settings"]
    about = Path(settings["model"]).name, settings["mix"], settings["prompt"]
    if "runs" in settings:
        return {(*about, "own settings"): content}
    ours = settings["servers"][0]
    return {(*about, row["streams"], row["server"]): row for row in content["rows"] if row["server"] != ours}


def aims(mix: str, peer: str, streams: int | None = None) -> tuple[float | None, float | None]:
    """Targets for the speed and the first token; without `streams`, those of any stream count."""
    if mix == "fixed" and streams in (None, *FIXED_STREAMS):
        return FIXED_AIMS.get(peer, (None, None))
    return SHARED_AIMS.get(peer, (None, None)) if mix == "shared" else (None, None)


def compare_lines(content: Content, rows: Rows) -> list[str]:
    settings = content["settings"]
    if "runs" in settings:
        return settings_lines(content)
    ours, mix = settings["servers"][0], settings["mix"]
    peers = list(dict.fromkeys(row["server"] for row in rows.values()))
    base = {row["streams"]: row for row in content["rows"] if row["server"] == ours}
    by_place = {(row["streams"], row["server"]): row for row in rows.values()}
    heads = ["streams", f"{ours} tok/s", "TTFT p50"]
    for peer in peers:
        aim, _ = aims(mix, peer)
        heads += [f"vs {peer}" + (f" (target {aim:g})" if aim else ""), "TTFT ratio"]
    shown: list[list[str]] = []
    for streams in dict.fromkeys(row["streams"] for row in rows.values()):
        line = [str(streams), f"{base[streams]['tokens_per_second']:,.0f}", f"{base[streams]['ttft_p50_ms']:,.0f} ms"]
        for peer in peers:
            row = by_place.get((streams, peer), {})
            found = row.get("speedup"), row.get("ttft_ratio")
            wanted = aims(mix, peer, streams)
            pairs = zip(found, wanted, strict=True)
            faster, later = ["-" if one is None else judged(one, ".2f", aim) for one, aim in pairs]
            line += [faster + (" ({:.2f} to {:.2f})".format(*row["speedups"]) if row.get("speedups") else ""), later]
        shown.append(line)
    same = ", ".join(f"{peer} {content['same'][peer]:.0%}" for peer in peers)
    lost = {name: sum(row["failed"] for row in content["rows"] if row["server"] == name) for name in (ours, *peers)}
    failed = ", ".join(f"{name} {count}" for name, count in lost.items() if count) or "none"
    sizes = f"prompts of {settings['prompt']} tokens, answers of {settings['new']}"
    return [
        f"Model `{Path(settings['model']).name}`, {MIXES[mix]}, {sizes}, {settings['rounds']} rounds:",
        "",
        *table(heads, shown),
        "",
        f"Greedy answers identical to jaxserve's: {same}. Failed requests: {failed}.",
    ]


# --- each server with its own setting -------------------------------------------------------------------------------


def settings_lines(content: Content) -> list[str]:
    settings = content["settings"]
    names, streams = settings["servers"], settings["streams"]
    places = {(row["streams"], row["server"]): row for row in content["rows"]}
    heads = ["server", "runs with", "perplexity"]
    heads += [head for count in streams for head in (f"{_streams(count)}: tok/s", "TTFT p50")]
    shown: list[list[str]] = []
    for name in names:
        line = [name, settings["runs"][name], _quality(name, content.get("perplexity", {}))]
        for count in streams:
            row = places[count, name]
            line += [f"{row['tokens_per_second']:,.0f}", f"{row['ttft_p50_ms']:,.0f} ms"]
        shown.append(line)
    sizes = f"prompts of {settings['prompt']} words, answers of {settings['new']} tokens"
    model = Path(settings["model"]).name
    same = ", ".join(f"{name} {content['same'][name]:.0%}" for name in names[1:]) or "none"
    lost = {name: sum(row["failed"] for row in content["rows"] if row["server"] == name) for name in names}
    failed = ", ".join(f"{name} {count}" for name, count in lost.items() if count) or "none"
    return [
        f"Model `{model}`, {MIXES[settings['mix']]}, {sizes}, {settings['rounds']} rounds, each server with its own "
        "setting:",
        "",
        *table(heads, shown),
        *_targets(settings["mix"], names, streams, places),
        "",
        f"Greedy answers identical to those of {names[0]}: {same}. Failed requests: {failed}.",
    ]


def _streams(count: int) -> str:
    return f"{count} stream" + "s" * (count != 1)


def _quality(name: str, perplexities: Mapping[str, float | None]) -> str:
    """A perplexity, and how much higher it is than in float32."""
    own = perplexities.get(name)
    base = next((found for one in EXACT if (found := perplexities.get(one))), None)
    if own is None:
        return "-"
    if base is None or name in EXACT:
        return f"{own:.2f}"
    more = judged(100 * (own / base - 1), "+.2f", QUALITY_AIMS.get(name), at_most=True)
    return f"{own:.2f} ({more} %)"


def _targets(mix: str, names: list[str], streams: list[int], places: Mapping[tuple[int, str], Any]) -> list[str]:
    """The ratios for which there are targets, round by round; no lines if no two of these servers have one."""
    shown: list[list[str]] = []
    for aim in AIMS:
        pairs = [(ours, peer) for ours in aim.ours for peer in aim.peers if {ours, peer} <= {*names}]
        for ours, peer in pairs if aim.mix == mix else ():
            line = [f"{ours} vs {peer}", aim.shown]
            for count in streams:
                own, theirs = places[count, ours], places[count, peer]
                faster = _ratio(own["speeds"], theirs["speeds"])
                line.append("-" if faster is None else judged(faster, ".2f", aim.at(count)))
                sooner = _ratio(theirs["ttfts_ms"], own["ttfts_ms"])
                line.append("-" if sooner is None else judged(sooner, ".2f", aim.ttft))
            shown.append(line)
    heads = ["tokens per second", "target"]
    heads += [head for count in streams for head in (_streams(count), "TTFT ratio")]
    return ["", *table(heads, shown)] if shown else []


def _ratio(above: list[float], below: list[float]) -> float | None:
    """The median of the ratios round by round; None if a server failed throughout a round."""
    pairs = list(zip(above, below, strict=True))
    return statistics.median(a / b for a, b in pairs) if all(b for _, b in pairs) else None
