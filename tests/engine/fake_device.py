# SPDX-License-Identifier: Apache-2.0
"""A device in plain numpy with the runner's `launch` and `read`.

The device executes a step as the programs do: block table edits and copies, slots from positions and tables, tokens
fed forward by row. In the slot of each token it stores the token, its position, and a digest of all that the token
attended to. A row of logits attends to these through its block table; the next token is a hash of them and of the row's
sampling parameters. So a wrong block, a stale edit, a missed copy, two owners, a wrong position, a late token or the
parameters of another request change the result, or are found at once: no slot with a wrong position is attended to.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.engine.buckets import Buckets
from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule import packing
from jaxserve.engine.schedule.masks import Words
from jaxserve.engine.schedule.need import Variant
from jaxserve.engine.schedule.packing import FIXED, GIVEN, ROW, SAMPLES, TOKEN, Ints, StepMessage
from jaxserve.engine.schedule.plan import StepResult
from jaxserve.sampling import control_row
from jaxserve.sampling.columns import COLUMNS
from tests.engine.made_up_model import (
    POISON,
    TOP,
    Digests,
    advanced,
    digest,
    draw,
    embedded,
    first_seen,
    likelihood,
    pick,
    way,
)


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
        embeds = list[bool]()
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
            embeds.append(not entry[SAMPLES] and token < 0)
            if not embeds[-1]:
                tokens.append(token)
                likely.append(likelihood(drawn, token))
        assert ended == fed.keys()
        for row, found in fed.items():
            self.last[row] = found
        assert embeds == [False] * (packed.entries - packed.embeds) + [True] * packed.embeds
        assert packed.head_rows >= len(tokens) and bool(packed.head_rows) == bool(tokens)
        result = self._result(packed.head, tokens, valid, likely)
        if packed.embeds:
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
