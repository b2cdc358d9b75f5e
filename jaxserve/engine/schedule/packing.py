# SPDX-License-Identifier: Apache-2.0
"""Packs a StepPlan into a StepMessage: one int32 vector, and more only for arrivals and block copies. Pure numpy.

`Layout` describes the vector; the device programs use the same slices. Sizes depend only on the bucket. A decoding step
of B rows has B tokens and B entries; a mixed step has the maximum of rows and of entries, whatever its token count.

An entry describes one row of hidden states: its token, its row, and how to sample from its logits. Those that are
returned as embeddings come last: the head computes logits of the others alone. Floats are stored as their bits. Its
position is filled in on the device, which knows where each row starts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from jaxserve.engine.buckets import Available, Buckets, Kind
from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule import need
from jaxserve.engine.schedule.need import Variant
from jaxserve.engine.schedule.plan import StepPlan
from jaxserve.engine.schedule.sequence import Sequence
from jaxserve.sampling import columns, control_row
from jaxserve.sampling.columns import COLUMNS

type Ints = np.ndarray[tuple[int, ...], np.dtype[np.int32]]

# `given`: the prompt token to score, or the draft that an entry's sample must equal for the row's next entry to count;
# negative in all other entries.
ENTRY = ("token", "row", "position", "given", "samples", *COLUMNS)
TOKEN, ROW, POSITION, GIVEN, SAMPLES, FIXED = range(6)
SPARE_EDITS = 8
EDITS_AT_ONCE, COPIES_AT_ONCE = 2048, 64  # in one call of the `edit` program
EDIT_SIZE = 2 * EDITS_AT_ONCE + 2 * COPIES_AT_ONCE
STATES_AT_ONCE = 64  # in one call of the `copy_states` program


@dataclass(frozen=True)
class Layout:
    """The parts of the vector of a step with `tokens` tokens."""

    decode: bool
    tokens: int
    rows: int
    edits: int
    entries: int

    @property
    def parts(self) -> dict[str, int]:
        """Sizes, in order."""
        return {
            "tokens": self.tokens,  # negative: the row's last sampled token, which is on the device
            "rows": self.rows,
            "kv_lens": self.rows,  # negative: so many more than the row's length on the device
            "starts": self.rows + 1,  # cu_q_lens
            "distribution": 2,
            "cells": self.edits,  # of the block tables; negative: padding
            "blocks": self.edits,
            "entries": self.entries * len(ENTRY),
        }

    @property
    def size(self) -> int:
        return sum(self.parts.values())


@cache
def places(layout: Layout) -> dict[str, slice]:
    at = 0
    where: dict[str, slice] = {}
    for name, size in layout.parts.items():
        where[name] = slice(at, at + size)
        at += size
    return where


@cache
def decode_layout(rows: int, groups: int = 1) -> Layout:
    return Layout(decode=True, tokens=rows, rows=rows, edits=rows * groups + SPARE_EDITS, entries=rows)


@cache
def mixed_layout(tokens: int, buckets: Buckets, block_size: int, groups: int = 1) -> Layout:
    rows = min(tokens, buckets.rows)
    edits = (tokens // block_size + 2 * rows) * groups + SPARE_EDITS
    return Layout(decode=False, tokens=tokens, rows=rows, edits=edits, entries=buckets.entries)


def head_sizes(buckets: Buckets, head: Variant) -> tuple[int, ...]:
    """The rows of a head's programs. Only scored prompts need more rows of logits than there are sequences."""
    return buckets.decode if head.top_n is None else buckets.scoring_heads


def sizes(buckets: Buckets, heads: Iterable[Variant]) -> Iterator[tuple[Kind, int]]:
    """All sizes of all kinds of programs."""
    ladders: dict[Kind, tuple[int, ...]] = {
        **{"decode": buckets.decode, "mixed": buckets.mixed, "embed": buckets.scoring_heads},
        **{head: head_sizes(buckets, head) for head in heads},
    }
    for kind, ladder in ladders.items():
        yield from ((kind, size) for size in ladder)


@dataclass(frozen=True, slots=True)
class StepMessage:
    """All that the devices get for one step: arrays and a few numbers, which another process could send or replay."""

    layout: Layout
    entries: int  # the rows of hidden states that the step needs
    embeds: int  # how many of them are returned as embeddings: the last ones
    # The programs that follow the model, and their sizes; 0 if one is not needed.
    head: Variant
    head_rows: int
    embed_rows: int
    vector: Ints
    # Arrays for programs that run before the step: `edit`, for block tables and block copies; then `set_rows` and
    # `add_counts`, for the sampling controls of sequences that took rows.
    edits: list[Ints] = field(default_factory=list[Ints])
    controls: list[Ints] = field(default_factory=list[Ints])
    counts: list[Ints] = field(default_factory=list[Ints])
    # For `set_masks`, which runs between the model and the head.
    masks: list[Ints] = field(default_factory=list[Ints])
    # For `copy_states`, which runs before the step too.
    states: list[Ints] = field(default_factory=list[Ints])

    @property
    def logits(self) -> int:
        """How many entries become logits: the first ones."""
        return self.entries - self.embeds


class Batcher:
    """Packs steps. Keeps the sampling columns of each row, set when a sequence takes the row."""

    def __init__(self, limits: Limits, buckets: Buckets, available: Available | None = None) -> None:
        """`available`: the sizes of steps, if not all buckets."""
        self.limits, self.buckets = limits, buckets
        self._heads = need.variants(limits.max_logprobs)  # by the need that each covers
        self._available = Available(sizes(buckets, self._heads.values())) if available is None else available
        self._columns = np.zeros((buckets.rows, len(COLUMNS)), np.int32)

    def pack(self, plan: StepPlan) -> StepMessage:
        controls, counts = self._take_rows(plan) if plan.arrivals else ([], [])
        slices = plan.slices
        # Slices of one token come first, so if the last slice has one, all have.
        decode = slices[-1].count == 1 and plan.entries == len(slices)
        if decode:
            layout = decode_layout(self._available.fitting("decode", len(slices)), self.limits.groups)
        else:
            tokens = self._available.fitting("mixed", plan.tokens)
            layout = mixed_layout(tokens, self.buckets, self.limits.block_size, self.limits.groups)
        vector = np.zeros(layout.size, np.int32)
        parts = {name: vector[at] for name, at in places(layout).items()}
        entries = parts["entries"].reshape(layout.entries, len(ENTRY))
        entries[:, ROW] = self.buckets.rows  # past the last row: the result is dropped
        entries[:, GIVEN] = -1
        (self._fill_decode if decode else self._fill_mixed)(plan, parts, entries)
        edits = self._fill_edits(plan, parts)
        head = self._head_for(plan)
        return StepMessage(
            layout,
            plan.entries,
            plan.embeds,
            head,
            self._available.fitting(head, plan.logits) if plan.logits else 0,
            self._available.fitting("embed", plan.entries) if plan.embeds else 0,
            vector,
            edits,
            controls,
            counts,
            states=self._states(plan) if plan.states else [],
        )

    def _states(self, plan: StepPlan) -> list[Ints]:
        """[sources, destinations] of rows whose states are copied, padded with -1."""
        rows = np.array([list(plan.states.values()), list(plan.states.keys())], np.int32)
        _within("row", rows, 0, self.buckets.rows)
        found: list[Ints] = []
        for at in range(0, rows.shape[1], STATES_AT_ONCE):
            part = rows[:, at : at + STATES_AT_ONCE]
            found.append(np.full((2, STATES_AT_ONCE), -1, np.int32))
            found[-1][:, : part.shape[1]] = part
        return found

    def _head_for(self, plan: StepPlan) -> Variant:
        """The cheapest available head that does what the rows need. The last one does everything."""
        for covered, head in self._heads.items():
            if not plan.need & ~covered and self._available.fits(head, plan.logits):
                return head
        raise RuntimeError(f"no head has {plan.logits} rows with all that they need")

    def at_fault(self, plan: StepPlan) -> list[Sequence]:
        """The sequences of a plan that cannot be packed even alone; all of them if each can."""
        found: list[Sequence] = []
        for own in plan.slices:
            slices = [own] if own.parent is None else [own.parent, own]
            alone = StepPlan(slices, sum(s.count for s in slices), sum(s.entries for s in slices), plan.need)
            alone.embeds = sum(s.embeds for s in slices)
            alone.arrivals = [sequence for sequence in plan.arrivals if sequence is own.sequence]
            try:
                self.pack(alone)
            except Exception:
                found.append(own.sequence)
        return found or [own.sequence for own in plan.slices]

    def _take_rows(self, plan: StepPlan) -> tuple[list[Ints], list[Ints]]:
        """Keep the columns of sequences that took rows; the vectors that set their rows of controls."""
        controlled: list[tuple[int, control_row.ControlRow, list[int]]] = []
        for sequence in plan.arrivals:
            params, controls = sequence.request.params, sequence.controls
            packed = columns.pack(params, controlled=controls is not None, seed=sequence.seed)
            self._columns[sequence.row] = packed
            if controls is not None:
                controlled.append((sequence.row, controls, sequence.tokens[sequence.prompt_len :]))
        return control_row.pack(controlled, self.limits.vocab_size) if controlled else ([], [])

    def _fill_decode(self, plan: StepPlan, parts: dict[str, Ints], entries: Ints) -> None:
        slices = plan.slices
        count = len(slices)
        rows = np.array([s.sequence.row for s in slices], np.int32)
        lengths = np.array([s.start for s in slices], np.int32) + 1
        self._check(rows, lengths)
        parts["tokens"][:] = -1
        parts["tokens"][:count] = [
            s.sequence.tokens[s.start] if s.start < len(s.sequence.tokens) else -1 for s in slices
        ]
        parts["rows"][:] = self.buckets.rows
        parts["rows"][:count] = rows
        parts["kv_lens"][:count] = lengths
        parts["kv_lens"][plan.unsure] = -1
        parts["starts"][:] = np.arange(len(parts["starts"]))
        parts["distribution"][:] = count
        used = entries[:count]
        used[:, TOKEN] = parts["starts"][:count]
        used[:, ROW] = rows
        used[:, SAMPLES] = [s.samples for s in slices]
        used[:, FIXED:] = self._columns[rows]
        for i, s in enumerate(slices):
            if s.score_to > s.score_from:
                used[i, GIVEN] = s.sequence.tokens[s.score_from]
        if plan.embeds:
            used[:] = used[np.argsort([s.embeds for s in slices], stable=True)]

    def _fill_mixed(self, plan: StepPlan, parts: dict[str, Ints], entries: Ints) -> None:
        starts, tokens = [0], list[int]()
        rows, lengths = list[int](), list[int]()
        table: list[tuple[int, int, int, int, int]] = []
        states: list[tuple[int, int, int, int, int]] = []  # of entries that are returned as embeddings
        singles = 0
        last: dict[int, int] = {}  # the position of each slice's last token, for the forks that sample from it
        for s in plan.slices:
            sequence, base, stop = s.sequence, len(tokens), s.start + s.count
            if s.count:
                known = sequence.tokens[s.start : stop - len(s.drafts)]
                tokens += known
                tokens += [-1] * (s.count - len(s.drafts) - len(known))
                tokens += s.drafts
                starts.append(len(tokens))
                rows.append(sequence.row)
                lengths.append(stop)
                singles += s.count == 1
            last[id(s)] = end = last[id(s.parent)] if s.parent else len(tokens) - 1
            for i in range(s.score_from, s.score_to):
                table.append((base + i - 1 - s.start, sequence.row, 0, sequence.tokens[i], 0))
            for at, draft in enumerate(s.drafts, start=end - len(s.drafts)):
                table.append((at, sequence.row, 0, draft, 1))
            if s.samples:
                table.append((end, sequence.row, 0, -1, 1))
            states += [(at, sequence.row, 0, -1, 0) for at in range(end + 1 - s.embeds, end + 1)]
        self._check(np.array(rows), np.array(lengths))
        count = len(rows)
        parts["tokens"][: len(tokens)] = tokens
        parts["rows"][:] = self.buckets.rows
        parts["rows"][:count] = rows
        parts["kv_lens"][:count] = lengths
        parts["kv_lens"][plan.unsure] = -1
        parts["starts"][:] = len(tokens)
        parts["starts"][: count + 1] = starts
        parts["distribution"][:] = singles, count
        table += states
        if table:
            used = entries[: len(table)]
            used[:, :FIXED] = table
            used[:, FIXED:] = self._columns[used[:, ROW]]

    def _fill_edits(self, plan: StepPlan, parts: dict[str, Ints]) -> list[Ints]:
        """Put block table edits into the vector if they fit, else into separate vectors, where copies always go."""
        cells = np.fromiter(plan.edits.keys(), np.int32, len(plan.edits))
        blocks = np.fromiter(plan.edits.values(), np.int32, len(plan.edits))
        if cells.size:
            _within("block table cell", cells, 0, self.limits.groups * self.buckets.rows * self.limits.width)
            _within("block", blocks, 0, self.limits.num_blocks)
        parts["cells"][:] = -1
        fits = cells.size <= parts["cells"].size
        if fits:
            parts["cells"][: cells.size] = cells
            parts["blocks"][: cells.size] = blocks
            cells = cells[:0]
        edits = [
            edit_vector(cells[i : i + EDITS_AT_ONCE], blocks[i : i + EDITS_AT_ONCE], [])
            for i in range(0, cells.size, EDITS_AT_ONCE)
        ]
        for copies in in_turns(plan.copies):
            _within("block", np.array(copies), 1, self.limits.num_blocks)
            edits.append(edit_vector(cells[:0], blocks[:0], copies))
        return edits

    def _check(self, rows: Ints, lengths: Ints) -> None:
        _within("row", rows, 0, self.buckets.rows)
        _within("length", lengths, 1, self.limits.width * self.limits.block_size + 1)


def padding(layout: Layout, buckets: Buckets) -> Ints:
    """The vector of a step that does nothing."""
    vector = np.zeros(layout.size, np.int32)
    parts = {name: vector[at] for name, at in places(layout).items()}
    parts["rows"][:] = buckets.rows
    parts["cells"][:] = -1
    if layout.decode:
        parts["starts"][:] = np.arange(len(parts["starts"]))
    entries = parts["entries"].reshape(layout.entries, len(ENTRY))
    entries[:, ROW] = buckets.rows  # past the last row: the result is dropped
    entries[:, GIVEN] = -1
    return vector


def edit_vector(cells: Ints, blocks: Ints, copies: list[tuple[int, int]]) -> Ints:
    """[cells, blocks, sources, destinations], padded with -1."""
    vector = np.full(EDIT_SIZE, -1, np.int32)
    vector[: cells.size] = cells
    vector[EDITS_AT_ONCE:][: cells.size] = blocks
    if copies:
        at = 2 * EDITS_AT_ONCE
        vector[at : at + len(copies)] = [source for source, _ in copies]
        vector[at + COPIES_AT_ONCE :][: len(copies)] = [destination for _, destination in copies]
    return vector


def in_turns(copies: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Split copies into calls. Within one call they run in no order, so a block read or written in it is written only
    in a later call."""
    turns: list[list[tuple[int, int]]] = []
    touched: set[int] = set()
    written: set[int] = set()
    for source, destination in copies:
        if not turns or destination in touched or source in written or len(turns[-1]) == COPIES_AT_ONCE:
            turns.append([])
            touched, written = set(), set()
        turns[-1].append((source, destination))
        touched |= {source, destination}
        written.add(destination)
    return turns


def _within(what: str, values: Ints, low: int, high: int) -> None:
    """Raise on an index out of range, which jax would clamp or wrap, overwriting another request's data."""
    if values.size and (int(values.min()) < low or int(values.max()) >= high):
        raise RuntimeError(f"{what}s range from {values.min()} to {values.max()}, expected {low} to {high - 1}")
