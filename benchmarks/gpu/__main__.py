# SPDX-License-Identifier: Apache-2.0
"""The command line of the run book; see the package for its words."""

import sys

from benchmarks.gpu.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
