# SPDX-License-Identifier: Apache-2.0
"""How long sequences may be and how many KV blocks there are, from what the memory holds. Says the arithmetic.

On a GPU: its memory x utilization - what lies there - the weights - state - the largest step's temporaries, as the
compiler counts them. On a CPU: as much as all rows could use, up to 4 GiB and a quarter of what the weights leave free.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxserve.config import ConfigError, EngineConfig, Limits, held_blocks
from jaxserve.engine.execute.loading import Opened
from jaxserve.engine.execute.program_store import Store
from jaxserve.engine.execute.runner import Runner, Shape, shard_bytes
from jaxserve.engine.schedule.buckets import Buckets
from jaxserve.models import kv_cache
from jaxserve.models.decoder import Params
from jaxserve.models.spec import Attention, Dynamic, LongRope, ModelSpec

type Report = Callable[[str], None]

MEMORY_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # jax's own variable: the share of a GPU's memory that it takes
GIB = 2**30
CPU_CACHE = 4 * GIB
SLACK = 256 * 2**20  # what libraries and the allocator take beside


@dataclass(frozen=True)
class Sized:
    limits: Limits
    shape: Shape


@dataclass(frozen=True)
class Memory:
    """Bytes of each device that may be used, and that are in use once the weights lie there."""

    most: int
    used: int


def memory(config: EngineConfig, model: Opened) -> Memory | None:
    """As it is before weights are read, which need not be waited for then. None where nobody has to know."""
    if config.num_blocks is not None or config.kv_cache_memory_bytes is not None:
        return None
    coming = weight_bytes(model.shapes) if model.plan is not None else 0
    devices = devices_of(model)
    if devices[0].platform == "cpu":
        known = hasattr(os, "sysconf")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 4 * CPU_CACHE + coming
        return Memory(free, coming)
    most, used = budget(devices, config.gpu_memory_utilization)
    return Memory(most, used + coming)


def sized(
    config: EngineConfig, model: Opened, memory: Memory | None, report: Report, store: Store | None = None
) -> Sized:
    spec = model.spec
    on_cpu = devices_of(model)[0].platform == "cpu"
    rows = config.max_num_seqs or (32 if on_cpu else 256)
    tokens = config.max_num_batched_tokens or max(rows, 512 if on_cpu else 2048)
    longest = _longest(config, spec)
    shape = Shape(
        buckets=Buckets(rows, tokens, score_rows=score_rows(tokens)),
        block_size=config.block_size,
        num_blocks=2,
        width=-(-longest // config.block_size),
        top_n=spec.vocab_size if config.max_logprobs == -1 else min(spec.vocab_size, config.max_logprobs),
        processed=config.logprobs_mode == "processed_logprobs",
    )
    per_block = device_block_bytes(model, config.block_size)
    held = held_blocks(longest, config.block_size, window=window_of(spec), step=tokens)
    if config.num_blocks is not None:
        blocks = config.num_blocks
    elif config.kv_cache_memory_bytes is not None:
        blocks = config.kv_cache_memory_bytes // per_block
    else:
        assert memory is not None
        if on_cpu:
            blocks = _on_cpu(memory, per_block, wanted=1 + rows * held)
        else:
            blocks = _on_gpu(model, memory, shape, per_block, report, store)
    if blocks <= held:
        longest = _fitted(config, longest, blocks, report)
    slots = (blocks - 1) * config.block_size
    report(
        f"per device: weights {_gib(weight_bytes(model.shapes))}, KV cache {_gib(blocks * per_block)}: "
        f"{blocks - 1:,} blocks of {config.block_size} = {slots:,} tokens, {slots / longest:.1f} x {longest:,}"
    )
    shape = replace(shape, num_blocks=blocks, width=-(-longest // config.block_size))
    return Sized(_limits(config, model, shape, longest), shape)


def score_rows(tokens: int) -> int:
    """Prompt tokens that are scored in a step of so many: few, since of the others the last block computes KV alone."""
    return min(tokens, max(64, min(tokens // 8, 256)))


def _limits(config: EngineConfig, model: Opened, shape: Shape, longest: int) -> Limits:
    spec, buckets = model.spec, shape.buckets
    return Limits(
        vocab_size=spec.vocab_size,
        max_model_len=longest,
        max_num_seqs=buckets.rows,
        max_num_batched_tokens=buckets.tokens,
        block_size=shape.block_size,
        num_blocks=shape.num_blocks,
        max_logprobs=shape.top_n,
        eos_token_ids=frozenset(token for token in model.eos_token_ids if 0 <= token < spec.vocab_size),
        window=window_of(spec),
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        priority=config.scheduling_policy == "priority",
        rope_key=rope_key_of(spec),
    )


def _longest(config: EngineConfig, spec: ModelSpec) -> int:
    if config.max_model_len is not None and config.max_model_len > spec.max_positions:
        problem = f"max_model_len is {config.max_model_len}, the model takes {spec.max_positions}"
        raise ConfigError(problem, f"give at most {spec.max_positions}")
    longest = config.max_model_len or spec.max_positions
    if longest < 2:
        raise ConfigError(f"max_model_len is {longest}", "a prompt and an answer need 2 at least")
    return longest


def _fitted(config: EngineConfig, longest: int, blocks: int, report: Report) -> int:
    """What the blocks hold, which is less than `longest`, where nobody insisted on that."""
    slots = (blocks - 1) * config.block_size
    if config.max_model_len is not None or slots < 2:
        problem = f"a sequence of {longest} tokens does not fit into the KV cache: {max(slots, 0)} tokens"
        raise ConfigError(problem, "lower max_model_len, or give the KV cache more memory")
    report(f"max_model_len is {slots:,}, not the model's {longest:,}: the KV cache holds no more")
    return slots


def _on_cpu(memory: Memory, per_block: int, wanted: int) -> int:
    return max(2, min(wanted, min(CPU_CACHE, max(memory.most - memory.used, 0) // 4) // per_block))


def _on_gpu(model: Opened, memory: Memory, shape: Shape, per_block: int, report: Report, store: Store | None) -> int:
    # With the smallest pool: what a step takes beside it does not depend on the pool's size.
    probe = Runner(model.spec, model.shapes, shape, mesh=model.mesh, store=store)
    step, state = probe.largest_step(), probe.state_bytes()
    left = memory.most - memory.used - step - state - SLACK
    report(
        f"memory per device: {_gib(memory.most)} to use, in use {_gib(memory.used)}, largest step {_gib(step)}, "
        f"state {_gib(state)}, slack {_gib(SLACK)}: {_gib(max(left, 0))} for the KV cache"
    )
    if left < 2 * per_block:
        raise ConfigError("the model leaves no memory for a KV cache", "use more devices, or a higher utilization")
    return left // per_block


def reserve_memory(config: EngineConfig) -> None:
    """Has jax take as much of a GPU as we are to use. Of no effect if the program has used a device before, or has
    set the variable itself.
    """
    os.environ.setdefault(MEMORY_SHARE, str(config.gpu_memory_utilization))


def budget(devices: list[Any], utilization: float) -> tuple[int, int]:
    """Bytes that may be used of the device that has least left, and that are in use there."""

    def of(device: Any) -> tuple[int, int]:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            problem = f"{device} does not tell how much memory it has"
            raise ConfigError(problem, "give num_blocks or kv_cache_memory_bytes")
        limit, used = stats["bytes_limit"], stats.get("bytes_in_use", 0)
        # jax takes a share of the memory for itself; the utilization is of the whole.
        share = float(os.environ.get(MEMORY_SHARE, "0.75"))
        return int(min(limit, limit / share * utilization)), used

    return min((of(device) for device in devices), key=lambda pair: pair[0] - pair[1])


def devices_of(model: Opened) -> list[Any]:
    if model.mesh is not None:
        return list(model.mesh.devices.flat)
    return list(model.shapes["embed"]["weight"].sharding.device_set)


def device_block_bytes(model: Opened, block_size: int) -> int:
    """Bytes of a block on each device, over all layers."""
    dtype = model.shapes["embed"]["weight"].dtype
    with jax.set_mesh(model.mesh) if model.mesh is not None else contextlib.nullcontext():
        pools = kv_cache.abstract_cache(model.spec, blocks=1, block_size=block_size, dtype=dtype)
    return sum(shard_bytes(pool) for pool in jax.tree.leaves(pools))


def weight_bytes(params: Params) -> int:
    return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(params))


def window_of(spec: ModelSpec) -> int | None:
    """How far back the layer sees that sees furthest; None if one sees everything."""
    windows = [layer.attention.window if isinstance(layer.attention, Attention) else None for layer in spec.layers]
    return None if None in windows else max(window for window in windows if window is not None)


def rope_key_of(spec: ModelSpec) -> Callable[[int], int] | None:
    """What of a sequence's length its rotary positions depend on: lengths with equal keys give equal angles."""
    scalings = [layer.attention.rope.scaling for layer in spec.layers if layer.attention.rope is not None]
    for scaling in scalings:
        if isinstance(scaling, Dynamic):
            return lambda length: max(length, scaling.original)
        if isinstance(scaling, LongRope):
            return lambda length: scaling.original + (length > scaling.original)
    return None


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
