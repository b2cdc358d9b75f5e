# SPDX-License-Identifier: Apache-2.0
"""The `jaxserve` command: which command is meant, and every way out as an exit code (jaxserve/exit_codes.py).

A command is a dataclass whose fields are its flags (jaxserve/flags/parsing.py), in a file of its own that is imported
when it is called; those files import heavy packages inside `run`, so that `--help` stays quick.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from jaxserve import exit_codes
from jaxserve.errors import JaxserveError, UsageError

if TYPE_CHECKING:
    from jaxserve.flags.parsing import Parser


class Command(NamedTuple):
    module: str  # relative to this package, unless it is in another
    kind: str  # the dataclass in it
    about: str


COMMANDS = {
    "run": Command(".run", "Run", "Serve a model over HTTP, as OpenAI does; the demo if none is named."),
    "chat": Command(".chat", "Chat", "Talk to a running server in the terminal."),
    "complete": Command(".chat", "Complete", "Have a running server continue a text."),
    "bench serve": Command(".bench_serve", "BenchServe", "Load a running server, and measure."),
    "bench throughput": Command(".with_jax.bench_offline", "BenchThroughput", "Tokens per second, no server."),
    "bench latency": Command(".with_jax.bench_offline", "BenchLatency", "Seconds of a batch, no server."),
    "check": Command(".with_jax.check", "Check", "What a model is and whether it fits, without loading it."),
    "profile": Command(".with_jax.profile", "Profile", "Trace a server, or a run of its own, for Perfetto or XProf."),
    "convert": Command("convert.command", "Convert", "Write a model in the form that starts fastest, with Orbax."),
    "version": Command(".version", "Version", "Print the versions of jaxserve, Python and the packages below."),
    "devices": Command(".with_jax.devices", "Devices", "List the devices that jax sees, and how kernels run there."),
    "inspect": Command(".inspect", "Inspect", "List the tensors of a safetensors checkpoint."),
    "completion": Command(".completion", "Completion", "Print a completion script for bash, zsh or fish."),
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
    if first in ("-h", "--help"):
        _show(_overview())
    if first == "--version":
        words, first = ["version"], "version"
    name = ALIASES.get(first, first)
    if name == "bench":
        second = words[1] if len(words) > 1 else ""
        if second in ("-h", "--help"):
            _show(_overview("bench "))
        name = f"bench {second}"
    if name not in COMMANDS:
        raise UsageError(*_unknown(words))
    if debug:
        os.environ[exit_codes.DEBUG] = "1"
    return _call(name, words[len(name.split()) :])


def _call(name: str, words: Sequence[str]) -> int | None:
    """Parses the rest by the command's fields, and runs it."""
    from jaxserve.flags.parsing import HelpRequested

    kind, parser = _kind(name), parser_of(name)
    try:
        given = parser.parse(words)
    except HelpRequested as wanted:
        from jaxserve.flags.help import topic_help

        own = wanted.topic is None and hasattr(kind, "help")
        _show(kind.help(parser) if own else topic_help(parser, wanted.topic))
    command = kind.of(parser, given) if hasattr(kind, "of") else kind(**given)
    try:
        return command.run()
    except JaxserveError as error:  # which names settings as programs do
        kind = UsageError if isinstance(error, UsageError) else JaxserveError
        raise kind(parser.in_flags_words(error.problem), parser.in_flags_words(error.hint)) from error


def _kind(name: str) -> Any:
    command = COMMANDS[name]
    return getattr(importlib.import_module(command.module, __name__), command.kind)


def parser_of(name: str) -> "Parser":
    """A command with flags from elsewhere has `parser`, and `of` to be made of what was given; its `help` may choose
    what is shown. All others are made of their fields."""
    from jaxserve.flags.parsing import Parser, flags_of

    kind, prog, about = _kind(name), f"jaxserve {name}", COMMANDS[name].about
    return kind.parser(prog, about) if hasattr(kind, "parser") else Parser(prog, flags_of(kind), about=about)


def _show(text: str) -> NoReturn:
    print(text, flush=True)  # so that a closed pipe shows up as one
    sys.exit(0)


def _overview(prefix: str = "") -> str:
    shown = {name: command for name, command in COMMANDS.items() if name.startswith(prefix)}
    lines = [
        f"usage: jaxserve {prefix}COMMAND [options]",
        "",
        *([] if prefix else ["Serve language models from JAX.", ""]),
        "commands:",
        *(f"  {name:<18}{command.about}" for name, command in shown.items()),
        "",
        "options of all commands:",
        "  -h, --help        flags of a command",
        "  --debug           the traceback of an error",
    ]
    return "\n".join(lines)


def _unknown(words: Sequence[str]) -> tuple[str, str]:
    from difflib import get_close_matches

    bench = words[:1] == ["bench"]
    names = [name.removeprefix("bench ") for name in COMMANDS if name.startswith("bench ")]
    if not bench:
        names = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    word = next(iter(words[1:] if bench else words), None)
    if word is None:
        return f"no {'benchmark' if bench else 'command'} is given", f"one of {', '.join(names)}"
    close = get_close_matches(word, [*names, *([] if bench else ALIASES)], n=1)
    problem = f"unknown {'option' if word.startswith('-') else 'command'} {word}"
    return problem, f"did you mean {close[0]}?" if close else f"one of {', '.join(names)}"
