# SPDX-License-Identifier: Apache-2.0
"""Drives an engine with a small real model request by request, and checks all invariants after each turn.

Compiling is nearly all of the time that such engines take, and engines of equal shapes share their programs. So there
is one shape, and what a test wants scarcer (blocks, tokens in a step) is made so on the host alone.
"""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.progress import Report
from jaxserve.engine.schedule.drafts import MOST, Drafter
from jaxserve.models import decoder, param_layout
from jaxserve.models.cache_groups import groups_of
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.types.outputs import FinishReason, TokenLogprobs, Update
from jaxserve.types.request import Request
from tests.engine.schedule.integrity import check_integrity
from tests.fast import programs
from tests.models import tiny

ROWS, TOKENS, BLOCK, LONGEST, TOP = 4, 32, 8, 64, 5
BLOCKS = 1 + ROWS * LONGEST // BLOCK
EOS = 3

# All layers see everything: no block is freed before its sequence ends.
FULL = replace(
    tiny.model(
        tiny.block(tiny.grouped(qkv_bias=True, out_bias=True, sinks=True), tiny.MLP),
        tiny.block(tiny.grouped(), tiny.MLP),
    ),
    max_positions=LONGEST,
)
# No layer sees further than 20 tokens.
WINDOWED = replace(
    FULL,
    layers=(tiny.block(tiny.grouped(window=20, sinks=True), tiny.MLP), tiny.block(tiny.grouped(window=20), tiny.MLP)),
)
# Two layers see everything, two a little: two cache groups of two layers.
MIXED = replace(
    FULL,
    layers=(
        tiny.block(tiny.grouped(window=6, sinks=True), tiny.MLP),
        tiny.block(tiny.grouped(), tiny.MLP),
        tiny.block(tiny.grouped(), tiny.MLP),
        tiny.block(tiny.grouped(window=6), tiny.MLP),
    ),
)
VOCABULARY = FULL.vocab_size


@cache
def public_of(spec: ModelSpec) -> Params:
    """With this seed, greedy texts do not soon repeat themselves."""
    return tiny.public_params(spec, seed=21)


@cache
def params_of(spec: ModelSpec) -> Params:
    return param_layout.to_engine_layout(spec, public_of(spec))


@jax.jit
def _forward_full(params: Params, tokens: jax.Array) -> jax.Array:
    return decoder.forward(FULL, params, tokens)


def logits_of(tokens: list[int], params: Params | None = None) -> np.ndarray:
    """The dense model's logits after each of these tokens, in one program."""
    line = np.zeros((1, LONGEST), np.int32)
    line[0, : len(tokens)] = tokens
    return np.asarray(_forward_full(params_of(FULL) if params is None else params, jnp.asarray(line)))[0, : len(tokens)]


@dataclass
class Stream:
    """All updates of one sample."""

    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    cached: int = 0
    embedding: bytes | None = None

    def take(self, update: Update) -> None:
        assert self.finish_reason is None, "reported after its end"
        self.tokens += update.token_ids
        self.logprobs += update.logprobs or []
        self.prompt_logprobs += update.prompt_logprobs or []
        self.finish_reason, self.stop_reason, self.error = update.finish_reason, update.stop_reason, update.error
        self.cached, self.embedding = update.num_cached_tokens, update.embedding


type Streams = dict[tuple[str, int], Stream]


class Known:
    """Drafts from the answers of another run, of which some are changed; `rate` is the share that is not."""

    def __init__(self, streams: Streams, *, rate: float) -> None:
        self.streams, self.rate = streams, rate

    def of(self, request: Request) -> Drafter:
        return _KnownOf(self, request)


class _KnownOf:
    def __init__(self, known: Known, request: Request) -> None:
        self.rate, self.prompt = known.rate, list(request.prompt_token_ids)
        self.answers = [known.streams[request.id, index].tokens for index in range(request.params.n)]

    def propose(self, tokens: list[int]) -> list[int]:
        output = tokens[len(self.prompt) :]
        draws = random.Random(len(tokens))
        right = next((text[len(output) :] for text in self.answers if text[: len(output)] == output), [1])
        return [token if draws.random() < self.rate else (token + 1) % VOCABULARY for token in right[:6]]


class Driver:
    """An engine and its updates. `spare` is the number of blocks to leave free for each cache group, `budget` the
    tokens per step, `drafts` what all requests get."""

    def __init__(
        self,
        spec: ModelSpec = FULL,
        *,
        params: Params | None = None,
        spare: int | None = None,
        budget: int = TOKENS,
        eos: bool = True,
        report: Report = lambda line: None,
        drafts: Known | None = None,
        **config: Any,
    ) -> None:
        groups = len(groups_of(spec, LONGEST).windows)
        given: dict[str, Any] = dict(
            model="tiny",
            max_num_seqs=ROWS,
            max_num_batched_tokens=TOKENS,
            block_size=BLOCK,
            num_blocks=1 + groups * (BLOCKS - 1),
            max_logprobs=TOP,
            warmup=False,
            compilation_cache_dir=programs(),
        )
        self.engine = Engine(
            EngineConfig(**given | config),
            spec=spec,
            params=params_of(spec) if params is None else params,
            report=report,
        )
        self.scheduler, self.runner = self.engine.scheduler, self.engine.runner
        if eos:
            self.engine.also_ends([EOS])
        self.budget, self.drafts = budget, drafts
        self.scheduler.limits = replace(self.scheduler.limits, max_num_batched_tokens=budget)
        self.held: list[int] = []
        if spare is not None:
            self.hold(groups * (BLOCKS - 1 - spare))
        self.streams: Streams = {}
        self.turns = self.copied = 0
        self._watch_copies()

    def hold(self, count: int) -> None:
        """Make blocks scarce."""
        taken = self.scheduler.pool.allocate(count)
        assert taken is not None
        self.held += taken

    def let_go(self) -> None:
        self.scheduler.pool.release(self.held)
        self.held = []

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.streams |= {(request.id, index): Stream() for index in range(request.params.n)}
            self.engine.add(request, drafted_by=self.drafts.of(request) if self.drafts else None)

    def turn(self) -> list[Update]:
        updates = self.engine.step()
        self.turns += 1
        for update in updates:
            self.streams[update.request_id, update.index].take(update)
        self.check()
        return updates

    def finish(self, *requests: Request) -> Streams:
        """Add these and run until the engine is empty; return the updates since the last call."""
        self.add(*requests)
        for _ in range(2000):
            if not self.engine.unfinished:
                break
            self.turn()
        else:
            raise AssertionError("it never ends")
        streams, self.streams = self.streams, {}
        for name, stream in streams.items():
            assert stream.finish_reason is not None, f"{name} was not reported to have ended"
        assert self.scheduler.pool.counts()[2] == len(self.held), "blocks are left behind"
        return streams

    def check(self) -> None:
        """Check what must hold between any two turns."""
        scheduler = self.scheduler
        assert scheduler.limits.max_num_batched_tokens == self.budget
        alive = [sequence for group in scheduler.requests.values() for sequence in group]
        owned = Counter(block for s in alive for table in s.blocks for block in table if block)
        owned.update(self.held)
        check_integrity(scheduler.pool, owned)
        running = scheduler.running
        assert sorted(s.order for s in running) == [s.order for s in running]
        rows = [s.row for s in running]
        assert len(set(rows)) == len(rows) and all(0 <= row < ROWS for row in rows)
        assert all(s.row < 0 and not any(s.blocks) for s in alive if s not in running)
        for s in running:
            assert s.computed <= len(s.tokens) + s.pending <= s.end
            for first, table in zip(s.first_blocks, s.blocks, strict=True):
                spare = len(table) * BLOCK - s.computed
                assert 0 <= spare < BLOCK + (MOST if self.drafts else 0), "blocks that no token is in, or too few"
                assert all(block == 0 for block in table[:first])
                assert all(block != 0 for block in table[first:])

    def _watch_copies(self) -> None:
        launch = self.runner.launch

        def watched(message: Any) -> Any:
            self.copied += len(message.edits)
            return launch(message)

        self.runner.launch = watched


def alone(driver: Driver, requests: Iterable[Request]) -> Streams:
    """Run each request alone, with nothing cached."""
    streams: Streams = {}
    for request in requests:
        driver.engine.reset_prefix_cache()
        streams |= driver.finish(request)
    return streams
