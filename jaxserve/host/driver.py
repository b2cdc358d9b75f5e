# SPDX-License-Identifier: Apache-2.0
"""The loop that runs an engine: calls in, a step, updates out, aborts back in. For LLM, threads and child processes.

host.calls      runs the callers' calls between two steps: add, abort, ...
engine.step     returns updates; those of a beam search are replaced by its result
host.take       delivers updates to consumers; returns what to abort, such as samples that reached a stop string
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from jaxserve.errors import EngineError
from jaxserve.host.beam_search import BeamSearch
from jaxserve.types.outputs import Update
from jaxserve.types.request import Abort, Request

if TYPE_CHECKING:  # it imports jax, which takes seconds; a child process reports that it is starting before that
    from jaxserve.engine.engine import Engine


class Host(Protocol):
    """The callers' side of the loop."""

    def calls(self, *, idle: bool) -> bool:
        """Run the calls made since the last turn; return False to end the loop. May block while the engine is idle."""
        ...

    def take(self, updates: list[Update]) -> Iterable[Abort]:
        """Deliver the updates; called once per turn, even without updates. Returns what the engine must end early."""
        ...


class Driver:
    """One engine and its beam searches. Not thread-safe."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self._searches: dict[str, BeamSearch] = {}  # by request id

    def run(self, host: Host) -> None:
        """Run turns until the host ends the loop or the engine fails."""
        engine = self.engine
        while host.calls(idle=not engine.unfinished):
            updates = self.step() if engine.unfinished else []
            for abort in host.take(updates):
                engine.abort(abort.request_id, index=abort.index, reason=abort.reason)

    def add(self, request: Request) -> None:
        """Add a request. Raises a RequestError if the engine cannot serve it."""
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
        """Clear the engine: abort every request and drop their last updates."""
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
