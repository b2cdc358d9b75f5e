# SPDX-License-Identifier: Apache-2.0
"""Sections `engine_start`, `engine_flags` and `engine_peer`: measurements in child processes, one after the other.

Meanwhile this process must hold no GPU memory; see processes.py. If a child dies, its row says why.

start   cold, with an empty compilation cache, and warm, with the one that the cold start filled. Weights are random and
        created on the device: no file is read. If time runs out, the row shows how far the start got.
flags   the same steps of an eight-layer model with various XLA flags. An unknown flag ends the child; that is a result.
peer    transformers' continuous batching, and vLLM if it is installed, on the requests of the `engine_offline` row of
        the same name. `ratio` is our tokens per second divided by theirs.
"""

import importlib.util
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import children
from benchmarks.gpu.book import Page, Row, read_rows
from benchmarks.gpu.engine.throughput import PEER_MIX, mixes

START_COLUMNS = ("whole_s", "import_s", "weights_s", "engine_s", "first_token_s", "compiling", "programs", "state")
FLAG_COLUMNS = (
    "decode_1_ms",
    "decode_1_pct",
    "decode_64_ms",
    "decode_64_pct",
    "prefill_ms",
    "prefill_pct",
    "compile_s",
    "state",
)
PEER_COLUMNS = ("seconds_taken", "tokens_per_s", "ratio", "version", "state")
LAYERS = 8
_CHILD = [sys.executable, "-m", "benchmarks.gpu.engine.child"]


# --- start ----------------------------------------------------------------------------------------------------------


def run_start(page: Page) -> None:
    with tempfile.TemporaryDirectory() as folder:

        def measure(_: str) -> Row:
            command = [*_CHILD, "start", folder, repr(time.time()), *_tiny(page)]
            child = children.run(command, seconds=page.time_left())
            row = child.merged() | {"state": child.fault or "ok"}
            return row | ({"ok": False, "error": child.stderr[-400:]} if child.fault and not child.late else {})

        page.each(["cold", "warm"], measure, name=str)


# --- flags ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlagVariant:
    name: str
    flags: str = ""
    variables: tuple[tuple[str, str], ...] = ()


DEFAULTS = FlagVariant("defaults")
# The most promising first. Each was tried with jax 0.11.2, which knows all flags except the last.
VARIANTS = (
    DEFAULTS,
    FlagVariant("launches on a separate thread", variables=(("PJRT_GPU_ENABLE_ASYNC_DISPATCH", "1"),)),
    FlagVariant("no Triton matmuls", "--xla_gpu_enable_triton_gemm=false"),
    FlagVariant("no CUDA graphs", "--xla_gpu_enable_command_buffer="),
    FlagVariant("no graph updates for temporaries", "--xla_gpu_command_buffer_update_mode=SKIP_TEMP"),
    FlagVariant("graphs with concurrent branches", "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT"),
    FlagVariant("graphs with loops", "--xla_gpu_enable_command_buffer=+WHILE"),
    FlagVariant("no programmatic dependent launch", "--xla_gpu_enable_pdl=false"),
    FlagVariant("graphs of a single kernel", "--xla_gpu_graph_min_graph_size=1"),
    FlagVariant("latency hiding scheduler", "--xla_gpu_enable_latency_hiding_scheduler=true"),
    FlagVariant("raft select_k", "--xla_gpu_experimental_use_raft_select_k=true"),
)
UNKNOWN = FlagVariant("an unknown flag", "--xla_gpu_no_such_flag=true")


def run_flags(page: Page) -> None:
    def measure(variant: FlagVariant) -> Row:
        env = dict(variant.variables) | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {variant.flags}".strip()}
        layers = 1 if page.settings.tiny else LAYERS
        child = children.run([*_CHILD, "steps", str(layers), *_tiny(page)], seconds=page.time_left(), env=env)
        row: Row = {"flags": variant.flags, "layers": layers, "state": child.fault or "ok"} | child.merged()
        defaults = next((row for row in page.rows if row["case"] == DEFAULTS.name), {})
        for name in [name for name in row if name.endswith("_ms") and name in defaults]:
            row[f"{name[:-3]}_pct"] = 100 * row[name] / defaults[name]  # below 100: faster than the defaults
        if child.fault not in (None, "unknown flag"):
            row["stderr"] = child.stderr[-400:]
        return row

    page.each((DEFAULTS, UNKNOWN) if page.settings.tiny else VARIANTS, measure, name=lambda variant: variant.name)


# --- peers ----------------------------------------------------------------------------------------------------------

PEERS = {"transformers": "torch", "vllm": "vllm"}  # and what each needs installed


def run_peer(page: Page) -> None:
    requests = mixes(page.settings.tiny)[PEER_MIX]
    ours = read_rows(page.settings.out / "engine_offline.json").get(PEER_MIX, {}).get("tokens_per_s")

    def measure(name: str) -> Row:
        needs = PEERS[name]
        if importlib.util.find_spec(needs) is None:
            return {"state": f"{needs} is not installed"}
        numbers = [len(requests), *requests[0]]
        command = [sys.executable, str(Path(__file__).with_name("peer.py")), name, *map(str, numbers), *_tiny(page)]
        child = children.run(command, seconds=page.time_left())
        row = child.merged() | {"state": child.fault or "ok"}
        if child.fault:
            return row | {"stderr": child.stderr[-400:]}
        return row | {"ratio": ours / row["tokens_per_s"] if ours else None}

    page.each(PEERS, measure, name=str)


def _tiny(page: Page) -> list[str]:
    return ["tiny"] if page.settings.tiny else []
