# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxserve.openai_api_server` is `jaxserve run`: the form in which many scripts start vLLM's server."""

import sys

from jaxserve.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
