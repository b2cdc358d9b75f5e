# SPDX-License-Identifier: Apache-2.0
"""Compiling soon and once, for tests and the processes that they start: most of a test's time goes into it."""

import os
import tempfile
from pathlib import Path

# LLVM's passes cost more than they bring, and the older of XLA's two ways to write a fusion takes half the time of the
# newer.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"


def programs() -> str:
    """A folder for compiled ones, the same for all processes that run tests of one user here."""
    folder = Path(tempfile.gettempdir()) / f"jaxserve-tests-{os.getuid()}" / "xla"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
