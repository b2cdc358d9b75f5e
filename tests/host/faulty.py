# SPDX-License-Identifier: Apache-2.0
"""An engine process with a fault: `python -m tests.host.faulty FAULT --fd N`.

raise, loop, hold   at the first step: an error, a loop without end, C code without end that keeps Python's lock
slow                four steps take a second each, then the request ends
start               an unexpected error while the model is opened
compile             a start that never ends
chatter             at the first step: bytes that the parent cannot parse
"""

import os
import re
import sys
import time
from typing import NoReturn

from jaxserve.engine import engine
from jaxserve.host import child
from jaxserve.types.outputs import Update


def _raise(*_: object, **__: object) -> NoReturn:
    raise ValueError("of the device\nat /a/path")


def _loop(*_: object) -> NoReturn:
    while True:
        pass


def _hold(*_: object) -> NoReturn:
    re.fullmatch("(a|a)+", 64 * "a" + "b")  # 2**64 steps
    raise AssertionError


def _compile(*_: object, **__: object) -> NoReturn:
    while True:
        time.sleep(100)


def _chatter(self: engine.Engine) -> NoReturn:
    number = int(sys.argv[sys.argv.index("--fd") + 1])
    os.write(number, b"\xff" * 100)
    _compile()


turns = 0


def _slow(self: engine.Engine) -> list[Update]:
    global turns
    turns += 1
    time.sleep(1)
    if turns > 3:
        for request_id in list(self.scheduler.requests):
            self.abort(request_id)
    return self.scheduler.take_ended()


STEPS = {"raise": _raise, "loop": _loop, "hold": _hold, "slow": _slow, "chatter": _chatter}
STARTS = {"start": _raise, "compile": _compile}


def main() -> NoReturn:
    fault = sys.argv.pop(1)
    if fault in STEPS:
        engine.Engine._turn = STEPS[fault]  # pyright: ignore[reportAttributeAccessIssue]
    else:
        engine.Engine.__init__ = STARTS[fault]
    child.BEAT = 0.2
    child.main()


if __name__ == "__main__":
    main()
