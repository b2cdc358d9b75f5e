# SPDX-License-Identifier: Apache-2.0
"""A device in plain numpy with the runner's `launch` and `read`, an oracle for its results, an engine around it.

The device executes a step as the programs do: block table edits and copies, slots from positions and tables, tokens
fed forward by row. In the slot of each token it stores the token, its position, and a digest of all that the token
attended to. A row of logits attends to these through its block table; the next token is a hash of them and of the row's
sampling parameters. So a wrong block, a stale edit, a missed copy, two owners, a wrong position, a late token or the
parameters of another request change the result, or are found at once: no slot with a wrong position is attended to.

The oracle computes the same result from the request alone.
"""

import random
import struct
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any
from zlib import crc32

import numpy as np

from jaxserve.engine.buckets import Available, Buckets
from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule import drafts, need, packing
from jaxserve.engine.schedule.drafts import Drafter
from jaxserve.engine.schedule.masks import Words
from jaxserve.engine.schedule.need import Variant
from jaxserve.engine.schedule.packing import FIXED, GIVEN, ROW, SAMPLES, TOKEN, Batcher, Ints, StepMessage
from jaxserve.engine.schedule.plan import StepPlan, StepResult
from jaxserve.engine.schedule.scheduler import Scheduler
from jaxserve.engine.schedule.sequence import Sequence, Status, order_of, stops_of
from jaxserve.sampling import control_row
from jaxserve.sampling.columns import COLUMNS
from jaxserve.types.outputs import FinishReason, TokenLogprobs, Update
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.schedule.integrity import check_integrity

type Digests = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

POISON = -7  # a position that no token has
TOP = 2  # likeliest tokens

VOCAB, EOS = 40, 3
STEMS = [random.Random(seed).choices(range(VOCAB), k=40) for seed in (1, 2)]


# --- the made-up model ----------------------------------------------------------------------------------------------


def digest(attended: Ints) -> int:
    """A digest of the tokens that a token attends to, including itself: what its KV depends on."""
    return crc32(attended.astype("<i4").tobytes())


def advanced(state: int, token: int) -> int:
    """The state of a recurrent layer after a token."""
    return crc32(struct.pack("<Ii", state, token))


def first_seen(window: int | None, position: int) -> int:
    """The first token that a token attends to."""
    return 0 if window is None else max(0, position - window + 1)


def draw(tokens: Ints, digests: Digests, way: bytes) -> int:
    """A hash of a whole history and of the row's sampling parameters; the other results of a step derive from it."""
    return crc32(digests.astype("<i8").tobytes(), crc32(tokens.astype("<i4").tobytes(), crc32(way)))


def pick(drawn: int, vocab_size: int, masked: frozenset[int]) -> int:
    return next(token for i in range(vocab_size) if (token := (drawn + i) % vocab_size) not in masked)


def likelihood(drawn: int, token: int) -> tuple[float, int, list[int], list[float]]:
    """The log probability and rank of a token, and the most likely tokens with their log probabilities."""
    mixed = crc32(struct.pack("<Iq", drawn, token))
    return -(mixed % 1024) / 64, 1 + mixed % 9, [drawn % 11, drawn % 13], [-(drawn % 64) / 8, -(drawn % 32) / 4]


def embedded(drawn: int) -> list[int]:
    """Small whole numbers, which are exact in float32."""
    return list(struct.pack("<I", drawn))


def way(position: int, numbers: list[int], recent: list[int], codes: Mapping[int, int]) -> bytes:
    """A row's sampling parameters; a greedy row ignores most of them."""
    used = numbers if numbers[COLUMNS.index("temperature")] else numbers[:1]
    known = [*recent, *(number for pair in sorted(codes.items()) if pair[1] for number in pair)]
    return struct.pack(f"<q{len(used)}q{len(known)}q", position, *used, *known)


# --- the device -----------------------------------------------------------------------------------------------------


@dataclass
class Controls:
    """A row's control state, as in the real one: generated tokens are counted on the device."""

    recent: list[int]
    stops: frozenset[int]
    min_end: int
    penalized: bool
    forbidden: frozenset[int] = frozenset()  # by the mask of this step
    codes: Counter[int] = field(default_factory=Counter[int])

    @classmethod
    def of(cls, parts: dict[str, Ints]) -> "Controls":
        penalties = parts["penalties"].view(np.float32).tolist()
        recent = [token for token in parts["recent"].tolist() if token != control_row.NO_TOKEN]
        stops = frozenset(token for token in parts["stop_ids"].tolist() if token != control_row.NOWHERE)
        return cls(recent, stops, int(parts["min_end"][0]), tuple(penalties) != control_row.PENALTIES_OFF)

    def add(self, token: int) -> None:
        self.recent = [*self.recent, token][-control_row.RECENT_TOKENS :]
        if self.penalized:
            self.codes[token] += 2


class FakeDevice:
    def __init__(self, limits: Limits, buckets: Buckets) -> None:
        self.limits, self.buckets = limits, buckets
        shape = (limits.num_blocks, limits.block_size)
        self.tokens, self.positions = np.full(shape, POISON, np.int32), np.full(shape, POISON, np.int32)
        self.groups = np.full(shape, POISON, np.int32)  # whose KV a slot holds
        self.digests = np.zeros(shape, np.int64)
        self.tables = np.zeros((limits.groups, buckets.rows, limits.width), np.int32)
        self.last = np.full((buckets.rows, 2), POISON, np.int32)
        self.states = np.full(buckets.rows, POISON, np.int64)  # of a recurrent layer: a digest of all tokens
        self.controls: dict[int, Controls] = {}
        self.broken: set[int] = set()  # a row of logits that attends to one of these tokens is not finite
        self.launched: list[StepMessage] = []

    def poison(self, blocks: list[int]) -> None:
        """Fill memory that must not be read."""
        for array in (self.tokens, self.positions):
            array[blocks] = POISON

    def launch(self, packed: StepMessage) -> tuple[StepMessage, StepResult]:
        return self.launch_head(self.launch_model(packed), [])

    def launch_head(self, handle: tuple[Any, ...], masks: list[Words]) -> tuple[StepMessage, StepResult]:
        for vectors in masks:
            for row, *words in vectors[vectors[:, 0] < self.buckets.rows].tolist():
                bits = np.unpackbits(np.array(words, np.int32).view(np.uint8), bitorder="little")
                self.controls[row].forbidden = frozenset(np.flatnonzero(bits[: self.limits.vocab_size] == 0).tolist())
        return handle[0], self._head(*handle)

    def launch_model(self, packed: StepMessage) -> tuple[Any, ...]:
        self.launched = [packed]
        for vector in packed.edits:
            assert vector.size == packing.EDIT_SIZE
            cells, blocks = vector[: packing.EDITS_AT_ONCE], vector[packing.EDITS_AT_ONCE : 2 * packing.EDITS_AT_ONCE]
            self._edit(cells, blocks)
            self._copy(vector[2 * packing.EDITS_AT_ONCE :])
        for sources, destinations in packed.states:
            used = destinations >= 0
            self.states[destinations[used]] = self.states[sources[used]]
        self._set_controls(packed)
        layout = packed.layout
        assert layout in self.layouts() and packed.vector.dtype == np.int32 and packed.vector.size == layout.size
        parts = {name: packed.vector[at] for name, at in packing.places(layout).items()}
        self._edit(parts["cells"], parts["blocks"])
        lines, positions = self._write(parts, decode=layout.decode)
        states = self._advance(lines, positions)
        return packed, parts, lines, positions, states

    def _set_controls(self, message: StepMessage) -> None:
        sections = control_row.sections(self.limits.vocab_size)
        for vectors in message.controls:
            assert len(vectors) in control_row.ROWS_AT_ONCE and vectors.dtype == np.int32
            for vector in vectors[vectors[:, 0] != control_row.NOWHERE]:
                assert 0 <= vector[0] < self.buckets.rows
                self.controls[int(vector[0])] = Controls.of({name: vector[at] for name, at in sections.items()})
        for triples in message.counts:
            assert triples.shape == control_row.COUNT_SHAPE and triples.dtype == np.int32
            for row, token, code in triples[:, triples[0] != control_row.NOWHERE].T.tolist():
                self.controls[row].codes[token] += code

    def read(self, handle: tuple[StepMessage, StepResult]) -> StepResult:
        return handle[1]

    def layouts(self) -> list[packing.Layout]:
        """The shapes that are compiled."""
        size, groups = self.limits.block_size, self.limits.groups
        mixed = [packing.mixed_layout(tokens, self.buckets, size, groups) for tokens in self.buckets.mixed]
        return [*mixed, *(packing.decode_layout(rows, groups) for rows in self.buckets.decode)]

    def _edit(self, cells: Ints, blocks: Ints) -> None:
        used = cells >= 0
        assert np.unique(cells[used]).size == np.count_nonzero(used), "a cell is edited twice, in no order"
        self.tables.reshape(-1)[cells[used]] = blocks[used]

    def _copy(self, vector: Ints) -> None:
        sources, destinations = (half[half >= 0] for half in np.split(vector, 2))
        assert sources.size == destinations.size == np.unique(destinations).size
        assert not set(sources.tolist()) & set(destinations.tolist()), "blocks move in no order"
        for array in (self.tokens, self.positions, self.groups, self.digests):
            array[destinations] = array[sources]

    def _write(self, parts: dict[str, Ints], *, decode: bool) -> tuple[Ints, Ints]:
        """Write the KV of all tokens before any is attended to, as layers do. Returns the line and position of each."""
        starts, rows, kv_lens = parts["starts"], parts["rows"], parts["kv_lens"]
        singles, count = parts["distribution"].tolist()
        counts = np.diff(starts)[:count]
        assert (counts[:singles] == 1).all() and (counts[singles:] > 1).all() and (counts > 0).all()
        assert (rows[:count] < self.buckets.rows).all() and np.unique(rows[:count]).size == count
        assert (rows[count:] == self.buckets.rows).all() and not kv_lens[count:].any()
        assert (counts[kv_lens[:count] < 0] == 1).all() and (kv_lens[:count] >= -1).all()
        fed, fed_lengths = self.last[rows[:count]].T
        assert (fed_lengths[kv_lens[:count] < 0] > 0).all(), "the device has no length for a row"
        kv_lens: Ints = np.where(kv_lens[:count] < 0, fed_lengths - kv_lens[:count], kv_lens[:count])
        lines = np.repeat(np.arange(count), counts)
        ends = np.cumsum(counts)
        positions = kv_lens[lines] - (ends[lines] - np.arange(lines.size))
        fed = fed[lines]
        tokens = np.where(parts["tokens"][: lines.size] < 0, fed, parts["tokens"][: lines.size])
        assert (tokens >= 0).all() and (tokens < self.limits.vocab_size).all()
        blocks = self.tables[:, rows[lines], positions // self.limits.block_size]
        assert (blocks > 0).all(), "the null block is written"
        places = np.broadcast_to(positions % self.limits.block_size, blocks.shape)
        assert np.unique(blocks * self.limits.block_size + places).size == blocks.size, "a slot is written twice"
        self.tokens[blocks, places], self.positions[blocks, places] = tokens, positions
        self.groups[blocks, places] = np.arange(len(blocks))[:, None]
        for at, (line, position) in enumerate(zip(lines.tolist(), positions.tolist(), strict=True)):
            attended, _ = self._attend(int(rows[line]), position)
            self.digests[blocks[:, at], places[:, at]] = digest(attended)
        return rows[lines], positions

    def _advance(self, rows: Ints, positions: Ints) -> Digests:
        """The state of each token's row after it, if layers keep one."""
        if not self.limits.states:
            return np.zeros((rows.size, 0), np.int64)
        after = np.zeros((rows.size, 1), np.int64)
        for at, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            block = self.tables[0, row, position // self.limits.block_size]
            token = int(self.tokens[block, position % self.limits.block_size])
            before = int(self.states[row]) if position else 0
            after[at] = self.states[row] = advanced(before, token)
        return after

    def _attend(self, row: int, position: int) -> tuple[Ints, Digests]:
        """The tokens and digests that a token attends to in all groups, through its row's tables."""
        tokens: list[Ints] = []
        digests: list[Digests] = []
        for group, window in enumerate(self.limits.windows):
            seen = np.arange(first_seen(window, position), position + 1)
            slots = (self.tables[group, row, seen // self.limits.block_size], seen % self.limits.block_size)
            own = (self.positions[slots] == seen) & (self.groups[slots] == group)
            assert own.all(), f"row {row} at {position} sees slots of others"
            tokens.append(self.tokens[slots])
            digests.append(self.digests[slots])
        return np.concatenate(tokens), np.concatenate(digests)

    def _head(
        self, packed: StepMessage, parts: dict[str, Ints], rows: Ints, positions: Ints, states: Digests
    ) -> StepResult:
        entries = parts["entries"].reshape(-1, len(packing.ENTRY))
        assert (entries[packed.entries :, ROW] == self.buckets.rows).all()
        tokens: list[int] = []
        valid: list[bool] = []
        likely: list[tuple[float, int, list[int], list[float]]] = []
        fed: dict[int, tuple[int, int]] = {}
        ended: set[int] = set()
        embeddings: list[list[int]] = []
        embeds = 0
        for entry in entries[: packed.entries].tolist():
            at, row, numbers = entry[TOKEN], entry[ROW], entry[FIXED:]
            # A fork samples from the logits of a token of another row; the token after it is what is asked for.
            position = int(positions[at]) + 1
            seen, digests = self._attend(int(rows[at]), int(positions[at]))
            digests = np.append(digests, states[at])
            drawn = draw(seen, digests, b"")
            valid.append(not self.broken & set(seen.tolist()))
            token = given = entry[GIVEN]
            embeddings.append(embedded(drawn))
            if entry[SAMPLES]:
                token = self._sample(row, position, numbers, seen, digests)
                assert given < 0 or not numbers[COLUMNS.index("controlled")], "drafts of a row with controls"
                if row not in ended:
                    fed[row] = token, position
                if token != given:
                    ended.add(row)
            else:
                assert row == rows[at]
                embeds += token < 0
            tokens.append(token)
            likely.append(likelihood(drawn, token))
        assert ended == fed.keys()
        for row, found in fed.items():
            self.last[row] = found
        assert embeds == packed.embeds
        result = self._result(packed.head, tokens, valid, likely)
        if embeds:
            result.embeddings = np.array(embeddings, np.float32)
        return result

    def _sample(self, row: int, position: int, numbers: list[int], seen: Ints, digests: Digests) -> int:
        own = self.controls.get(row) if numbers[COLUMNS.index("controlled")] else None
        assert own is not None or not numbers[COLUMNS.index("controlled")]
        drawn = draw(seen, digests, way(position, numbers, *((own.recent, own.codes) if own else ([], {}))))
        stops = own.stops if own and position < own.min_end else frozenset[int]()
        token = pick(drawn, self.limits.vocab_size, own.forbidden | stops if own else stops)
        if own:
            own.add(token)
        return token

    @staticmethod
    def _result(
        head: Variant, tokens: list[int], valid: list[bool], likely: list[tuple[float, int, list[int], list[float]]]
    ) -> StepResult:
        result = StepResult(tokens, valid)
        if head.top_n is not None and likely:
            logprobs, ranks, top_tokens, top_logprobs = zip(*likely, strict=True)
            width = min(TOP, head.top_n)
            result.logprobs, result.ranks = np.array(logprobs, np.float32), np.array(ranks, np.int32)
            result.top_tokens = np.array(top_tokens, np.int32)[:, :width]
            result.top_logprobs = np.array(top_logprobs, np.float32)[:, :width]
        return result


# --- the oracle -----------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """All results of a sample, actual or expected."""

    tokens: list[int] = field(default_factory=list[int])
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    embedding: bytes | None = None
    scheduled: float | None = None
    reported: bool = False  # of anything

    def take(self, update: Update) -> None:
        assert self.reason is None, f"news after the end: {update}"
        self.tokens += update.token_ids
        self.logprobs += update.logprobs or []
        self.embedding = update.embedding
        if self.reported:
            assert update.scheduled is None, "reported again when it got its row"
        else:
            self.scheduled, self.reported = update.scheduled, True
        self.reason, self.stop_reason, self.error = update.finish_reason, update.stop_reason, update.error


def codes_of(request: Request, output: list[int]) -> Counter[int]:
    """What the penalties of a request count."""
    params, codes = request.params, Counter[int]()
    if params.penalized:
        codes.update({token: 2 * count for token, count in Counter(output).items()})
    if params.repetition_penalty != 1:
        codes.update(dict.fromkeys(request.prompt_token_ids, 1))
    return codes


class Oracle:
    """Generate one token after the other from the whole history."""

    def __init__(self, limits: Limits, masked: Collection[str] = ()) -> None:
        """`masked`: ids of requests whose tokens are ByLast's."""
        self.limits, self.masked = limits, masked

    def _seen(self, tokens: list[int], position: int) -> tuple[Ints, Digests]:
        array, windows = np.array(tokens, np.int32), self.limits.windows

        def attended(p: int) -> Ints:
            return np.concatenate([array[first_seen(window, p) : p + 1] for window in windows])

        digests = np.array([digest(attended(p)) for p in range(position + 1)], np.int64)
        kept = [digests[first_seen(window, position) :] for window in windows]
        if self.limits.states:
            kept.append(np.array([reduce(advanced, tokens[: position + 1], 0)], np.int64))
        return attended(position), np.concatenate(kept)

    def reported(self, tokens: list[int], token: int, wanted: int) -> TokenLogprobs:
        """The log probability of the token that follows these."""
        drawn = draw(*self._seen(tokens, len(tokens) - 1), b"")
        logprob, rank, top_tokens, top_logprobs = likelihood(drawn, token)
        return TokenLogprobs(token, logprob, rank, top_tokens[:wanted], top_logprobs[:wanted])

    def prompt_logprobs(self, request: Request) -> list[TokenLogprobs]:
        prompt, wanted = list(request.prompt_token_ids), request.params.prompt_logprobs
        return [] if wanted is None else [self.reported(prompt[:i], prompt[i], wanted) for i in range(1, len(prompt))]

    def following(self, request: Request, index: int, tokens: list[int]) -> int:
        """The token that a sample has after these."""
        params, output = request.params, tokens[len(request.prompt_token_ids) :]
        controlled = params.min_tokens > 0 or params.penalized or request.id in self.masked
        seed = ((params.seed or 0) % 2**32 ^ (params.seed or 0) >> 32) + index
        floats = np.array([params.temperature, params.top_p, params.min_p], np.float32).view(np.int32).tolist()
        numbers = [int(controlled), (seed + 2**31) % 2**32 - 2**31, *floats[:2], params.top_k, floats[2]]
        recent = output[-control_row.RECENT_TOKENS :] if controlled else []
        masked = stops_of(request, self.limits) if len(output) < params.min_tokens else frozenset[int]()
        if request.id in self.masked:
            masked |= forbidden(output)
        drawn = draw(*self._seen(tokens, len(tokens) - 1), way(len(tokens), numbers, recent, codes_of(request, output)))
        return pick(drawn, self.limits.vocab_size, masked)

    def answer(self, request: Request, index: int) -> Answer:
        params, prompt, limits = request.params, list(request.prompt_token_ids), self.limits
        answer = Answer()
        if request.score_only:
            answer.reason = "length"
            return answer
        if request.embed:
            states = [embedded(draw(*self._seen(prompt, at), b"")) for at in range(len(prompt))]
            found = {
                "first": states[0],
                "last": states[-1],
                "mean": np.average(states, axis=0),
                "weighted_mean": np.average(states, axis=0, weights=np.arange(len(prompt)) + 1),
            }
            answer.reason, answer.embedding = "stop", np.array(found[request.pool], "<f4").tobytes()
            return answer
        stops = stops_of(request, limits)
        tokens = list(prompt)
        while answer.reason is None:
            token = self.following(request, index, tokens)
            if params.logprobs is not None:
                answer.logprobs.append(self.reported(tokens, token, params.logprobs))
            tokens.append(token)
            answer.tokens.append(token)
            if token in stops and len(answer.tokens) >= params.min_tokens:
                answer.reason = "stop"
                plain = token in limits.eos_token_ids and not params.ignore_eos
                answer.stop_reason = None if plain else token
            elif len(answer.tokens) == params.max_tokens or len(tokens) == limits.max_model_len:
                answer.reason = "length"
        return answer


# --- masks ----------------------------------------------------------------------------------------------------------


def forbidden(output: list[int]) -> frozenset[int]:
    """A third of the tokens, which depends on the last one and on how many there are."""
    last = output[-1] if output else 1
    return frozenset(token for token in range(VOCAB) if (token + last + len(output)) % 3 == 0)


class ByLast:
    def allowed(self, output: list[int]) -> Words:
        bits = np.zeros(32 * control_row.mask_words(VOCAB), np.bool_)
        bits[[token for token in range(VOCAB) if token not in forbidden(output)]] = True
        return np.packbits(bits, bitorder="little").view(np.int32)


# --- drafts ---------------------------------------------------------------------------------------------------------

GUESSES = ("right", "wrong", "mixed", "too long", "no tokens", "no list", "fault")


class Guesses:
    """Proposes what a request's first sample goes on with, more or less, also beyond its end."""

    def __init__(self, oracle: Oracle, request: Request, kind: str) -> None:
        self.oracle, self.request, self.kind = oracle, request, kind

    def propose(self, tokens: list[int]) -> list[int]:
        kind, length = self.kind, len(tokens)
        draws = random.Random(length)
        right = list(tokens)
        while len(right) < length + draws.randrange(1, 7):
            right.append(self.oracle.following(self.request, 0, right))
        right = right[length:]
        proposed: dict[str, Any] = {
            "right": right,
            "wrong": [(token + 1) % VOCAB for token in right],
            "mixed": [token if draws.random() < 0.8 else 5 for token in right],
            "too long": right + [5] * 1000,
            "no tokens": [*right, draws.choice([VOCAB, -1, 2**70, "5", 5.0, None]), *right],
            "no list": draws.choice([right, None, 5]),
            "fault": right,
        }
        if kind == "fault" and draws.random() < 0.2:
            raise ZeroDivisionError("no draft")
        return proposed[kind]


# --- the engine around it -------------------------------------------------------------------------------------------


class FakeEngine:
    """An engine that is checked after each turn."""

    def __init__(self, limits: Limits, *, score_rows: int = 8, depth: int = 2, staged: bool = False) -> None:
        """`staged`: only the largest programs are there at first, and one more after each turn."""
        self.limits, self.depth, self.staged = limits, depth, staged
        self.buckets = Buckets.of(limits.max_num_seqs, limits.max_num_batched_tokens, score_rows)
        self.scheduler = Scheduler(limits, score_rows=score_rows)
        self.device = FakeDevice(limits, self.buckets)
        *_, last = need.variants(limits.max_logprobs).values()
        sizes = packing.sizes(self.buckets, [last])
        largest = dict(sorted(sizes, key=lambda pair: pair[1]))
        self._others = sorted(packing.sizes(self.buckets, need.variants(limits.max_logprobs).values()), key=str)
        self.batcher = Batcher(limits, self.buckets, Available(largest.items()) if staged else None)
        self.in_flight: deque[tuple[StepPlan, tuple[StepMessage, StepResult]]] = deque()
        self.answers: dict[tuple[str, int], Answer] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = defaultdict(list)  # whichever sample reported them
        self.plans: list[StepPlan] = []
        self.now = 0.0
        self.drafted: set[str] = set()
        self.masked: set[str] = set()
        self.withdraws = False  # the next plan, as after a fault of nobody that does not come again
        self.rowed: dict[tuple[str, int], float] = {}  # when each sample first had a row

    def __repr__(self) -> str:
        sizes = f"score_rows={self.buckets.score_rows}, depth={self.depth}, staged={self.staged}"
        return f"FakeEngine({self.limits}, {sizes})"

    def add(self, request: Request, *, hold: int = 0, drafted_by: Drafter | None = None, masked: bool = False) -> None:
        self.scheduler.add(request, hold=hold, drafted_by=drafted_by, masked_by=ByLast() if masked else None)
        if masked:
            self.masked.add(request.id)
        if drafted_by is not None:
            self.drafted.add(request.id)
        for index in range(request.params.n):
            self.answers[request.id, index] = Answer()

    def turn(self) -> list[Update]:
        before = list(self.scheduler.running)
        plan = self.scheduler.schedule(self.now)
        self.check()
        for sequence in self.scheduler.running:
            self.rowed.setdefault((sequence.request.id, sequence.index), self.now)
        check_victims(before)
        updates: list[Update] | None = None
        if plan is not None and self.withdraws:
            self.withdraws = False
            self.scheduler.withdraw(plan, [], "")
            self.check()
            plan = None
        elif plan is not None:
            check_plan(plan, self.limits, self.buckets)
            self.plans.append(plan)
            message = self.batcher.pack(plan)
            if plan.masked:
                model = self.device.launch_model(message)
                updates = self.read() if self.in_flight else None
                launched = self.device.launch_head(model, self.scheduler.masks_of(plan))
            else:
                launched = self.device.launch(message)
            self.in_flight.append((plan, launched))
            self.device.poison([0, *self.scheduler.pool._free])  # pyright: ignore[reportPrivateUsage]
            if self.staged and self._others:
                self.batcher._available.add(*self._others.pop())  # pyright: ignore[reportPrivateUsage]
        if updates is None:
            ready = self.in_flight and (plan is None or len(self.in_flight) >= self.depth)
            updates = self.read() if ready else []
        updates += self.scheduler.take_ended()
        for update in updates:
            name = (update.request_id, update.index)
            answer = self.answers.setdefault(name, Answer())
            answer.take(update)
            assert answer.scheduled == self.rowed.get(name)
            self.prompt_logprobs[update.request_id] += update.prompt_logprobs or []
        return updates

    def read(self) -> list[Update]:
        done, handle = self.in_flight.popleft()
        updates = self.scheduler.commit(done, self.device.read(handle))
        self.check()
        return updates

    def drain(self, most: int = 3000) -> None:
        """Run until all requests have ended; one that waits forever fails."""
        for _ in range(most):
            if not (self.scheduler.unfinished or self.in_flight):
                return
            self.turn()
        raise AssertionError(f"not at an end after {most} turns")

    def sequences(self) -> list[Sequence]:
        return [sequence for group in self.scheduler.requests.values() for sequence in group]

    def check(self) -> None:
        """Check that the state of sequences, rows and blocks is consistent."""
        scheduler, alive = self.scheduler, self.sequences()
        owners = Counter(block for sequence in alive for table in sequence.blocks for block in table if block)
        check_integrity(scheduler.pool, owners)
        running = [sequence for sequence in alive if sequence.status == Status.RUNNING]
        assert scheduler.running == sorted(running, key=order_of)
        rows = [sequence.row for sequence in running]
        assert sorted(rows + scheduler._free_rows) == list(range(self.limits.max_num_seqs))  # pyright: ignore[reportPrivateUsage]
        waiting = sorted((sequence for sequence in alive if sequence.status == Status.WAITING), key=order_of)
        queue = scheduler._waiting  # pyright: ignore[reportPrivateUsage]
        assert queue._queue == waiting  # pyright: ignore[reportPrivateUsage]
        later = queue._searches  # pyright: ignore[reportPrivateUsage]
        assert scheduler.queued == len(waiting + later)
        assert queue.tokens == sum(sequence.prompt_len for sequence in waiting + later)
        tenants = Counter((sequence.order[0], sequence.request.tenant) for sequence in waiting + later)
        shares = {key: share.waiting for key, share in queue.turns._shares.items() if share.waiting}  # pyright: ignore[reportPrivateUsage]
        assert shares == tenants
        beside = [sibling for sequence in alive for sibling in sequence.siblings]
        parked = [sequence for sequence in alive if sequence.held and sequence.reported == len(sequence.tokens)]
        for sequence in alive:
            assert sequence.status != Status.FINISHED
            assert (sequence.status == Status.BESIDE) <= (sequence in beside or sequence in parked + later)
            if sequence.status != Status.RUNNING:
                assert not any(sequence.blocks) and not sequence.computed and not sequence.pending
                assert sequence.row == -1 and not sequence.forked
            size, longest = self.limits.block_size, self.limits.max_model_len
            slack = drafts.MOST if sequence.request.id in self.drafted else 0
            assert 0 <= sequence.unsure <= slack and sequence.computed <= max(sequence.goal, sequence.prompt_len)
            for window, first, table in zip(self.limits.windows, sequence.first_blocks, sequence.blocks, strict=True):
                assert 0 <= len(table) * size - sequence.computed < size + slack
                assert not any(table[:first]) and all(table[first:])
                assert len(table) - first <= self.limits.blocks_in(window, longest)
            assert sequence.scores_reported <= sequence.scored <= sequence.prompt_len

    def check_over(self) -> None:
        """Check that nothing is left after all requests have ended."""
        scheduler = self.scheduler
        free, cached, used = scheduler.pool.counts()
        assert used == 0 and free + cached == self.limits.num_blocks - 1
        assert len(scheduler._free_rows) == self.limits.max_num_seqs  # pyright: ignore[reportPrivateUsage]
        assert not scheduler.queued and not scheduler._waiting._begun  # pyright: ignore[reportPrivateUsage]
        left = {name: value for name, value in vars(scheduler).items() if hasattr(value, "__len__") and len(value)}
        assert left.keys() == {"_free_rows"}, left


def check_victims(before: list[Sequence]) -> None:
    """Of the rows that ran before, only the last ones may have been preempted."""
    alive = [sequence for sequence in before if sequence.status != Status.FINISHED]
    still = [sequence.status == Status.RUNNING for sequence in alive]
    assert still == sorted(still, reverse=True)


def check_plan(plan: StepPlan, limits: Limits, buckets: Buckets) -> None:
    """Check that a step has a compiled shape and has each sequence once."""
    assert plan.tokens == sum(slice.count for slice in plan.slices) <= limits.max_num_batched_tokens
    assert plan.entries == sum(slice.entries for slice in plan.slices) <= buckets.entries
    assert len({id(slice.sequence) for slice in plan.slices}) == len(plan.slices) <= limits.max_num_seqs
    places = [0 if slice.count == 1 else 1 if slice.count else 2 for slice in plan.slices]
    assert places == sorted(places) and plan.slices[0].count
    for slice in plan.slices:
        assert slice.epoch == slice.sequence.epoch and slice.sequence.status == Status.RUNNING
        assert (slice.count == 0) == (slice.parent is not None)
        wanted = slice.sequence.need if slice.samples else 0
        assert not wanted & ~plan.need
    assert all(sequence.status == Status.RUNNING for sequence in plan.arrivals)


# --- what is asked of it --------------------------------------------------------------------------------------------


def limits(**changes: Any) -> Limits:
    base: dict[str, Any] = dict(
        vocab_size=VOCAB,
        max_model_len=40,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        block_size=4,
        num_blocks=41,
        max_logprobs=2,
        eos_token_ids=frozenset([EOS]),
    )
    return Limits(**base | changes)


def request(
    name: str, prompt: list[int], *, seed: int = 1, request: dict[str, Any] | None = None, **params: Any
) -> Request:
    given: dict[str, Any] = dict(temperature=1.0, seed=seed, max_tokens=8) | params
    return Request(id=name, prompt_token_ids=prompt, params=SamplingParams(**given), **request or {})


def check_answers(engine: FakeEngine, made: Request, aborted: set[tuple[str, int | None]]) -> None:
    whole = False
    for index in range(made.params.n):
        right, given = Oracle(engine.limits, engine.masked).answer(made, index), engine.answers[made.id, index]
        if given.reason == "abort":
            late = made.deadline is not None and made.deadline <= engine.now
            assert late if given.error else {(made.id, None), (made.id, index)} & aborted
            assert given.error in (None, "the deadline has passed")
            count = len(given.tokens)
            assert given.tokens == right.tokens[:count] and given.logprobs == right.logprobs[:count]
        else:
            assert (given.tokens, given.logprobs) == (right.tokens, right.logprobs)
            assert given.embedding == right.embedding
            assert (given.reason, given.stop_reason, given.error) == (right.reason, right.stop_reason, None)
            whole = True
    right, scored = Oracle(engine.limits).prompt_logprobs(made), engine.prompt_logprobs[made.id]
    assert scored == (right if whole else right[: len(scored)])
