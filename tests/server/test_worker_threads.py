# SPDX-License-Identifier: Apache-2.0
"""The threads of a server are all there from the start."""

import threading

from jaxserve.server.workers import Workers


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "preparer" in thread.name]


def test_all_threads_exist_before_there_is_work() -> None:
    before = len(names())
    workers = Workers(4)
    found = names()
    workers.shutdown()
    assert len(found) - before == 6 and sum("long" in name for name in found) >= 2
