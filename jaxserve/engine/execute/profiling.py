# SPDX-License-Identifier: Apache-2.0
"""Traces of the device and of the steps of the engine, in the form that XProf and Perfetto read."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax

from jaxserve.errors import JaxserveError


class Profiler:
    def __init__(self) -> None:
        self._folder: Path | None = None

    def start(self, folder: str | Path) -> None:
        if self._folder is not None:
            raise JaxserveError(f"a trace into {self._folder} is being taken", "stop it first")
        try:
            wanted = Path(folder).expanduser()
            wanted.mkdir(parents=True, exist_ok=True)
        except (OSError, TypeError, ValueError) as error:
            raise JaxserveError(f"cannot write a trace to {folder!r}: {error}", "name another folder") from None
        jax.profiler.start_trace(wanted)
        self._folder = wanted

    def stop(self) -> Path:
        """The folder that the trace is in."""
        if self._folder is None:
            raise JaxserveError("no trace is being taken", "start one first")
        folder, self._folder = self._folder, None
        jax.profiler.stop_trace()
        return folder

    def step(self, number: int) -> AbstractContextManager[object]:
        """Names a step in the trace; costs nothing while none is taken."""
        if self._folder is None:
            return nullcontext()
        return jax.profiler.StepTraceAnnotation("step", step_num=number)
