# SPDX-License-Identifier: Apache-2.0
"""Measures the KV memory that requests take in blocks, and would take if each reserved its maximum length.

Part of benchmarks.batching. An engine whose KV cache holds only a few such reservations gets far more requests than it
can run at once, with lengths like those of real chats. After every step the blocks in use and the tokens in them are
counted. No time is measured, so the figures are the same on any machine, and the ratios nearly the same for any model.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams

BLOCK = 16


@dataclass(frozen=True)
class CacheUse:
    """The KV cache after a step."""

    running: int
    waiting: int
    blocks: int  # in use
    tokens: int  # tokens whose KV is stored, or being written by the step in flight


@dataclass(frozen=True)
class CacheReport:
    requests: int
    max_model_len: int
    block_size: int
    cache_bytes: int
    steps: int  # steps with waiting requests: the means are over these
    preemptions: int
    at_once_mean: float
    at_once_most: int
    at_once_reserved: int  # that fit into the same memory if each reserves max_model_len
    used_mean_bytes: float
    used_most_bytes: int
    tokens_mean: float
    reserved_mean_bytes: float  # what the same running requests would reserve
    unused_percent: float  # slots of blocks in use that hold no token, mean
    reserved_unused_percent: float  # the same for reservations


def sample(engine: Engine) -> CacheUse:
    scheduler = engine.scheduler
    _, _, used = scheduler.pool.counts()
    tokens = sum(sequence.computed for sequence in scheduler.running)
    return CacheUse(len(scheduler.running), scheduler.queued, used, tokens)


def run(engine: Engine, requests: Sequence[tuple[list[int], int]]) -> list[CacheUse]:
    """Runs all requests to completion; returns a sample per step."""
    for place, (ids, new) in enumerate(requests):
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        engine.add(Request(id=str(place), prompt_token_ids=ids, params=params))
    samples: list[CacheUse] = []
    while engine.unfinished:
        engine.step()
        samples.append(sample(engine))
    return samples


def summary(
    samples: Sequence[CacheUse], *, requests: int, limits: tuple[int, int, int], block_bytes: int, preemptions: int
) -> CacheReport:
    """`limits`: max_model_len, slots in a block, blocks that requests may use."""
    longest, block, blocks = limits
    full = [one for one in samples if one.waiting and one.running] or [one for one in samples if one.running]
    reservation = -(-longest // block)  # in blocks

    def mean(values: Sequence[float]) -> float:
        return statistics.fmean(values)

    return CacheReport(
        requests=requests,
        max_model_len=longest,
        block_size=block,
        cache_bytes=blocks * block_bytes,
        steps=len(full),
        preemptions=preemptions,
        at_once_mean=mean([one.running for one in full]),
        at_once_most=max(one.running for one in full),
        at_once_reserved=blocks // reservation,
        used_mean_bytes=mean([one.blocks for one in full]) * block_bytes,
        used_most_bytes=max(one.blocks for one in full) * block_bytes,
        tokens_mean=mean([one.tokens for one in full]),
        reserved_mean_bytes=mean([one.running for one in full]) * reservation * block_bytes,
        unused_percent=mean([100 * (1 - one.tokens / (one.blocks * block)) for one in full]),
        reserved_unused_percent=mean([100 * (1 - one.tokens / (one.running * reservation * block)) for one in full]),
    )


def measure(
    model: str,
    requests: Sequence[tuple[list[int], int]],
    *,
    longest: int,
    rows: int,
    tokens: int,
    reservations: int,
) -> CacheReport:
    """`rows` and `tokens` limit a step; the KV cache has the size of `reservations` reservations."""
    config = EngineConfig(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=longest,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        block_size=BLOCK,
        num_blocks=1 + reservations * -(-longest // BLOCK),
        warmup=False,
    )
    engine = Engine(config, report=lambda line: None)
    try:
        samples = run(engine, requests)
        return summary(
            samples,
            requests=len(requests),
            limits=(longest, BLOCK, engine.limits.num_blocks - 1),
            block_bytes=engine.capacity.block_bytes,
            preemptions=engine.scheduler.preemptions,
        )
    finally:
        engine.close()


def table(memory: CacheReport) -> str:
    """As Markdown."""
    more = memory.at_once_mean / memory.at_once_reserved
    less = memory.reserved_mean_bytes / memory.used_mean_bytes
    mb = 1e6
    return "\n".join(
        [
            "| KV cache | in blocks | max_model_len reserved per request | ratio |",
            "|---|---|---|---|",
            f"| concurrent requests in {memory.cache_bytes / mb:.0f} MB, mean | {memory.at_once_mean:.0f} "
            f"| {memory.at_once_reserved} | {more:.1f} x |",
            f"| MB in use, mean | {memory.used_mean_bytes / mb:.1f} | {memory.reserved_mean_bytes / mb:.0f} "
            f"| {less:.1f} x |",
            f"| slots without a token | {memory.unused_percent:.1f} % | {memory.reserved_unused_percent:.1f} % | |",
        ]
    )
