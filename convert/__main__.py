# SPDX-License-Identifier: Apache-2.0
"""`python -m convert SRC DST`: the same as `jaxserve convert`."""

import sys

import tyro

from convert.command import Convert
from jaxserve import exits


def main() -> int:
    return exits.guarded(
        lambda: tyro.cli(Convert, prog="python -m convert", config=(tyro.conf.FlagCreatePairsOff,)).run()
    )


if __name__ == "__main__":
    sys.exit(main())
