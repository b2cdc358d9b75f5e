# SPDX-License-Identifier: Apache-2.0
"""`python -m convert SRC DST`: the same as `jaxserve convert`."""

import sys

from convert.command import Convert
from jaxserve import exit_codes
from jaxserve.flags.help import help_text
from jaxserve.flags.parsing import HelpRequested, Parser, flags_of


def main() -> int:
    parser = Parser("python -m convert", flags_of(Convert), about=Convert.__doc__ or "")
    words = [word for word in sys.argv[1:] if word != "--debug"]

    def command() -> None:
        try:
            given = parser.parse(words)
        except HelpRequested:
            print(help_text(parser))
        else:
            Convert(**given).run()

    return exit_codes.guarded(command, debug="--debug" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
