# SPDX-License-Identifier: Apache-2.0
"""Records what the packages send: `python -m tests.clients.record [NAME ...]` writes recorded/NAME.json.

Each runs in a venv for such packages: `make .venv-clients/.installed`, and for some `make .venv-NAME/.installed`.
A package that is not installed is left out, and its file stays.
"""

import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from jaxserve import demo
from tests.clients.recorder import recording

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Scripts in packages/, and the environment that has their package.
PACKAGES = {
    **dict.fromkeys(("openai_sdk", "langchain", "litellm_sdk", "openai_agents", "lm_eval_harness"), ".venv-clients"),
    **{"guidellm_benchmark": ".venv-guidellm", "aider_chat": ".venv-aider"},
}


def interpreter(name: str) -> Path:
    return ROOT / PACKAGES[name] / "bin" / "python"


def shapes(name: str, url: str, model: str) -> Generator[dict[str, Any]]:
    """What the script of a package prints: first its version, then the result of each shape as it ends."""
    command = [str(interpreter(name)), str(HERE / "packages" / f"{name}.py"), url, model]
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "OPENAI_", "JAXSERVE_"))}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**plain, "TOKENIZER": str(demo.FOLDER), "NO_PROXY": "*"},
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        for place, line in enumerate(line for line in process.stdout if line.startswith('{"')):
            yield json.loads(line)
            if place:  # the script waits after each shape, but not after its version
                process.stdin.write("\n")
                process.stdin.flush()


def record(name: str) -> dict[str, Any]:
    with recording() as server:
        results = shapes(name, server.url, "demo")
        found: dict[str, Any] = {**next(results), "requests": []}
        for result in results:
            found["requests"] += [{"shape": result["shape"], **each} for each in _distinct(server.seen)]
            server.seen.clear()
    return found


def _distinct(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without requests that differ from an earlier one only in their prompt, or in texts of the same roles."""
    kinds: dict[str, dict[str, Any]] = {}
    for each in seen:
        body = {key: value for key, value in (each["body"] or {}).items() if key not in ("messages", "prompt")}
        talk = [sorted(message) for message in (each["body"] or {}).get("messages", ())]
        kinds.setdefault(json.dumps([{**each, "body": body}, talk], sort_keys=True), each)
    return list(kinds.values())


def main(names: list[str]) -> None:
    for name in names or PACKAGES:
        if not interpreter(name).exists():
            print(f"{name}: left out, there is no {PACKAGES[name]}")
            continue
        made = record(name)
        (HERE / "recorded" / f"{name}.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: {made['package']} {made['version']}, {len(made['requests'])} requests")


if __name__ == "__main__":
    main(sys.argv[1:])
