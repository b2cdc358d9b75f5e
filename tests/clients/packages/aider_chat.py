# SPDX-License-Identifier: Apache-2.0
"""aider, asked once about a file, streamed and whole. Its dependencies are old, so it needs a separate environment."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shapes import QUESTION, run


def ask(url: str, model: str, *words: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sum.py").write_text("print(7 + 5)\n")
        Path(folder, "models.json").write_text(f'{{"openai/{model}": {{"max_tokens": 64, "mode": "chat"}}}}')
        quiet = ("--no-git", "--yes-always", "--no-show-model-warnings", "--no-check-update", "--analytics-disable")
        command = [str(Path(sys.executable).with_name("aider")), *quiet, "--map-tokens", "0", "--no-pretty", *words]
        command += ["--model", f"openai/{model}", "--openai-api-base", url, "--openai-api-key", "none"]
        command += ["--model-metadata-file", "models.json", "--chat-mode", "ask", "--message", QUESTION, "sum.py"]
        environment = {**os.environ, "HOME": folder, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, cwd=folder, env=environment
        )
        if done.returncode or "Error" in done.stdout:
            raise RuntimeError((done.stdout + done.stderr)[-800:])
        return done.stdout[-400:]


def chat_stream(url: str, model: str) -> str:
    return ask(url, model)


def chat(url: str, model: str) -> str:
    return ask(url, model, "--no-stream")


if __name__ == "__main__":
    run("aider-chat", {shape.__name__: shape for shape in (chat_stream, chat)})
