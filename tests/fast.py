# SPDX-License-Identifier: Apache-2.0
"""Makes compilation fast for tests and the processes they start: cheap options, and each program once."""

import os
import tempfile
from pathlib import Path

# LLVM's optimization passes cost more than they gain here. XLA's older fusion emitters compile in half the time of the
# newer ones. Code that is not split for parallel generation, and the plain scheduler, save another quarter, and a third
# of the memory maps of a program (see conftest.py).
XLA_FLAGS = (
    "--xla_backend_optimization_level=0"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)


def programs() -> str:
    """A folder for compiled programs, shared by all test processes of a user on this machine."""
    folder = Path(tempfile.gettempdir()) / f"jaxserve-tests-{os.getuid()}" / "xla"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
