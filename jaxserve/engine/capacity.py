# SPDX-License-Identifier: Apache-2.0
"""The sizes of everything in an engine: `resolve` computes them from the settings, the model and the devices' memory.

Plain arithmetic: it queries no device, compiles nothing and does not import jax. The engine, `jaxserve check` and the
checks before startup all call it. When the engine learns more, such as the memory that the largest compiled step takes,
it updates `Memory` and calls `resolve` again.

On an accelerator: KV cache = usable memory - memory in use, weights included - state - the largest step's temporaries -
slack. On a CPU the KV cache is large enough for all rows, but at most 4 GiB and a quarter of the free memory.
"""

import math
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Self

from jaxserve.config import ConfigError, EngineConfig, too_few_tokens
from jaxserve.engine.buckets import Buckets
from jaxserve.flags.sizes import given_size, shown_size
from jaxserve.models import cache_groups
from jaxserve.models.cache_groups import Groups
from jaxserve.models.mesh_fit import Fit
from jaxserve.models.spec import LatentAttention, Layer, Mlp, ModelSpec, Recurrent

GIB = 2**30
CPU_CACHE = 4 * GIB
SLACK = 256 * 2**20  # for libraries and the allocator
WHOLE = Fit()  # a model on one device
KV_DTYPES = {
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}  # jax's names of those in the settings
ONE_BYTE, SCALE = ("int8", "float8_e4m3fn", "float8_e5m2"), "float32"  # dtypes of KV that have scales, and theirs
# Kernels cannot address a pool of one-byte values with between so many bytes.
UNADDRESSED = range(2**31, 2**32 + 1)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The engine's limits, which requests are checked against."""

    vocab_size: int  # the width of the logits
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int  # slots in a KV block
    num_blocks: int  # including the null block
    max_logprobs: int
    eos_token_ids: frozenset[int] = frozenset()
    windows: tuple[int | None, ...] = (None,)  # of each cache group: the tokens that its layers attend to; None: all
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    enable_prefix_caching: bool = True
    states: bool = False  # whether layers keep a state for each row
    priority: bool = False
    rope_length: int = 0  # the length that length-dependent RoPE assumes for every sequence
    hidden_size: int = 0  # of the hidden states that embeddings are made of
    generates: bool = True  # whether the model has a language model's head

    @property
    def width(self) -> int:
        """The blocks of the longest sequence: the width of the block tables."""
        return -(-self.max_model_len // self.block_size)

    @property
    def groups(self) -> int:
        """The number of cache groups, each of which has a block table."""
        return len(self.windows)

    def blocks_for(self, tokens: int) -> int:
        """The most blocks that a sequence of this length holds at any time, in all groups."""
        return sum(self.blocks_in(window, tokens) for window in self.windows)

    def blocks_in(self, window: int | None, tokens: int) -> int:
        """The same in one group: a window, the chunk being computed, and a partial block at either end."""
        if window is not None:
            tokens = min(tokens, window + self.max_num_batched_tokens + 2 * self.block_size)
        return -(-tokens // self.block_size)

    def kept_by(self, tokens: int) -> int:
        """The blocks that a sequence of this length holds while no chunk of its prompt is computed."""
        size = self.block_size
        kept = (tokens if window is None else min(tokens, window + 2 * size) for window in self.windows)
        return sum(-(-count // size) for count in kept)

    def longest_in(self, blocks: int) -> int:
        """The longest sequence that this many blocks hold, up to `max_model_len`."""
        each = range(1, self.width + 1)
        full = bisect_right(each, blocks, key=lambda count: self.blocks_for(count * self.block_size))
        return min(full * self.block_size, self.max_model_len)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What `resolve` needs to know about the devices; bytes are per device."""

    on_cpu: bool
    dtype: str  # of parameters
    fitted: Fit = WHOLE
    weights: int = 0
    usable: int | None = None  # by this process; None: unknown, the KV cache is large enough for all rows
    used: int = 0  # of `usable`, once the weights are loaded
    step: int | None = None  # temporaries of the largest step; None: estimated


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The sizes of everything that an engine holds and computes; bytes are per device."""

    limits: Limits
    buckets: Buckets
    memory: Memory
    wanted_len: int  # the configured max_model_len, or the model's
    insisted: bool  # max_model_len is configured, so it must not be reduced
    fixed: tuple[str, int] | None  # the setting that fixes the KV cache's size, and its value
    groups: Groups  # of layers that keep KV of the same tokens
    kv_dtype: str
    token_bytes: int  # one token's KV in all layers
    block_bytes: int
    state: int  # block tables, last tokens and lengths, sampling controls
    step: int  # temporaries of the largest step

    @property
    def blocks(self) -> int:
        """The usable blocks: all except the null block."""
        return max(self.limits.num_blocks - 1, 0)

    @property
    def tokens(self) -> int:
        """How many tokens of the longest sequences the KV cache holds."""
        if self.limits.windows == (None,):
            return self.blocks * self.limits.block_size
        return int(self.concurrency * self.longest)

    @property
    def held(self) -> int:
        """The most blocks that a sequence of `wanted_len` holds."""
        return self.limits.blocks_for(self.wanted_len)

    @property
    def fits(self) -> bool:
        return not self._overfull and self.blocks >= (self.held if self.insisted else self.limits.groups)

    @property
    def _overfull(self) -> bool:
        """Whether the weights alone exceed a CPU's free memory."""
        memory = self.memory
        return memory.on_cpu and memory.usable is not None and memory.used > memory.usable

    @property
    def longest(self) -> int:
        """The longest sequence that the KV cache holds, up to `wanted_len`."""
        return self.wanted_len if self.blocks >= self.held else self._sequence

    @property
    def concurrency(self) -> float:
        """How many of the longest sequences fit into the KV cache together, while one prompt is computed."""
        beside = max(self.blocks - self.held, 0) / self.limits.kept_by(self.wanted_len)
        return beside + bool(self.blocks)

    @property
    def _sequence(self) -> int:
        """The longest sequence of at most `wanted_len` tokens that the blocks hold."""
        return replace(self.limits, max_model_len=self.wanted_len).longest_in(self.blocks)

    @property
    def sequence_bytes(self) -> int:
        """The KV of the longest sequence."""
        return self.limits.kept_by(self.longest) * self.block_bytes

    @property
    def kept_share(self) -> float:
        """The KV of the longest sequence as a share of what it would be if every layer kept all tokens."""
        blocks = -(-self.longest // self.limits.block_size)
        return self.sequence_bytes / max(blocks * self.limits.block_size * self.token_bytes, 1)

    @property
    def cache_bytes(self) -> int:
        return self.limits.num_blocks * self.block_bytes

    def smallest(self) -> Self:
        """The same with the smallest KV cache: a step's temporaries do not depend on its size."""
        return replace(self, limits=replace(self.limits, num_blocks=2, max_model_len=self.wanted_len))

    def checked(self) -> Self:
        """Raises a ConfigError if an engine cannot run with these sizes."""
        if not self.fits:
            raise self.misfit()
        return self

    def misfit(self) -> ConfigError:
        """The error for sizes that do not fit."""
        if self._overfull:
            free = shown_size(self.memory.usable or 0)
            problem = (
                f"the weights need {shown_size(self.memory.used)}, but only {free} of this machine's memory is free"
            )
            return ConfigError(problem, "use a machine with more memory, or a smaller dtype")
        longest = self.wanted_len if self.insisted else 2
        too_few = f"the KV cache holds {self._sequence:,} tokens, too few for a sequence of {longest:,}"
        if self.fixed is not None:
            name, given = self.fixed
            needed = 1 + self.limits.blocks_for(longest)
            wanted = str(needed) if name == "num_blocks" else _in_whole_mib(needed * self.block_bytes)
            hint = f"raise it to {wanted} or more"
            if self.insisted and self._sequence:
                hint += f", or lower max_model_len to {self._sequence}"
            return ConfigError(f"{name} is {given}: {too_few}", hint)
        if self.blocks:
            return ConfigError(too_few, "lower max_model_len, or give the KV cache more memory")
        taken = shown_size(self.memory.used + self.state + self.step + SLACK)
        usable = f"{shown_size(self.memory.usable or 0)} usable per device"
        problem = f"no memory is left for the KV cache: of {usable}, all else needs {taken}"
        return ConfigError(problem, "use more devices, or raise gpu_memory_utilization")

    # --- for people -------------------------------------------------------------------------------------------------

    def parts(self) -> list[tuple[str, int, str]]:
        """The parts of memory use: name, bytes, and the setting that the part grows with."""
        memory, limits = self.memory, self.limits
        found = [("weights", memory.weights, "")]
        if memory.usable is not None and not memory.on_cpu:
            other = max(memory.used - memory.weights, 0)
            about = ", about" if memory.step is None else ""
            found += [("already in use", other, "")] if other else []
            found += [
                ("state", self.state, f"max_num_seqs {limits.max_num_seqs}"),
                (f"largest step{about}", self.step, f"max_num_batched_tokens {limits.max_num_batched_tokens}"),
                ("slack", SLACK, ""),
            ]
        return [*found, ("KV cache", self.cache_bytes if self.blocks else 0, "")]

    def usable(self) -> str:
        memory = self.memory
        if memory.on_cpu:
            return "per device, on a CPU"
        return "per device" if memory.usable is None else f"per device, {shown_size(memory.usable)} usable"

    def cache_lines(self) -> list[str]:
        """The KV cache's capacity, for a report."""
        if not self.blocks or self._overfull:
            return []
        longest = self.longest
        groups = self.limits.groups
        held = f" = {self.tokens:,} tokens" if groups == 1 else f" for {groups} groups of layers"
        blocks = f"{self.blocks:,} block{'s' * (self.blocks != 1)} of {self.limits.block_size}{held}"
        lines = [f"{blocks}: {self.concurrency:.1f} sequences of {longest:,} tokens at once"]
        if longest < self.wanted_len and not self.insisted:
            lines.append(
                f"max_model_len is {longest:,}, not the model's {self.wanted_len:,}: the KV cache is too small"
            )
        if self.limits.states:
            lines.append("prefix caching is off, because layers keep a state of each sequence")
        return lines

    def lines(self) -> list[str]:
        """The whole report, for a log."""
        return [
            f"memory {self.usable()}: {', '.join(f'{name} {shown_size(count)}' for name, count, _ in self.parts())}",
            *(f"KV cache: {line}" if i == 0 else line for i, line in enumerate(self.cache_lines())),
        ]


def resolve(config: EngineConfig, spec: ModelSpec, memory: Memory) -> Capacity:
    """Raises a ConfigError for settings that contradict each other or the model; check `fits` for lack of memory."""
    rows, tokens = step_sizes(config, on_cpu=memory.on_cpu)
    longest = _wanted_length(config, spec)
    groups = cache_groups.groups_of(spec, longest)
    limits = Limits(
        vocab_size=spec.vocab_size,
        max_model_len=longest,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        block_size=config.block_size,
        num_blocks=2,
        max_logprobs=spec.vocab_size if config.max_logprobs == -1 else min(spec.vocab_size, config.max_logprobs),
        windows=groups.windows,
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
        # A prefix is of no use without the states at its end.
        enable_prefix_caching=config.enable_prefix_caching and not groups.states,
        states=groups.states,
        priority=config.scheduling_policy == "priority",
        rope_length=longest if spec.needs_rope_length else 0,
        hidden_size=spec.embed_dim or spec.hidden,
        generates=spec.generates,
    )
    kv_dtype = stored_kv(config, spec, memory.dtype)
    buckets = Buckets.of(rows, tokens)
    found = Capacity(
        limits=limits,
        buckets=buckets,
        memory=memory,
        wanted_len=longest,
        insisted=config.max_model_len is not None,
        fixed=_fixed(config),
        groups=groups,
        kv_dtype=kv_dtype,
        token_bytes=token_bytes(spec, kv_dtype, memory.fitted),
        block_bytes=block_bytes(spec, groups, kv_dtype, memory.fitted) * config.block_size,
        state=_state_bytes(limits, spec),
        step=_step_estimate(spec, buckets, shards=memory.fitted.shards, item=item_bytes(memory.dtype))
        if memory.step is None
        else memory.step,
    )
    blocks = _num_blocks(found)
    if kv_dtype in ONE_BYTE:
        blocks = _addressed(blocks, config, max(map(memory.fitted.slot_values, spec.layers)) // 2 * config.block_size)
    return _with_blocks(found, blocks)


def step_sizes(config: EngineConfig, *, on_cpu: bool) -> tuple[int, int]:
    """The most sequences that run at once, and the most tokens in a step."""
    rows = config.max_num_seqs or (32 if on_cpu else 256)
    tokens = config.max_num_batched_tokens or max(rows, 512 if on_cpu else 2048)
    if tokens < rows:
        raise too_few_tokens(tokens, rows)
    return rows, tokens


def _wanted_length(config: EngineConfig, spec: ModelSpec) -> int:
    longest = config.max_model_len or spec.max_positions
    if longest > spec.max_positions:
        problem = f"max_model_len is {longest}, above the model's limit of {spec.max_positions}"
        raise ConfigError(problem, f"lower it to {spec.max_positions} or less")
    if longest < 2:
        raise ConfigError(
            f"max_model_len is {longest}", "use at least 2: one token for the prompt and one for the output"
        )
    return longest


def _fixed(config: EngineConfig) -> tuple[str, int] | None:
    if config.num_blocks is not None:
        return "num_blocks", config.num_blocks
    size = config.kv_cache_memory_bytes
    return None if size is None else ("kv_cache_memory_bytes", size)


def _num_blocks(sizes: Capacity) -> int:
    memory, per_block = sizes.memory, sizes.block_bytes
    if sizes.fixed is not None:
        name, given = sizes.fixed
        return given if name == "num_blocks" else given // per_block
    wanted = 1 + sizes.limits.max_num_seqs * sizes.held
    if memory.usable is None:
        return wanted
    free = memory.usable - memory.used
    if memory.on_cpu:
        return max(2, min(wanted, min(CPU_CACHE, max(free, 0) // 4) // per_block))
    return max(0, free - sizes.state - sizes.step - SLACK) // per_block


def _addressed(blocks: int, config: EngineConfig, pool_bytes: int) -> int:
    """At most so many blocks, of which each takes `pool_bytes` in a pool, that kernels can address them."""
    if blocks * pool_bytes not in UNADDRESSED:
        return blocks
    most = (UNADDRESSED.start - 1) // pool_bytes
    if config.num_blocks is not None:
        problem = f"num_blocks is {blocks}: GPU kernels cannot address one-byte pools of 2 to 4 GiB, as each would have"
        more = UNADDRESSED.stop // pool_bytes + 1
        raise ConfigError(problem, f"use at most {most} or at least {more}, or another kv_cache_dtype")
    return most


def _with_blocks(sizes: Capacity, blocks: int) -> Capacity:
    """The same with this many blocks; reduces the length to what they hold, unless it is configured."""
    found = replace(sizes, limits=replace(sizes.limits, num_blocks=blocks))
    if found.blocks >= found.held or found.insisted or not found.fits:
        return found
    return replace(found, limits=replace(found.limits, max_model_len=found.longest))


def _state_bytes(limits: Limits, spec: ModelSpec) -> int:
    """Block tables, last tokens and lengths, sampling controls, of which each value takes 4 bytes; states of layers."""
    from jaxserve.sampling.control_row import row_size  # imports numpy, which `jaxserve check --help` does not need

    controls = limits.vocab_size + row_size(limits.vocab_size) - 1  # the row's number is not stored
    recurrent = (layer.attention for layer in spec.layers if isinstance(layer.attention, Recurrent))
    states = (math.prod(part.shape) * item_bytes(part.dtype) for mixer in recurrent for part in mixer.state)
    return limits.max_num_seqs * (4 * (limits.groups * limits.width + 2 + controls) + sum(states))


def _step_estimate(spec: ModelSpec, buckets: Buckets, *, shards: int, item: int) -> int:
    """Estimate of the largest program's temporaries: a layer's activations, or logits and their copy for sampling."""
    widest = 0
    for mlp in (layer.mlp for layer in spec.layers):
        width = mlp.width if isinstance(mlp, Mlp) else mlp.width * mlp.router.top_k
        widest = max(widest, 6 * spec.hidden + 3 * width // shards)
    logits = 2 * 4 * max(buckets.rows, buckets.score_rows) * spec.vocab_size
    return max(buckets.tokens * widest * item, logits)


def stored_kv(config: EngineConfig, spec: ModelSpec, dtype: str) -> str:
    """The dtype that KV is stored in, for parameters of this dtype."""
    setting = config.kv_cache_dtype
    found = dtype if setting == "auto" else KV_DTYPES.get(setting, setting)
    latent = any(isinstance(layer.attention, LatentAttention) for layer in spec.layers)
    if found in ONE_BYTE and latent:
        problem = (
            f"kv_cache_dtype is {setting}, but this model caches latents (MLA), for which one byte is not supported"
        )
        raise ConfigError(problem, "use bfloat16 or auto; latents are small")
    return found


def token_bytes(spec: ModelSpec, kv_dtype: str, fitted: Fit = WHOLE) -> int:
    """The bytes of one token's KV over all layers, per device."""
    return sum(_slot_bytes(layer, kv_dtype, fitted) for layer in spec.layers)


def block_bytes(spec: ModelSpec, groups: Groups, kv_dtype: str, fitted: Fit = WHOLE) -> int:
    """The bytes of one token's KV in the layers of one group, per device."""
    return sum(_slot_bytes(spec.layers[layer], kv_dtype, fitted) for layer in groups.layers())


def _slot_bytes(layer: Layer, kv_dtype: str, fitted: Fit) -> int:
    """One token's KV in a layer, and its scales, per device."""
    scales = fitted.slot_heads(layer) * item_bytes(SCALE) if kv_dtype in ONE_BYTE else 0
    return fitted.slot_values(layer) * item_bytes(kv_dtype) + scales


def item_bytes(dtype: str) -> int:
    """The bytes of one number: 2 for bfloat16, 1 for float8_e4m3fn."""
    return int(re.findall(r"\d+", dtype)[0]) // 8


def _in_whole_mib(count: int) -> str:
    """As a flag takes it, from 1 MiB on rounded up to whole MiB."""
    return str(count) if count < 2**20 else given_size(-(-count // 2**20) * 2**20)
