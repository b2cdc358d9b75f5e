# SPDX-License-Identifier: Apache-2.0
"""The kinds of benchmark results: how to recognize one, what its rows measure, and the table it becomes.

Reads no files. A row has a subject; of two rows about the same subject, the newer counts (report.py).
"""

import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import kernels, kv_memory, load, server, startup
from benchmarks.engine_host import AIM_MS, AIM_ROWS, FLAT_AIM
from benchmarks.kv_memory import CacheReport
from benchmarks.report_servers import compare_lines, compare_rows
from benchmarks.report_tables import MISSED, Content, Rows, judged, table
from jaxserve import demo

LOADING_AIM = 2.0  # a warm start may take this many times the loading of the weights


@dataclass(frozen=True)
class ResultKind:
    title: str
    fits: Callable[[Content], bool]
    rows: Callable[[Content], Rows]  # by their subject
    lines: Callable[[Content, Rows], list[str]]  # of the rows that count


def first_row(content: Content) -> Mapping[str, Any]:
    rows = content.get("rows") or [{}]
    return rows[0]


# --- batching, memory -----------------------------------------------------------------------------------------------


def batching_rows(content: Content) -> Rows:
    model = Path(content["model"]).name
    if model == "tiny":  # only checks that the benchmark runs
        return {}
    rows: dict[Hashable, Any] = {(model, row["load"], row["requests"]): row for row in content.get("rows", [])}
    if "memory" in content:
        rows["memory", model] = content["memory"]
    return rows


def batching_lines(content: Content, rows: Rows) -> list[str]:
    model = Path(content["model"]).name
    timed = [row for row in rows.values() if "load" in row]
    lines: list[str] = []
    if timed:
        names = list(dict.fromkeys(name for row in timed for name in row["peers"]))
        heads = ["load", "requests", "jaxserve tok/s"]
        heads += [cell for name in names for cell in (f"vs generate, {name}", "requests timed")]
        shown: list[list[str]] = []
        for row in timed:
            line = [row["load"], f"{row['requests']:,}", f"{row['tokens_per_second']:,.0f}"]
            for name in names:
                peer = row["peers"].get(name)
                line += ["-", "-"] if peer is None else [f"{peer['speedup']:.1f} x", _share(peer, row["asked"])]
            shown.append(line)
        lines += [f"Model `{model}`, {content['rounds']} rounds:", "", *table(heads, shown)]
        same = [peer["same"] for row in timed for peer in row["peers"].values()]
        if same:
            share = "All" if min(same) == 1 else f"At least {min(same):.0%} of the"
            lines += ["", f"{share} answers are identical token by token."]
    memory = next((row for row in rows.values() if "load" not in row), None)
    if memory is not None:
        found = CacheReport(**memory)
        lines += [""] * bool(lines)
        lines += [
            f"KV memory, model `{model}`, {found.requests:,} requests with chat-like lengths, max_model_len "
            f"{found.max_model_len:,}:",
            "",
            *kv_memory.table(found).splitlines(),
        ]
    return lines


def _share(peer: Mapping[str, Any], asked: int) -> str:
    return "all" if peer["timed"] == asked else f"{peer['timed']:,} of {asked:,}"


# --- one process ----------------------------------------------------------------------------------------------------


def server_lines(content: Content, rows: Rows) -> list[str]:
    heads = ["streams", "engine alone, tok/s", "server, tok/s", "kept", "TTFT p50", "added TTFT p50", "added gap p50"]
    shown = [
        [
            str(row["streams"]),
            f"{row['engine']:,.0f}",
            f"{row['server']:,.0f}",
            judged(row["kept"], ".2f", server.AIM if row["streams"] == server.AIM_STREAMS else None),
            *(f"{row[name]:.1f} ms" for name in ("first_p50_ms", "added_first_p50_ms", "added_gap_p50_ms")),
        ]
        for row in rows.values()
    ]
    return [
        f"Target: the server keeps {server.AIM} of the engine's speed at {server.AIM_STREAMS} streams.",
        "",
        *table(heads, shown),
    ]


def startup_rows(content: Content) -> Rows:
    name = content["model"]
    return {"demo" if name == demo.FOLDER.name else name: content["starts"]}


def startup_lines(content: Content, rows: Rows) -> list[str]:
    [(model, starts)] = rows.items()
    columns = [*startup.PHASES, *(["all"] if "all" in starts["warm"][0] else [])]
    medians = {
        name: {column: statistics.median(one[column] for one in those) for column in columns}
        for name, those in starts.items()
    }
    aims: dict[str, float] = {}
    if model in startup.AIMS:
        aims["cold"], aims["warm"] = startup.AIMS[str(model)]
        about = f"{aims['cold']:g} s cold, {aims['warm']:g} s warm"
    else:
        aims["warm"] = LOADING_AIM * medians["warm"]["load"]
        about = f"a warm start within {LOADING_AIM:g} times the time of loading the weights, {aims['warm']:.1f} s"
    shown: list[list[str]] = []
    for name, those in starts.items():
        whole = statistics.median(sum(one[phase] for phase in startup.PHASES) for one in those)
        parts = [f"{medians[name][column]:.1f}" for column in columns]
        shown.append([name, judged(whole, ".1f", aims.get(name), at_most=True), *parts])
    until = "; all: from the start until all programs are compiled" if "all" in columns else ""
    return [
        f"Model `{model}`, seconds until the first token: until the port answers, starting JAX, loading, compiling and "
        f"the rest{until}. Target: {about}.",
        "",
        *table(["start", "total", *columns], shown),
    ]


def host_lines(content: Content, rows: Rows) -> list[str]:
    [found] = rows.values()
    shown = [
        [
            str(row["rows"]),
            judged(row["step_us"], ",.0f", AIM_MS * 1000 if row["rows"] == AIM_ROWS else None, at_most=True),
            f"{row['row_us']:.1f}",
        ]
        for row in found["rows"]
    ]
    flat = judged(found["ratio"], ".2f", FLAT_AIM, at_most=True)
    return [
        f"Target: {AIM_MS * 1000:,.0f} us at {AIM_ROWS} rows. After {found['served'][1]:,} requests a step takes "
        f"{flat} times as long as after {found['served'][0]:,} (target: at most {FLAT_AIM}).",
        "",
        *table(["rows", "us per step", "us per row"], shown),
    ]


def offline_lines(content: Content, rows: Rows) -> list[str]:
    shown = [
        [
            str(row["prompts"]),
            f"{row['ours']:,.0f}",
            "-" if row["ratio"] is None else judged(row["ratio"], ".2f", row["aim"]),
            "-" if row["aim"] is None else f"{row['aim']:g}",
        ]
        for row in rows.values()
    ]
    return table(["prompts at once", "jaxserve tok/s", "speed relative to transformers", "target"], shown)


def kernel_lines(content: Content, rows: Rows) -> list[str]:
    [found] = rows.values()
    shown: list[list[str]] = []
    for name, aim in (("decode", kernels.DECODE_AIM), ("prefill", kernels.PREFILL_AIM)):
        ratios = {
            f"{row['case']}, heads of {row['heads']}": row["ratio"] for row in found if row["case"].startswith(name)
        }
        beyond = [
            " ".join(case.split())
            for case, ratio in ratios.items()
            if MISSED in judged(ratio, ".2f", aim, at_most=True)
        ]
        worst = judged(max(ratios.values()), ".2f", aim, at_most=True)
        middle = f"{statistics.median(ratios.values()):.2f}"
        shown.append([name, str(len(ratios)), middle, worst, f"{aim:g}", "; ".join(beyond) or "none"])
    heads = ["attention", "shapes", "median time relative to dense", "worst", "target (at most)", "shapes above it"]
    return table(heads, shown)


def load_lines(content: Content, rows: Rows) -> list[str]:
    shown = [
        [
            f"{row['form']} as {row['dtype']}",
            f"{row['gb_per_s']:.1f}",
            judged(row["ratio"], ".2f", load.RATIO_AIM, at_most=True),
            judged(row["extra_in_largest"], ".2f", load.MEMORY_AIM, at_most=True),
        ]
        for row in rows.values()
    ]
    heads = [
        "checkpoint",
        "GB/s",
        f"load time relative to reading the files (target {load.RATIO_AIM:g})",
        f"extra memory relative to the largest tensor (target {load.MEMORY_AIM:g})",
    ]
    return table(heads, shown)


def by(*names: str) -> Callable[[Content], Rows]:
    return lambda content: {tuple(row[name] for name in names): row for row in content["rows"]}


KINDS = (
    ResultKind(
        "Other servers, over HTTP",
        lambda content: "same" in content and "settings" in content,
        compare_rows,
        compare_lines,
    ),
    ResultKind("Batching and KV memory", lambda content: "parts" in content, batching_rows, batching_lines),
    ResultKind("Offline against transformers", lambda content: "sides" in content, by("prompts"), offline_lines),
    ResultKind("Server overhead", lambda content: "kept" in first_row(content), by("streams"), server_lines),
    ResultKind("Startup", lambda content: "starts" in content, startup_rows, startup_lines),
    ResultKind("Host time per step", lambda content: "after" in content, lambda content: {"host": content}, host_lines),
    ResultKind("Loading", lambda content: "convert" in content, by("form", "dtype"), load_lines),
    ResultKind(
        "Paged and dense attention on a CPU",
        lambda content: "twin_ms" in first_row(content),
        lambda content: {"kernels": content["rows"]},
        kernel_lines,
    ),
)
