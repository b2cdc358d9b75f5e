# SPDX-License-Identifier: Apache-2.0
"""The host state of one sample of a request, owned by the scheduler.

tokens    the prompt and the generated tokens that the host knows
pending   the number of tokens that steps in flight are sampling
computed  the number of tokens with KV written, or to be written by steps in flight
unsure    how many of both may turn out fewer: the drafts that steps in flight check
epoch     incremented when the sequence leaves its row, which makes results of steps in flight stale
"""

from enum import IntEnum

from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule import need
from jaxserve.engine.schedule.drafts import Drafter
from jaxserve.engine.schedule.masks import Masks
from jaxserve.engine.schedule.mean import Mean
from jaxserve.sampling import columns, control_row
from jaxserve.sampling.control_row import ControlRow
from jaxserve.types.request import Request


class Status(IntEnum):
    WAITING = 0
    BESIDE = 1  # not queued: another sample computes the prompt, or it is held without a row, or its search waits
    RUNNING = 2
    FINISHED = 3


class Sequence:
    __slots__ = (
        "blocks",
        "cached",
        "computed",
        "controls",
        "drafter",
        "end",
        "epoch",
        "first_blocks",
        "forked",
        "generation",
        "goal",
        "held",
        "index",
        "keys",
        "masks",
        "mean",
        "min_end",
        "need",
        "order",
        "pending",
        "prompt_len",
        "published",
        "refused",
        "reported",
        "request",
        "row",
        "scheduled",
        "scored",
        "scores_reported",
        "scoring_need",
        "seed",
        "siblings",
        "status",
        "stops",
        "tokens",
        "unsure",
    )

    def __init__(
        self,
        request: Request,
        *,
        index: int,
        order: tuple[int, int, int, int],
        limits: Limits,
        seed: int,
        leader: "Sequence | None" = None,
        masks: Masks | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """`leader`: another sample of the same request, to share what they have in common."""
        params = request.params
        self.request, self.index, self.order = request, index, order
        self.tokens: list[int] = request.prompt_ids if leader is None else leader.tokens[: leader.prompt_len]
        if request.embed and request.pool == "first":
            del self.tokens[1:]  # it attends to none of the others
        self.mean = Mean(weighted=request.pool == "weighted_mean") if request.averages else None
        self.prompt_len = len(self.tokens)
        wanted = limits.max_model_len if params.max_tokens is None else self.prompt_len + params.max_tokens
        self.end = min(wanted, limits.max_model_len) if request.generates else self.prompt_len
        # The tokens that need KV: nothing attends to the last token of an answer.
        self.goal = self.end - 1 if request.generates else self.prompt_len
        self.min_end = self.prompt_len + params.min_tokens
        self.stops = stops_of(request, limits) if leader is None else leader.stops
        self.masks = masks if leader is None else leader.masks
        self.need = sampling_need(request) | need.MASK * (self.masks is not None)
        drafter = drafter if leader is None else leader.drafter
        self.drafter = drafter if request.generates and need.allows_drafts(self.need) else None
        self.scoring_need = need.of_logprobs(params.prompt_logprobs)
        self.controls = controls_of(request, self.need, self.stops, limits) if leader is None else leader.controls
        # Prompt tokens scored, including by steps in flight, and those already reported. The first token has no score.
        self.scored = self.scores_reported = 1 if self.scoring_need and index == 0 else self.prompt_len
        self.seed = seed & 0xFFFF_FFFF
        self.status = Status.BESIDE
        self.row, self.epoch, self.computed, self.pending, self.unsure, self.cached = -1, 0, 0, 0, 0, 0
        # For each cache group its block table, and its first block that is not freed: those before it are outside the
        # group's window.
        self.blocks: list[list[int]] = [[] for _ in limits.windows]
        self.first_blocks = [0 for _ in limits.windows]
        self.forked = False  # blocks may be shared that it writes: those of a prompt, by samples of one request
        self.keys: list[bytes] = []  # prefix-cache keys of its full blocks, computed on demand
        self.published = 0  # the number of its blocks published under these keys
        self.generation = -1  # the pool's generation when its KV was begun
        # While it waits for blocks: how many were available to it when it found too few, and the keys of blocks that
        # would have given it a longer prefix, with their groups.
        self.refused: tuple[int, list[tuple[bytes, int]]] | None = None
        self.siblings: list[Sequence] = []  # the other samples of the request, until its prompt is computed
        self.held = 0  # above 0: a beam, which stops after each token until `extend`; the number of beams in its search
        self.reported = 0  # for a beam: its token count when it last reported its candidates
        self.scheduled: float | None = None  # when it first got a row; None once reported

    @property
    def length(self) -> int:
        """Its number of tokens, including those still being sampled."""
        return len(self.tokens) + self.pending

    @property
    def settled(self) -> int:
        """The number of tokens whose KV is final: later steps write only behind them."""
        return self.computed - self.unsure

    @property
    def num_blocks(self) -> int:
        """The length of each of its block tables."""
        return len(self.blocks[0])

    def clear_blocks(self) -> None:
        self.blocks = [[] for _ in self.blocks]
        self.first_blocks = [0 for _ in self.blocks]
        self.forked = False

    @property
    def reads_cache(self) -> bool:
        """Whether it may use cached prefixes. A mean needs the hidden states of all tokens, which are not cached."""
        return self.mean is None and not self.request.params.skip_reading_prefix_cache

    @property
    def idles(self) -> bool:
        """Whether a held sequence has reported its sample and waits for the scheduler's `extend`."""
        return self.reported == len(self.tokens)

    @property
    def scores(self) -> bool:
        """Whether log probabilities of its prompt are still wanted."""
        return self.scored < self.prompt_len


def samples_of(
    request: Request,
    *,
    order: tuple[int, int, int],
    limits: Limits,
    seed: int,
    masks: Masks | None,
    drafter: Drafter | None,
) -> list[Sequence]:
    """A sequence for each sample of a request."""
    made: list[Sequence] = []
    for index in range(request.params.n):
        sequence = Sequence(
            request,
            index=index,
            order=(*order, index),
            limits=limits,
            seed=seed + index,
            leader=made[0] if made else None,
            masks=masks,
            drafter=drafter,
        )
        made.append(sequence)
    return made


def twin_of(sequence: Sequence, *, index: int, limits: Limits) -> Sequence:
    """A held sequence with the same tokens, as another sample of its request."""
    order, seed = (*sequence.order[:-1], index), sequence.seed
    twin = Sequence(sequence.request, index=index, order=order, limits=limits, seed=seed, leader=sequence)
    twin.held, twin.tokens, twin.reported = sequence.held, list(sequence.tokens), sequence.reported
    return twin


def order_of(sequence: Sequence) -> tuple[int, int, int, int]:
    """The order of scheduling: priority, turn of the tenant, arrival, index of the sample."""
    return sequence.order


def stops_of(request: Request, limits: Limits) -> frozenset[int]:
    """The tokens that end the request."""
    own = frozenset(request.params.stop_token_ids or ())
    return own if request.params.ignore_eos else own | limits.eos_token_ids


def sampling_need(request: Request) -> int:
    params = request.params
    found = need.of_logprobs(params.logprobs)
    if not params.greedy:
        found |= need.FILTER if columns.filters(params) else need.RANDOM
    edits, masks = control_row.kinds(params, request.bad_word_ids)
    return found | need.CONTROLS * edits | need.MASK * masks


def controls_of(request: Request, needs: int, stops: frozenset[int], limits: Limits) -> ControlRow | None:
    """Packed here, when the request arrives, so that the step in which it takes a row has little left to do."""
    if not needs & (need.CONTROLS | need.MASK):
        return None
    return ControlRow(
        vocab_size=limits.vocab_size,
        params=request.params,
        prompt=request.prompt_token_ids,
        stops=stops,
        bad_words=request.bad_word_ids,
    )
