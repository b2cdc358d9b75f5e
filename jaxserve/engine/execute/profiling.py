# SPDX-License-Identifier: Apache-2.0
"""Profiler traces of devices and engine steps, readable by XProf and Perfetto."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax

from jaxserve.errors import JaxserveError


class Profiler:
    def __init__(self) -> None:
        self._folder: Path | None = None

    def start(self, folder: str | Path) -> None:
        if self._folder is not None:
            raise JaxserveError(f"a trace to {self._folder} is already running", "stop it first")
        try:
            wanted = Path(folder).expanduser()
            wanted.mkdir(parents=True, exist_ok=True)
        except (OSError, TypeError, ValueError) as error:
            raise JaxserveError(f"cannot write a trace to {folder!r}: {error}", "choose another folder") from None
        jax.profiler.start_trace(wanted)
        self._folder = wanted

    def stop(self) -> Path:
        """Stop the trace and return its folder."""
        if self._folder is None:
            raise JaxserveError("no trace is running", "start one first")
        folder, self._folder = self._folder, None
        jax.profiler.stop_trace()
        return folder

    def step(self, number: int) -> AbstractContextManager[object]:
        """Annotate a step in the trace; costs nothing while no trace is running."""
        if self._folder is None:
            return nullcontext()
        return jax.profiler.StepTraceAnnotation("step", step_num=number)
