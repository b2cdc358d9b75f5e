# SPDX-License-Identifier: Apache-2.0
"""The `jaxserve` command line: dispatches to a command and returns an exit code (exit_codes.py).

A command is a dataclass whose fields are its flags (jaxserve/flags). Its file is imported only when the command is
called, and imports heavy packages inside `run`, so that `--help` is fast.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from jaxserve import exit_codes
from jaxserve.errors import UsageError
from jaxserve.flags import command
from jaxserve.flags.parser import Parser


class Command(NamedTuple):
    module: str  # relative to this package, or absolute
    kind: str  # the name of its dataclass
    about: str


COMMANDS = {
    "run": Command(".run", "Run", "Serve a model over an OpenAI-compatible API (default: demo model)."),
    "chat": Command(".chat", "Chat", "Chat with a running server in the terminal."),
    "complete": Command(".chat", "Complete", "Complete a text with a running server."),
    "bench serve": Command(".bench_serve", "BenchServe", "Load-test a running server."),
    "bench throughput": Command(".with_jax.bench_offline", "BenchThroughput", "Measure offline throughput."),
    "bench latency": Command(".with_jax.bench_offline", "BenchLatency", "Measure offline batch latency."),
    "check": Command(".with_jax.check", "Check", "Describe a model and check whether it fits, without loading it."),
    "profile": Command(".with_jax.profile", "Profile", "Record a trace for Perfetto or XProf."),
    "replay": Command(".with_jax.replay", "Replay", "Replay the steps that led to a fault (see --record-steps)."),
    "tune": Command(".with_jax.tune", "Tune", "Measure how this machine's CPU computes products fastest."),
    "convert": Command("convert.command", "Convert", "Convert a model to Orbax, which loads fastest, or quantize it."),
    "version": Command(".version", "Version", "Print the versions of jaxserve, its dependencies and Python."),
    "devices": Command(".with_jax.devices", "Devices", "List the devices that JAX sees and the kernel backend."),
    "inspect": Command(".inspect", "Inspect", "List the tensors of a checkpoint."),
    "completion": Command(".completion", "Completion", "Print a shell completion script for bash, zsh or fish."),
}
ALIASES = {"serve": "run"}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    ours = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in ours
    if debug:
        words.remove("--debug")
    return exit_codes.guarded(lambda: _dispatch(words, debug=debug), debug=debug)


def _dispatch(words: Sequence[str], *, debug: bool) -> int | None:
    first = words[0] if words else ""
    if not words or first in ("-h", "--help"):
        _show(_overview())
    if first == "--version":
        words, first = ["version"], "version"
    name = ALIASES.get(first, first)
    if name == "bench":
        second = words[1] if len(words) > 1 else ""
        if second in ("", "-h", "--help"):
            _show(_overview("bench "))
        name = f"bench {second}"
    if name not in COMMANDS:
        raise UsageError(*_unknown(words))
    if debug:
        os.environ[exit_codes.DEBUG] = "1"
    return _call(name, words[len(name.split()) :])


def _call(name: str, words: Sequence[str]) -> int | None:
    return command.run(_kind(name), words, prog=f"jaxserve {name}", about=COMMANDS[name].about)


def _kind(name: str) -> Any:
    chosen = COMMANDS[name]
    return getattr(importlib.import_module(chosen.module, __name__), chosen.kind)


def parser_of(name: str) -> Parser:
    """The command line of a command."""
    return command.parser_of(_kind(name), f"jaxserve {name}", COMMANDS[name].about)


def _show(text: str) -> NoReturn:
    print(text, flush=True)  # so that a closed pipe shows up as one
    sys.exit(0)


def _overview(prefix: str = "") -> str:
    shown = {name: each for name, each in COMMANDS.items() if name.startswith(prefix)}
    lines = [
        f"usage: jaxserve {prefix}COMMAND [options]",
        "",
        *([] if prefix else ["Serve language models from JAX.", ""]),
        "commands:",
        *(f"  {name:<18}{each.about}" for name, each in shown.items()),
        "",
        "options of every command:",
        "  -h, --help        Show the options of a command.",
        "  --debug           Show the traceback of an error.",
    ]
    return "\n".join(lines)


def _unknown(words: Sequence[str]) -> tuple[str, str]:
    from difflib import get_close_matches

    bench = words[:1] == ["bench"]
    names = [name.removeprefix("bench ") for name in COMMANDS if name.startswith("bench ")]
    if not bench:
        names = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    word = words[bench]
    if word.startswith("-"):
        return f"unknown option {word}", f"see jaxserve {'bench ' * bench}--help"
    close = get_close_matches(word, [*names, *([] if bench else ALIASES)], n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(names)}"
    return f"unknown {'benchmark' if bench else 'command'} {word}", hint
