# SPDX-License-Identifier: Apache-2.0
"""EngineConfig: the settings of an engine, declared once and checked when made."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

from jaxserve.errors import JaxserveError
from jaxserve.flags.setting import Setting
from jaxserve.flags.values import check
from jaxserve.types.checks import check_names

type DtypeSetting = Literal["auto", "bfloat16", "float16", "float32", "half", "float"]
type KvCacheDtype = Literal["auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2", "int8"]
type QuantizationSetting = Literal[
    "int8",
    "int8_per_channel_weight_only",
    "int4",
    "fp8",
    "fp8_per_channel",
    "fp8_per_block",
    "awq",
    "awq_marlin",
    "bitsandbytes",
    "compressed-tensors",
    "fbgemm_fp8",
    "gpt_oss_mxfp4",
    "gptq",
    "gptq_marlin",
    "modelopt",
    "modelopt_fp4",
    "mxfp4",
]
type Policy = Literal["fcfs", "priority"]
type Warmup = Literal["all", "staged", "none"]
type LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


class ConfigError(JaxserveError):
    """A setting that is out of range, contradicts another, or does not fit the model or the memory."""


def too_few_tokens(tokens: int, sequences: int) -> ConfigError:
    problem = f"max_num_batched_tokens is {tokens}, below max_num_seqs {sequences}"
    return ConfigError(problem, f"raise it to at least {sequences}: each running sequence needs one token per step")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The settings of an engine, with vLLM's names and a Setting for each: help and flags come from there."""

    model: Annotated[
        str,
        Setting(
            "Model to load: a folder (Hugging Face format or converted), a .gguf file, or a Hugging Face Hub ID such "
            "as org/name.",
            "Model",
            given_as="either",
            metavar="MODEL",
            common=True,
        ),
    ]
    tokenizer: Annotated[
        str | None, Setting("Folder or Hub ID of the tokenizer (default: the model's).", "Model", common=True)
    ] = None
    skip_tokenizer_init: Annotated[
        bool, Setting("Load no tokenizer: prompts must be token ids, and outputs have no text.", "Model")
    ] = False
    revision: Annotated[str | None, Setting("Branch, tag or commit of the model on the Hub.", "Model")] = None
    download_dir: Annotated[
        str | None, Setting("Folder for downloaded models (default: the Hugging Face cache).", "Model")
    ] = None
    dtype: Annotated[
        DtypeSetting,
        Setting(
            "Data type of the weights, and of the KV cache unless kv_cache_dtype sets it; auto uses the checkpoint's, "
            "but on a CPU float32, unless both checkpoint and processor have bfloat16. half is float16, float is "
            "float32.",
            "Model",
            common=True,
        ),
    ] = "auto"
    quantization: Annotated[
        QuantizationSetting | None,
        Setting(
            "Quantize the weights of an unquantized checkpoint while loading it. int8 needs half of bfloat16's memory, "
            "and is the fastest on CPUs; int8_per_channel_weight_only rounds no activations; fp8, fp8_per_channel and "
            "fp8_per_block are float8 with a scale for each matrix, row, or block of 128 x 128; int4 needs about a "
            "third of bfloat16's memory, and loses more quality. Any other method, and fp8, names the one that the "
            "checkpoint is quantized by, which is the default.",
            "Model",
            spellings=("-q",),
            common=True,
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        Setting(
            "Maximum length of prompt plus output (default: the model's limit, or less if memory is short).",
            "Model",
            low=1,
            high=2**30,
            unit="tokens",
            common=True,
        ),
    ] = None
    seed: Annotated[int, Setting("Default seed for requests without one.", "Model", low=-(2**63), high=2**63 - 1)] = 0

    gpu_memory_utilization: Annotated[
        float,
        Setting(
            "Fraction of device memory to use. On a CPU, set num_blocks or kv_cache_memory_bytes instead.",
            "Memory",
            above=0,
            high=1,
            common=True,
        ),
    ] = 0.9
    kv_cache_memory_bytes: Annotated[
        int | None,
        Setting(
            "Size of the KV cache on each device, such as 20GiB; overrides gpu_memory_utilization.",
            "Memory",
            low=1,
            high=2**60,
            unit="bytes",
            common=True,
        ),
    ] = None
    num_blocks: Annotated[
        int | None,
        Setting(
            "Number of KV cache blocks; overrides gpu_memory_utilization.",
            "Memory",
            low=2,
            high=2**31 - 1,
            spellings=("--num-gpu-blocks-override",),
        ),
    ] = None
    kv_cache_dtype: Annotated[
        KvCacheDtype,
        Setting(
            "Data type of the KV cache; auto is that of the weights. int8 and fp8 (which is fp8_e4m3) take about half "
            "of bfloat16's memory. Each token and head has a scale, computed when the token is stored.",
            "Memory",
            common=True,
        ),
    ] = "auto"
    block_size: Annotated[int, Setting("Tokens per KV cache block.", "Memory", low=8, high=256, power_of_two=True)] = 16
    enable_sleep_mode: Annotated[
        bool,
        Setting(
            "Release GPU memory to other processes while the engine is asleep. Steps take longer, because JAX then "
            "allocates memory from the driver instead of from a pool.",
            "Memory",
        ),
    ] = False
    enable_prefix_caching: Annotated[bool, Setting("Reuse the KV cache of prompts that share a prefix.", "Memory")] = (
        True
    )
    prefix_hash_seed: Annotated[
        str,
        Setting(
            "Text that seeds the hashes of cached prefixes; processes with the same seed compute the same hashes "
            "(default: a random seed).",
            "Memory",
            empty=True,
        ),
    ] = field(default="", repr=False)

    max_num_seqs: Annotated[
        int | None,
        Setting(
            "Maximum number of sequences that run at once (default: 256, or 32 on a CPU).",
            "Scheduling",
            low=1,
            high=16384,
            common=True,
        ),
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        Setting(
            "Maximum number of tokens per step (default: 2048, or 512 on a CPU).",
            "Scheduling",
            low=1,
            high=2**20,
            unit="tokens",
            common=True,
        ),
    ] = None
    max_num_queued_reqs: Annotated[
        int | None,
        Setting(
            "Maximum number of requests that wait because no row is free; more are rejected (default: 1024 in the "
            "server, else no limit).",
            "Scheduling",
            low=1,
            high=2**31 - 1,
            common=True,
        ),
    ] = None
    max_num_queued_tokens: Annotated[
        int | None,
        Setting(
            "Maximum number of prompt tokens waiting in total; more are rejected (default: no limit).",
            "Scheduling",
            low=1,
            high=2**31 - 1,
            unit="tokens",
        ),
    ] = None
    scheduling_policy: Annotated[
        Policy,
        Setting("Which request to run next: the first to arrive, or the one with the lowest priority.", "Scheduling"),
    ] = "fcfs"
    async_scheduling: Annotated[
        bool, Setting("Schedule each step while the previous one runs on the device.", "Scheduling")
    ] = True

    tensor_parallel_size: Annotated[
        int,
        Setting(
            "Number of devices to shard each layer over.", "Devices", low=1, high=4096, spellings=("-tp",), common=True
        ),
    ] = 1
    expert_parallel_size: Annotated[
        int,
        Setting(
            "Number of devices to distribute the experts of a mixture-of-experts model over.",
            "Devices",
            low=1,
            high=4096,
        ),
    ] = 1

    cpu_threads: Annotated[
        int | None,
        Setting(
            "Threads that compute where the model runs on a CPU (default: one for each core that this process may "
            "use). Fewer leave cores to the server and to other programs.",
            "Devices",
            low=1,
            high=4096,
        ),
    ] = None

    max_logprobs: Annotated[
        int,
        Setting(
            "Maximum number of log probabilities per token that a request may ask for; -1 allows the whole vocabulary.",
            "Sampling",
            low=-1,
            high=2**24,
        ),
    ] = 20
    generation_config: Annotated[
        str,
        Setting(
            "Where the defaults of sampling parameters come from: auto, the model's generation_config.json; vllm, "
            "none, so that vLLM's own defaults apply; or a folder with a generation_config.json.",
            "Sampling",
        ),
    ] = "auto"
    logprobs_mode: Annotated[
        LogprobsMode,
        Setting("Report log probabilities of the model, or of the distribution that is sampled from.", "Sampling"),
    ] = "raw_logprobs"

    warmup: Annotated[
        Warmup | bool,
        Setting(
            "Programs to compile before accepting requests: all; staged, a few that can serve any request, while the "
            "rest compile in the background; or none, so that requests wait for compilation.",
            "Startup",
            common=True,
            yes_no=("all", "none"),
        ),
    ] = "staged"
    compilation_cache_dir: Annotated[
        str,
        Setting(
            "Folder where compiled programs are cached for the next start; an empty value disables the cache. "
            "XDG_CACHE_HOME, if set, takes the place of ~/.cache.",
            "Startup",
            empty=True,
        ),
    ] = "~/.cache/jaxserve/xla"

    record_steps: Annotated[
        int,
        Setting(
            "Number of recent steps to keep; if a step fails, they are written to a file for `jaxserve replay`. "
            "Results are reproduced bit for bit only if the file has every step since the engine started. "
            "The file contains the token ids of prompts.",
            "Debugging",
            low=0,
            high=2**31 - 1,
        ),
    ] = 0

    def __new__(cls, *args: object, **given: object) -> Self:
        check_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.warmup, bool):
            object.__setattr__(self, "warmup", "all" if self.warmup else "none")
        check(self, ConfigError)
        object.__setattr__(self, "dtype", {"half": "float16", "float": "float32"}.get(self.dtype, self.dtype))
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError("num_blocks and kv_cache_memory_bytes are both set", "set only one of them")
        if self.max_num_batched_tokens and self.max_num_seqs and self.max_num_batched_tokens < self.max_num_seqs:
            raise too_few_tokens(self.max_num_batched_tokens, self.max_num_seqs)
