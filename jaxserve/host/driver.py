# SPDX-License-Identifier: Apache-2.0
"""The loop that runs an engine: calls in, a step, updates out, aborts back in. For LLM, threads and child processes.

host.calls      -> add, abort, and whatever else callers want between two steps
engine.step     -> updates, with the beams of a search replaced by its result
host.take       -> updates to whoever waits for them; what it gives back is aborted: samples at a stop string
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from jaxserve.errors import EngineError
from jaxserve.host.beam_search import BeamSearch
from jaxserve.types.outputs import Update
from jaxserve.types.request import Abort, Request

if TYPE_CHECKING:  # it imports jax, which takes seconds; a child process reports that it starts before that
    from jaxserve.engine.engine import Engine


class Host(Protocol):
    """Who runs an engine: the callers' side of the loop."""

    def calls(self, *, idle: bool) -> bool:
        """Does what callers asked for since the last turn; False ends the loop. An idle engine has nothing to compute
        until then, so this may wait."""
        ...

    def take(self, updates: list[Update]) -> Iterable[Abort]:
        """Once per turn, also without updates. Returns what the engine must end early."""
        ...


class Driver:
    """One engine and the beam searches that run in it. For one thread."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self._searches: dict[str, BeamSearch] = {}  # by request id

    def run(self, host: Host) -> None:
        """Turns until the host ends it, or the engine fails."""
        engine = self.engine
        while host.calls(idle=not engine.unfinished):
            updates = self.step() if engine.unfinished else []
            for abort in host.take(updates):
                engine.abort(abort.request_id, index=abort.index, reason=abort.reason)

    def add(self, request: Request) -> None:
        """Raises a RequestError if the engine cannot serve it."""
        if request.beam_search is None:
            self.engine.add(request)
        else:
            search = BeamSearch(self.engine, request, request.beam_search)
            search.start()
            self._searches[request.id] = search

    def step(self) -> list[Update]:
        updates = self.engine.step()
        return self._with_searches(updates) if self._searches else updates

    def _with_searches(self, updates: list[Update]) -> list[Update]:
        shown: list[Update] = []
        ended: set[str] = set()
        for update in updates:
            search = self._searches.get(update.request_id)
            if search is None:
                shown.append(update)
            elif update.request_id not in ended and (result := search.take(update)):
                shown += result
                ended.add(update.request_id)
        for request_id in ended:
            del self._searches[request_id]
        return shown

    def end_all(self) -> None:
        """Leaves nothing in the engine: aborts every request, and drops their last updates."""
        engine = self.engine
        with suppress(EngineError):
            engine.check_alive()
            for request_id in engine.in_flight():
                engine.abort(request_id)
            while engine.unfinished:
                engine.step()
        if engine.error is not None:
            engine.fail_all()
        self._searches.clear()
