# SPDX-License-Identifier: Apache-2.0
"""The engine process with slower steps: `python -m tests.server.slow_engine SECONDS --fd N`."""

import sys
import time
from typing import Any, NoReturn

from jaxserve.engine.engine import Engine
from jaxserve.host import child


def main() -> NoReturn:
    seconds = float(sys.argv.pop(1))
    step = Engine.step

    def slowly(self: Engine) -> Any:
        time.sleep(seconds)
        return step(self)

    Engine.step = slowly
    child.main()


if __name__ == "__main__":
    main()
