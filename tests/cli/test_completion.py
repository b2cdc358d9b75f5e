# SPDX-License-Identifier: Apache-2.0
"""The completion scripts, run by the shells that are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from jaxserve import cli
from tests.cli.conftest import Command, one_error


def completed(script: str, folder: Path, *words: str) -> list[str]:
    """What bash suggests at the end of this line."""
    place = len(words) - 1
    line = " ".join(f"'{word}'" for word in words)
    ask = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={place}; _jaxserve; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    result = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=20, check=True, cwd=folder)
    assert result.stderr == ""
    return result.stdout.split()


def test_bash(command: Command, tmp_path: Path) -> None:
    script = command("completion", "bash").out
    assert {name.split()[0] for name in cli.COMMANDS} | {"serve"} <= set(completed(script, tmp_path, "jaxserve", ""))
    assert completed(script, tmp_path, "jaxserve", "prof") == ["profile"]
    assert completed(script, tmp_path, "jaxserve", "bench", "l") == ["latency"]
    assert completed(script, tmp_path, "jaxserve", "serve", "--max-mod") == ["--max-model-len"]
    assert completed(script, tmp_path, "jaxserve", "run", "--dtype", "bf") == ["bfloat16"]
    assert completed(script, tmp_path, "jaxserve", "run", "--no-warm") == ["--no-warmup"]
    assert completed(script, tmp_path, "jaxserve", "bench", "serve", "--num-w") == ["--num-warmups"]
    assert completed(script, tmp_path, "jaxserve", "completion", "z") == ["zsh"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_it(command: Command, shell: str) -> None:
    script = command("completion", shell).out
    assert "max-model-len" in script and "bfloat16" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=20)


def test_wrong_use(command: Command) -> None:
    one_error(command("completion", "tcsh"), 2, "error: no completion for 'tcsh'", "bash, zsh, fish")
    one_error(command("completion"), 2, "SHELL is missing")
