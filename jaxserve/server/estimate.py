# SPDX-License-Identifier: Apache-2.0
"""Estimates when a request can be done, so that one that cannot meet its deadline is refused at once.

The wait in the queue is estimated from how many sequences come first and how long sequences have kept their rows. What
a request computes is taken at its least: the fastest steps that were measured, cached prompts where there may be any,
and only tokens that it must generate. What is not known yet counts as nothing: it is no reason to refuse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxserve.engine.capacity import Limits
from jaxserve.types.metrics import STEP_TOKENS, EngineMetrics
from jaxserve.types.request import Request

WEIGHT = 0.1  # of a new duration in the mean
LONGEST_WAIT = 60  # the largest Retry-After
FIRST_WAIT = 5  # the Retry-After while nothing is known
SHORTEST_WAIT = 2  # while the model is loading, after which programs may be compiled


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds."""

    queue: float
    compute: float

    @property
    def total(self) -> float:
        return self.queue + self.compute


class Estimator:
    def __init__(self) -> None:
        self._row_seconds = 0.0  # how long a sequence keeps its row; 0: not known
        self._ended = 0

    def ended(self, seconds: float) -> None:
        """A sequence has kept its row for so long."""
        self._ended += 1
        self._row_seconds += max(WEIGHT, 1 / self._ended) * (seconds - self._row_seconds)

    def of(self, requests: Sequence[Request], load: "Load") -> Estimate:
        """The estimate for new requests of one tenant, until all of them are done."""
        rows, stats, limits = sum(each.params.n for each in requests), load.stats, load.limits
        # With priorities, later requests may be served first, and how many is not known.
        queue = 0.0 if limits.priority else self._queue(requests[0].tenant, rows, load)
        compute = 0.0 if stats is None else max(_compute(each, stats, limits) for each in requests)
        return Estimate(queue=queue, compute=compute)

    def _queue(self, tenant: str, rows: int, load: "Load") -> float:
        """Seconds until the last of so many new sequences has a row."""
        running, waiting = load.split()
        free = 0 if waiting else load.limits.max_num_seqs - running
        first = _ahead(tenant, load.open, waiting)
        return max(0.0, first + rows - free) * self._row_seconds / max(running, 1)

    def retry_after(self, load: "Load") -> int:
        """Seconds until the sequences that wait now have begun."""
        running, waiting = load.split()
        return whole(waiting * self._row_seconds / max(running, 1))


@dataclass(frozen=True, kw_only=True)
class Load:
    """What an engine has to do."""

    open: Mapping[str, int]  # sequences that run or wait, by tenant
    stats: EngineMetrics | None
    limits: Limits

    def split(self) -> tuple[int, int]:
        """How many of the open sequences run and wait: by their number, or as the engine has reported, which may be
        fewer than have rows if blocks are short."""
        count = sum(self.open.values())
        waiting = max(0, count - self.limits.max_num_seqs)
        if self.stats is not None and self.stats.waiting > waiting:
            waiting = min(self.stats.waiting, count)
        return count - waiting, waiting


def whole(seconds: float) -> int:
    """As a Retry-After."""
    return min(max(math.ceil(seconds), 1), LONGEST_WAIT)


def until_loaded(*, done: int, total: int, seconds: float) -> int:
    """When to ask again for a model of which so much was loaded in so many seconds."""
    if not (done and total and seconds > 0):
        return FIRST_WAIT
    return max(whole(seconds * (total - done) / done), SHORTEST_WAIT)


def shown(seconds: float) -> str:
    """In a sentence: 0.0004, 0.05, 2.5, 30."""
    if seconds < 0.0095:  # else it would be 0.00
        return f"{seconds:.1g}"
    digits = 0 if seconds >= 9.95 else 1 if seconds >= 0.95 else 2
    return f"{seconds:.{digits}f}".removesuffix(".0")


def _ahead(tenant: str, counts: Mapping[str, int], waiting: int) -> float:
    """How many waiting sequences come before a new one of this tenant: tenants take turns. How many of a tenant's
    sequences wait is not known here; each has the same part."""
    part = waiting / max(sum(counts.values()), 1)
    own = counts.get(tenant, 0) * part
    return own + sum(min(count * part, own + 1) for other, count in counts.items() if other != tenant)


def _compute(request: Request, stats: EngineMetrics, limits: Limits) -> float:
    measured = [seconds for seconds in stats.step_seconds if seconds]
    if not measured:
        return 0.0
    budget, prompt = limits.max_num_batched_tokens, len(request.prompt_token_ids)
    if request.embed and request.pool == "first":
        prompt = 1
    # A step of the bucket that a full chunk falls into, if there was one.
    full = stats.step_seconds[sum(bound < min(prompt, budget) for bound in STEP_TOKENS)] or min(measured)
    skips = request.params.skip_reading_prefix_cache or request.averages
    cached = limits.enable_prefix_caching and not skips
    chunks = 1 if cached else math.ceil(prompt / budget)
    first = min(measured) if cached else full
    return chunks * first + (_least(request, limits) - 1) * min(measured)


def _least(request: Request, limits: Limits) -> int:
    """The number of tokens that a sample must have, at least."""
    params = request.params
    if not request.generates or request.beam_search is not None:
        return 1
    if not params.ignore_eos or params.stops or params.stop_token_ids:
        return max(params.min_tokens, 1)
    room = limits.max_model_len - len(request.prompt_token_ids)
    return max(1, room if params.max_tokens is None else min(params.max_tokens, room))
