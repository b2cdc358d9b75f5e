# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxserve` is `jaxserve`."""

from jaxserve.cli import main

if __name__ == "__main__":
    main()
