# SPDX-License-Identifier: Apache-2.0
"""How an engine is set up. One frozen dataclass with vLLM's names, checked when made; flags come from its fields."""

import math
from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

from jaxserve.errors import JaxserveError
from jaxserve.types.checks import check_names

type Dtype = Literal["auto", "bfloat16", "float16", "float32"]
type Policy = Literal["fcfs", "priority"]
type LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


class ConfigError(JaxserveError):
    """A setting that is out of range, contradicts another, or does not fit the model or the memory."""


def too_few_tokens(tokens: int, sequences: int) -> ConfigError:
    problem = f"max_num_batched_tokens is {tokens}, below max_num_seqs {sequences}"
    return ConfigError(problem, "every running sequence needs a token in each step: raise it")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    model: str
    """A model folder (Hugging Face or converted), or a name on the hub."""
    tokenizer: str | None = None
    """Where the tokenizer is; with the model if not given."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    download_dir: str | None = None
    """Where downloads are kept; the hub's usual cache if not given."""
    skip_tokenizer_init: bool = False
    """Load no tokenizer: prompts are token ids, outputs have no text."""
    dtype: Dtype = "auto"
    """What parameters and KV are held in. auto: as the checkpoint says, float32 on a CPU."""
    seed: int = 0
    """Seed of requests that bring none."""
    tensor_parallel_size: int = 1
    """Over how many devices each layer is cut."""
    expert_parallel_size: int = 1
    """Over how many devices the experts of a mixture are spread."""
    max_model_len: int | None = None
    """Longest prompt and answer together; if not given what the model takes, or less where memory is short."""
    max_num_seqs: int | None = None
    """How many sequences run at once; 256 if not given, 32 on a CPU."""
    max_num_batched_tokens: int | None = None
    """How many tokens one step computes at most; 2048 if not given, 512 on a CPU."""
    block_size: int = 16
    """Tokens in a block of the KV cache."""
    gpu_memory_utilization: float = 0.9
    """The share of device memory to use. On a CPU see num_blocks and kv_cache_memory_bytes."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache on each device, in place of a share of its memory."""
    num_blocks: int | None = None
    """Number of KV blocks, in place of any sizing."""
    enable_prefix_caching: bool = True
    """Reuse the KV of prompts that begin alike."""
    scheduling_policy: Policy = "fcfs"
    """Who goes first: whoever came first, or the lowest priority number."""
    async_scheduling: bool = True
    """Prepare a step while the one before it runs."""
    max_logprobs: int = 20
    """How many log-probabilities per token a request may ask for."""
    logprobs_mode: LogprobsMode = "raw_logprobs"
    """Of the model's own distribution, or of the one sampled from."""
    max_num_queued_reqs: int | None = None
    """How many requests may wait; more are refused. If not given no limit, in the server 1024."""
    max_num_queued_tokens: int | None = None
    """How many prompt tokens may wait in all; more are refused. No limit if not given."""
    warmup: bool = True
    """Compile every program before the first request; else each when it is first needed, which then waits for it."""
    compilation_cache_dir: str = "~/.cache/jaxserve/xla"
    """Where compiled programs are kept for the next start; an empty string keeps none."""

    def __new__(cls, *args: object, **given: object) -> Self:
        check_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"model is {self.model!r}", "name a folder or a model on the hub")
        for name, kind in (("dtype", Dtype), ("scheduling_policy", Policy), ("logprobs_mode", LogprobsMode)):
            allowed = get_args(kind.__value__)
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}", f"choose one of {', '.join(allowed)}")
        for name in ("skip_tokenizer_init", "enable_prefix_caching", "async_scheduling", "warmup"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}", "give True or False")
        self._whole("seed", -(2**63), 2**63 - 1)
        self._whole("tensor_parallel_size", 1, 4096)
        self._whole("expert_parallel_size", 1, 4096)
        self._whole("max_model_len", 1, 2**30, optional=True)
        self._whole("max_num_seqs", 1, 16384, optional=True)
        self._whole("max_num_batched_tokens", 1, 2**20, optional=True)
        self._whole("block_size", 8, 256)
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size is {self.block_size}", "give a power of two from 8 to 256")
        self._whole("kv_cache_memory_bytes", 1, 2**60, optional=True)
        self._whole("num_blocks", 2, 2**31 - 1, optional=True)
        self._whole("max_logprobs", -1, 2**24)
        self._whole("max_num_queued_reqs", 1, 2**31 - 1, optional=True)
        self._whole("max_num_queued_tokens", 1, 2**31 - 1, optional=True)
        share = cast(object, self.gpu_memory_utilization)
        real = isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share)
        if not real or not 0 < cast(float, share) <= 1:
            raise ConfigError(f"gpu_memory_utilization is {share!r}", "give a number above 0, up to 1")
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError("num_blocks and kv_cache_memory_bytes are both given", "give one of them")
        if self.max_num_batched_tokens and self.max_num_seqs and self.max_num_batched_tokens < self.max_num_seqs:
            raise too_few_tokens(self.max_num_batched_tokens, self.max_num_seqs)

    def _whole(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise ConfigError(f"{name} is {value!r}", f"give a whole number from {low} to {high}")
