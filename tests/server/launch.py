# SPDX-License-Identifier: Apache-2.0
"""Starts a server: `python -O -m tests.server.launch '{"engine": {...}, "server": {...}, "command": [...]}'`."""

import json
import sys

from jaxserve import exit_codes
from jaxserve.config import EngineConfig
from jaxserve.server.config import ServerConfig
from jaxserve.server.lifecycle import serve


def main() -> int:
    given = json.loads(sys.argv[1])
    return exit_codes.guarded(
        lambda: serve(EngineConfig(**given["engine"]), ServerConfig(**given["server"]), command=given["command"])
    )


if __name__ == "__main__":
    sys.exit(main())
