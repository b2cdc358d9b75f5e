# SPDX-License-Identifier: Apache-2.0
"""`jaxserve run`, also `serve`: reads settings from flags and a file, checks them, and runs the server.

Nothing here or below imports jax: the engine is another process.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jaxserve import __version__, demo
from jaxserve.config import EngineConfig
from jaxserve.errors import one_line
from jaxserve.flags import config_file, values
from jaxserve.flags.parser import Parser
from jaxserve.flags.setting import Setting, build
from jaxserve.frontend import log_lines
from jaxserve.server.config import ServerConfig

DEMO = "demo"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Serve a model over HTTP."""

    config: Annotated[
        Path | None,
        Setting(
            "YAML file of settings, one `flag: value` per line; command-line flags override it.",
            "Model",
            metavar="FILE",
            common=True,
        ),
    ] = None
    engine: EngineConfig
    server: ServerConfig
    settings: str  # those that differ from the defaults
    notes: tuple[str, ...]  # on flags of vLLM that were accepted without effect

    @classmethod
    def of(cls, parser: Parser, given: Mapping[str, Any]) -> "Run":
        file: Path | None = given.get("config")
        chosen = {**(config_file.read(file, parser) if file else {}), **given}
        if host := os.environ.get("JAXSERVE_HOST"):
            chosen = {"host": host, **chosen}
        settings = values.changed(parser.flags, {**chosen, "config": None})
        if "model" not in chosen:
            chosen = {"served_model_name": (DEMO,), **chosen, "model": str(demo.FOLDER)}
        server = build(ServerConfig, chosen).with_environment(os.environ)
        return cls(
            config=file, engine=build(EngineConfig, chosen), server=server, settings=settings, notes=tuple(parser.notes)
        )

    def run(self) -> int:
        from jaxserve.cli import preflight

        if self.server.log_format == "json":
            log_lines.write_json(self.server.api_key)
        preflight.check(self.engine, self.server)
        name = next(iter(self.server.served_model_name), self.engine.model)
        print(f"jaxserve {__version__}  model {one_line(name)}", file=sys.stderr)
        if self.settings:
            print(f"settings: {one_line(self.settings, limit=2000)}", file=sys.stderr)
        for note in self.notes:
            print(f"note: {one_line(note)}", file=sys.stderr)
        from jaxserve.server import lifecycle

        return lifecycle.serve(self.engine, self.server)
