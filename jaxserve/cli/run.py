# SPDX-License-Identifier: Apache-2.0
"""`jaxserve run`, also `serve`: settings from flags and a file, what can be checked at once, and the server.

Nothing here or below imports jax: the engine is another process.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve import __version__
from jaxserve.cli import settings
from jaxserve.config import EngineConfig
from jaxserve.errors import one_line
from jaxserve.flags.parsing import Flag, Parser
from jaxserve.server.config import ServerConfig

CONFIG = Flag(
    name="config",
    base=Path,
    default=None,
    metavar="FILE",
    group="Model",
    help="A YAML file with settings, one `flag: value` on each line; flags go before it.",
)
DEMO = "demo"


@dataclass(frozen=True)
class Run:
    """Serve a model over HTTP."""

    engine: EngineConfig
    server: ServerConfig
    title: str  # the model, for people
    settings: str  # what differs from the defaults

    @staticmethod
    def parser(prog: str, about: str) -> Parser:
        model, *engine = settings.engine_flags(positional_model=True)
        flags = [model, *engine, *settings.server_flags()]
        flags.insert(2, CONFIG)
        return Parser(prog, flags, about=about, refused=settings.refused())

    @staticmethod
    def help(parser: Parser) -> str:
        from jaxserve.flags.help import help_text

        groups = ", ".join(dict.fromkeys(flag.group for flag in parser.flags))
        few = help_text(parser, names=[settings.FIRST, *settings.COMMON])
        return f"{few}\n\nmore: --help=all, --help=FLAG, --help=GROUP with one of {groups}"

    @classmethod
    def of(cls, parser: Parser, given: Mapping[str, Any]) -> "Run":
        given = settings.named_model(given)
        file = given.pop("config", None)
        chosen = {**(settings.from_file(file, parser) if file else {}), **given}
        told = settings.told(parser.flags, chosen)
        if not settings.names_model(chosen):
            from jaxserve import demo

            chosen["model"] = str(demo.FOLDER)
            chosen.setdefault("served_model_name", (DEMO,))
        server = settings.made(parser, lambda: settings.split(ServerConfig, chosen).with_environment(os.environ))
        engine = settings.made(parser, lambda: settings.split(EngineConfig, chosen))
        return cls(engine, server, server.served_model_name[0] if server.served_model_name else engine.model, told)

    def run(self) -> int:
        from jaxserve.cli import preflight

        preflight.check(self.engine, self.server)
        print(f"jaxserve {__version__}  model {one_line(self.title)}", file=sys.stderr)
        if self.settings:
            print(f"settings: {one_line(self.settings, limit=2000)}", file=sys.stderr)
        from jaxserve.server import lifecycle

        return lifecycle.serve(self.engine, self.server)
