# SPDX-License-Identifier: Apache-2.0
"""Runs the command line of the run book; the package's docstring shows the options."""

import sys

from benchmarks.gpu.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
