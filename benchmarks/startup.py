# SPDX-License-Identifier: Apache-2.0
"""Measures a start of the server: `python -m benchmarks.startup [--model NAME] [--rounds 3] [--json FILE]`.

`jaxserve run` starts with an empty folder for compiled programs (cold) and again with the filled one (warm), until
/health returns 200 and one token has been generated, and further until all programs are compiled ("all"), which
happens in the background. The server's own state gives the phases: until the port answers (Python and the server's
libraries), until the model is opened (jax), loading, compiling, and the rest until the first token. Results are medians
over the rounds; for scale, the seconds that `import jax` and reading the weights' file take.

Models: demo; 135m (the shape of SmolLM2 135M, 30 layers) and 1b (of Llama 3.2 1B, 1.24 billion parameters, 4.9 GB),
both of random parameters; or a folder. Targets for the first token: demo 15 s cold and 5 s warm, 135m 40 s and 5 s, 1b
warm within twice the time of loading its weights. For an accelerator, programs compile while weights are read; the
compile phase is then only what remains.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import arguments, facts, offline, words
from jaxserve import demo

PHASES = ("port", "jax", "load", "compile", "rest")
AIMS = {"demo": (15.0, 5.0), "135m": (40.0, 5.0)}  # cold and warm
SHAPES = {
    "135m": offline.LlamaShape(vocab=49_152, hidden=576, width=1536, layers=30, heads=9, kv_heads=3),
    "1b": offline.LlamaShape(vocab=128_256, hidden=2048, width=8192, layers=16, heads=32, kv_heads=8),
}


@dataclass
class StartTimes:
    """Seconds in each phase, and from the start until all programs were compiled."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    all: float = 0.0

    @property
    def whole(self) -> float:
        return sum(self.seconds.values())


def phase_of(detail: str | None) -> str:
    """The phase of a server whose /health reports this detail; None: it does not answer yet."""
    if detail is None:
        return "port"
    if detail.startswith("loading"):
        return "load"
    if detail.startswith("compiling"):
        return "compile"
    return "jax" if detail.startswith(("starting", "opening")) else "rest"


def once(model: Path, cache: Path, flags: Sequence[str]) -> StartTimes:
    """Starts the server once, up to the first token and the last program."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [Path(sysconfig.get_path("scripts"), "jaxserve"), "run", model, f"--port={port}", *flags]
    command += ["--log-level=error", f"--compilation-cache-dir={cache}"]
    start, began = StartTimes(), time.perf_counter()
    last = began
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = False
            while not ready:
                ready, detail = _health(url)
                now = time.perf_counter()
                start.seconds["rest" if ready else phase_of(detail)] += now - last
                last = now
                if process.poll() is not None:
                    errors = process.stderr.read() if process.stderr else ""
                    raise SystemExit(f"error: the server ended with code {process.returncode}: {errors.strip()}")
                time.sleep(0.01)
            _token(url)
            start.seconds["rest"] += time.perf_counter() - last
            while _health(url)[1]:
                time.sleep(0.1)
            start.all = time.perf_counter() - began
        finally:
            process.terminate()
    return start


def _health(url: str) -> tuple[bool, str | None]:
    """Whether the server is ready, and the detail that it reports."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
            return answer.status == 200, str(json.load(answer).get("detail", ""))
    except urllib.error.HTTPError as error:
        with error:
            return False, str(json.load(error).get("detail", ""))
    except OSError:
        return False, None


def _token(url: str) -> None:
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer.read()


def import_seconds(rounds: int) -> float:
    return statistics.median(_timed([sys.executable, "-c", "import jax; jax.devices()"]) for _ in range(rounds))


def _timed(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def model_folder(name: str, place: Path) -> Path:
    if name == "demo":
        return demo.FOLDER
    if name not in SHAPES:
        return Path(name).resolve()
    folder = offline.make_checkpoint(place / f"llama-{name}", SHAPES[name], seed=0)
    words.write_tokenizer(folder, SHAPES[name].vocab)
    return folder


def read_seconds(model: Path) -> float:
    """The seconds for reading the weights, with the file cache as warm as at a start."""
    began = time.perf_counter()
    for path in model.glob("*.safetensors"):
        path.read_bytes()
    return time.perf_counter() - began


def table(rows: dict[str, list[StartTimes]]) -> str:
    lines = [f"{'start':>8} {'seconds':>8}" + "".join(f"{phase:>9}" for phase in PHASES) + f"{'all':>9}"]
    for name, starts in rows.items():
        parts = "".join(f"{statistics.median(one.seconds[phase] for one in starts):9.2f}" for phase in PHASES)
        whole, programs = (statistics.median(values) for values in ((s.whole for s in starts), (s.all for s in starts)))
        lines.append(f"{name:>8} {whole:8.2f}{parts}{programs:9.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description="Measure startup time.")
    parser.add_argument("--model", default="demo", help="demo, 135m, 1b or a folder")
    parser.add_argument("--rounds", type=arguments.whole, default=3, help="cold and warm starts (default: 3)")
    parser.add_argument("--json", type=arguments.file_to_write, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("flags", nargs="*", help="further flags of `jaxserve run`, after --")
    options = parser.parse_args()
    rows: dict[str, list[StartTimes]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as place:
        model = model_folder(options.model, Path(place))
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as cache:
                rows["cold"].append(once(model, Path(cache), options.flags))
                rows["warm"].append(once(model, Path(cache), options.flags))
        scale = {"import jax": import_seconds(options.rounds), "read weights": read_seconds(model)}
    print(facts.processor(), table(rows), sep="\n")
    print(", ".join(f"{name}: {seconds:.2f} s" for name, seconds in scale.items()))
    if options.model in AIMS:
        print("targets: cold {:.0f} s, warm {:.0f} s".format(*AIMS[options.model]))
    if options.json:
        content: dict[str, Any] = facts.collect() | {"processor": facts.processor(), "model": Path(options.model).name}
        content |= {"rounds": options.rounds, "flags": options.flags, "scale": scale}
        content["starts"] = {name: [one.seconds | {"all": one.all} for one in starts] for name, starts in rows.items()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
