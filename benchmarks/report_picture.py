# SPDX-License-Identifier: Apache-2.0
"""Draws the picture of the performance tables that the READMEs show: four charts of the newest results.

All charts are of one machine, the one of the newest comparison with other servers, and of float32: results whose
servers have settings are left to the tables.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import plot
from benchmarks.plot import Panel
from benchmarks.report_tables import Content

TITLE = "Output tokens per second of jaxserve, other servers and transformers"
MODELS = {"110m": "Llama with 110 M random weights", "demo": "demo model, 1.6 M parameters"}
BATCHED = (8, 32, 256, 1000)  # of the table's loads
NAMES = {
    "vllm": "vLLM",
    "llamacpp": "llama.cpp",
    "jaxserve-uncached": "without prefix cache",
    "static": "generate, static batches",
    "sequential": "generate, one by one",
}


def draw(results: Sequence[tuple[str, Content]]) -> str | None:
    """The SVG of these results, each with its machine's name, newest first; None if none compares servers."""
    results = [(machine, content) for machine, content in results if "runs" not in content.get("settings", {})]
    compared = [(machine, content) for machine, content in results if "same" in content and content["rows"]]
    if not compared:
        return None
    machine = compared[0][0]
    here = [content for where, content in results if where == machine]
    panels = [*_servers(here), *_batching(here), *_prefixes(here)]
    dates = sorted(content["date"][:10] for content in here if "same" in content or "parts" in content)
    footer = [
        "Output tokens per second, higher is better; medians of rounds in which the sides take turns. Each group of "
        "bars has its own scale.",
        f"CPU only, float32: {machine}, {dates[0]} to {dates[-1]}. benchmarks/README.md has all tables, with spreads, "
        "latencies and missed targets.",
    ]
    return plot.figure(panels, title=TITLE, footer=footer)


def _servers(results: Iterable[Content]) -> list[Panel]:
    newest: dict[str, Content] = {}
    for content in results:
        if "same" in content and content["settings"]["mix"] == "fixed":
            newest.setdefault(Path(content["settings"]["model"]).name, content)
    return [
        Panel(
            f"HTTP, {MODELS[model]}",
            _groups(newest[model]["rows"]),
            f"chats, prompts of {newest[model]['settings']['prompt']} tokens, "
            f"answers of {newest[model]['settings']['new']}",
        )
        for model in MODELS
        if model in newest
    ]


def _batching(results: Iterable[Content]) -> list[Panel]:
    """jaxserve's continuous batching and transformers' `generate`, where both were timed."""
    content = next((one for one in results if "parts" in one and one["model"] in MODELS and one.get("rows")), None)
    if content is None:
        return []
    groups = {
        _load(row): {"jaxserve": row["tokens_per_second"]}
        | {_shown(name): row["peers"][name]["tokens_per_second"] for name in ("static", "sequential")}
        for row in content["rows"]
        if row["requests"] in BATCHED and {"static", "sequential"} <= row["peers"].keys()
    }
    return [Panel(f"In one process, {MODELS[content['model']]}", groups, "jaxserve and transformers' generate")]


def _prefixes(results: Iterable[Content]) -> list[Panel]:
    groups: dict[int, dict[str, float]] = {}
    for content in results:
        if "same" in content and content["settings"]["mix"] == "shared":
            speeds = {row["server"]: row["tokens_per_second"] for row in content["rows"]}
            groups.setdefault(content["settings"]["prompt"], {_shown(name): speed for name, speed in speeds.items()})
    if not groups:
        return []
    named = {f"{prompt:,} tokens": group for prompt, group in sorted(groups.items())}
    return [Panel("HTTP, prompts with a shared prefix of 94 %", named, "Llama of 110 M random weights, 8 streams")]


def _load(row: Content) -> str:
    return f"{row['requests']:,} offline" if row["load"] == "offline" else f"{row['requests']} chats"


def _groups(rows: Iterable[Content]) -> dict[str, dict[str, float]]:
    groups: dict[int, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(row["streams"], {})[_shown(row["server"])] = row["tokens_per_second"]
    return {f"{streams} stream" + "s" * (streams != 1): group for streams, group in sorted(groups.items())}


def _shown(name: str) -> str:
    return NAMES.get(name, name)
