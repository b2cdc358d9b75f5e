# SPDX-License-Identifier: Apache-2.0
"""The `jaxserve` command: parse, run, and turn every way out into an exit code (jaxserve/exits.py).

A command is a frozen dataclass whose fields are its flags, in a file of its own; those files import
heavy packages inside `run`, so that `--help` stays quick.
"""

from collections.abc import Sequence
from typing import Any, Union, cast

import tyro

from convert.command import Convert
from jaxserve import exits
from jaxserve.cli.devices import Devices
from jaxserve.cli.inspect import Inspect
from jaxserve.cli.version import Version


COMMANDS = (Version, Devices, Inspect, Convert)


def main(argv: Sequence[str] | None = None) -> int:
    return exits.guarded(lambda: _parsed(argv).run())


def _parsed(argv: Sequence[str] | None) -> Any:
    return tyro.cli(
        # Not `A | B`: for that form tyro imports typeguard, which takes a third of the time that help takes.
        cast(Any, Union[COMMANDS]),
        prog="jaxserve",
        description="Serve language models from JAX.",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
