# SPDX-License-Identifier: Apache-2.0
"""An engine process with a fault: `python -m tests.host.faulty FAULT --fd N`.

raise               an error in the first step
start               an unexpected error while the model is opened
compile             a start that never ends

Around an engine without a model, which starts without jax:

loop, hold          at the first step: a loop without end, C code without end that keeps Python's lock
slow                four steps take a second each, then the request ends
chatter             at the first step: bytes that the parent cannot parse
"""

import os
import re
import sys
import time
from typing import NoReturn

from jaxserve.host import child
from jaxserve.types.outputs import Update
from tests.server import fake_engine
from tests.server.fake_engine import FakeEngine


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


def _chatter(self: FakeEngine) -> NoReturn:
    number = int(sys.argv[sys.argv.index("--fd") + 1])
    os.write(number, b"\xff" * 100)
    _compile()


turns = 0


def _slow(self: FakeEngine) -> list[Update]:
    global turns
    turns += 1
    time.sleep(1)
    if turns > 3:
        for request_id in list(self._left):
            self.abort(request_id)
    ended, self._ended = self._ended, []
    return ended


STEPS = {"loop": _loop, "hold": _hold, "slow": _slow, "chatter": _chatter}


def main() -> NoReturn:
    fault = sys.argv.pop(1)
    child.BEAT = 0.2
    if fault in STEPS:
        FakeEngine.step = STEPS[fault]  # pyright: ignore[reportAttributeAccessIssue]
        fake_engine.serve({})
    from jaxserve.engine.engine import Engine

    if fault == "raise":
        Engine._turn = _raise
    else:
        Engine.__init__ = {"start": _raise, "compile": _compile}[fault]
    child.main()


if __name__ == "__main__":
    main()
