# SPDX-License-Identifier: Apache-2.0
"""guidellm's benchmark of four requests, as text and as chat. It needs torch, so it has a separate environment."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shapes import run

TOKENIZER = os.environ.get("TOKENIZER", "")  # the folder of the model's


def benchmark(url: str, model: str, kind: str) -> str:
    """How many requests succeeded."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        words = (
            *(f"--backend=kind=openai_http,target={url.removesuffix('/v1')},model={model},request_format={kind}",),
            *("--profile=kind=concurrent,streams=2", "--constraint=kind=max_requests,count=4"),
            *(
                "--data=kind=synthetic_text,prompt_tokens=16,output_tokens=4",
                f"--tokenizer=kind=hf_auto,model={TOKENIZER}",
            ),
            *(f"--output=kind=json,path={result}", "--disable-console-interactive"),
        )
        command = [str(Path(sys.executable).with_name("guidellm")), "run", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=folder)
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout)[-800:])
        totals = json.loads(result.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    return str(totals["successful"])


def completions(url: str, model: str) -> str:
    return benchmark(url, model, "/v1/completions")


def chat_completions(url: str, model: str) -> str:
    return benchmark(url, model, "/v1/chat/completions")


if __name__ == "__main__":
    run("guidellm", {shape.__name__: shape for shape in (completions, chat_completions)})
