# SPDX-License-Identifier: Apache-2.0
"""`python -m convert SRC DST`: the same as `jaxserve convert`."""

import sys

from convert.command import Convert
from jaxserve import exit_codes
from jaxserve.flags import command


def main() -> int:
    words = [word for word in sys.argv[1:] if word != "--debug"]
    about = Convert.__doc__ or ""
    return exit_codes.guarded(
        lambda: command.run(Convert, words, prog="python -m convert", about=about), debug="--debug" in sys.argv
    )


if __name__ == "__main__":
    sys.exit(main())
