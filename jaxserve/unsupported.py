# SPDX-License-Identifier: Apache-2.0
"""vLLM's and OpenAI's names that jaxserve does not have, once: settings, sampling parameters, fields of requests.

Each has an entry: what to say after the name, and what to do about it. A name that gains support is deleted here.
"""

from typing import NamedTuple

REMOVE = "remove it"


class Reason(NamedTuple):
    problem: str  # after the name
    hint: str
    neutral: tuple[str | bool, ...] = ()  # values of a request's field that mean the same as no value
    empty: bool = True  # an empty value of a request's field means the same as no value

    def about(self, name: str) -> tuple[str, str]:
        """Problem and hint, with the name as the user spelled it."""
        return f"{name} {self.problem}", self.hint


def _planned(*names: str) -> dict[str, Reason]:
    return dict.fromkeys(names, Reason("is not supported yet", REMOVE))


def _instead(**hints: str) -> dict[str, Reason]:
    return {name: Reason("is not supported", hint) for name, hint in hints.items()}


def _needless(**reasons: str) -> dict[str, Reason]:
    return {name: Reason(f"is not needed: {why}", REMOVE) for name, why in reasons.items()}


SAMPLING_PARAMETERS = {
    **_planned("structured_outputs", "guided_decoding", "logprob_token_ids", "flat_logprobs", "thinking_token_budget"),
    **_planned("repetition_detection", "logits_processors", "best_of", "truncate_prompt_tokens", "extra_args"),
}

SETTINGS = {
    **_planned("kv_cache_dtype_skip_layers"),
    **_planned("enable_lora", "lora_modules", "max_loras", "max_lora_rank", "max_cpu_loras", "fully_sharded_loras"),
    **_planned("lora_dtype", "lora_target_modules"),
    **_planned("speculative_config", "spec_method", "spec_model", "spec_tokens"),
    **_planned("structured_outputs_config", "guided_decoding_backend", "reasoning_parser", "enable_auto_tool_choice"),
    **_planned("tool_call_parser", "tool_parser_plugin", "exclude_tools_when_tool_choice_none", "logits_processors"),
    **_planned("pipeline_parallel_size", "data_parallel_size", "data_parallel_rank", "data_parallel_address"),
    **_planned("data_parallel_rpc_port", "data_parallel_size_local", "data_parallel_backend"),
    **_planned("decode_context_parallel_size", "prefill_context_parallel_size", "enable_eplb", "all2all_backend"),
    **_planned("enable_dbo", "distributed_executor_backend", "nnodes", "node_rank", "master_addr", "master_port"),
    **_planned("headless", "disable_custom_all_reduce", "api_server_count"),
    **_planned("cpu_offload_gb", "offload_group_size", "kv_offloading_size", "kv_offloading_backend"),
    **_planned("weight_transfer_config", "kv_transfer_config", "kv_events_config", "ec_transfer_config"),
    **_planned("compilation_config", "optimization_level", "cudagraph_capture_sizes", "performance_mode"),
    **_planned("jit_monitor_mode", "use_fp64_gumbel", "disable_cascade_attn", "attention_backend"),
    **_planned("tokenizer_mode", "code_revision", "hf_overrides", "hf_config_path"),
    **_planned("override_generation_config", "ignore_patterns", "safetensors_load_strategy"),
    **_planned("task", "runner", "convert", "pooler_config", "override_pooler_config"),
    **_planned("prefix_caching_hash_algo", "long_prefill_token_threshold", "max_num_scheduled_tokens"),
    **_planned("scheduler_cls", "scheduler_reserve_full_isl", "watermark", "stream_interval"),
    **_planned("prefill_schedule_interval", "disable_sliding_window", "disable_hybrid_kv_cache_manager"),
    **_planned("middleware", "disable_fastapi_docs", "grpc", "ssl_ca_certs", "ssl_cert_reqs"),
    **_planned("chat_template_content_format", "default_chat_template_kwargs", "enable_tokenizer_info_endpoint"),
    **_planned("enable_per_request_metrics", "collect_detailed_traces", "kv_cache_metrics"),
    **_planned("enable_mfu_metrics", "cudagraph_metrics", "enable_logging_iteration_details"),
    **_planned("fail_on_environ_validation", "enable_fault_tolerance", "limit_mm_per_prompt", "mm_processor_kwargs"),
    **_instead(
        trust_remote_code="remove it: code that comes with a checkpoint is never run",
        enforce_eager="set warmup to none (--no-warmup) for a quick start",
        enable_expert_parallel="use expert_parallel_size (--expert-parallel-size N)",
        swap_space="remove it: preempted requests are recomputed",
        load_format="use safetensors, or a model written by `jaxserve convert`",
        tokenizer_revision="download the tokenizer and name its folder with --tokenizer",
        hf_token="set the environment variable HF_TOKEN",
        profiler_config="use --profile-dir",
    ),
    **_needless(
        enable_chunked_prefill="prompts are always processed in chunks",
        disable_log_requests="their parameters are logged only with --enable-log-requests",
        disable_uvicorn_access_log="there is no access log",
        enable_prompt_tokens_details="usage always includes the number of cached tokens",
        enable_server_load_tracking="/load is always available",
    ),
}

YES, NO = ("true",), ("false",)


class NoEffect(NamedTuple):
    """A flag of vLLM that is accepted with some values: what they ask for is so anyway."""

    values: tuple[str, ...]
    note: str = "this is the default"


_ROUTES = "every route is there, for what the model can do"

# By setting. Its other values are refused, for the reason above.
NO_EFFECT = {
    "enable_chunked_prefill": NoEffect(YES, "prompts are always processed in chunks"),
    "disable_log_requests": NoEffect(YES, "their parameters are logged only with --enable-log-requests"),
    "disable_uvicorn_access_log": NoEffect(YES, "there is no access log"),
    "enable_prompt_tokens_details": NoEffect(YES, "usage always includes the number of cached tokens"),
    "enable_server_load_tracking": NoEffect(YES, "/load is always available"),
    "trust_remote_code": NoEffect((*YES, *NO), "code that comes with a checkpoint is never run"),
    "enforce_eager": NoEffect((*YES, *NO), "there are no CUDA graphs; --no-warmup starts quickly"),
    "disable_custom_all_reduce": NoEffect((*YES, *NO), "collectives are XLA's"),
    **dict.fromkeys(("pipeline_parallel_size", "data_parallel_size", "data_parallel_size_local"), NoEffect(("1",))),
    **dict.fromkeys(("decode_context_parallel_size", "prefill_context_parallel_size"), NoEffect(("1",))),
    **dict.fromkeys(("nnodes", "api_server_count", "stream_interval"), NoEffect(("1",))),
    **dict.fromkeys(("node_rank", "ssl_cert_reqs", "cpu_offload_gb", "swap_space"), NoEffect(("0", "0.0"))),
    **dict.fromkeys(("tokenizer_mode", "guided_decoding_backend"), NoEffect(("auto",))),
    "load_format": NoEffect(("auto", "safetensors"), "checkpoints are read from safetensors files"),
    "chat_template_content_format": NoEffect(("auto", "string"), "templates get content as a string"),
    "distributed_executor_backend": NoEffect(("mp", "uni"), "one process runs all devices"),
    "prefix_caching_hash_algo": NoEffect(("sha256",)),
    "task": NoEffect(("auto", "generate", "embed", "embedding", "classify", "score"), _ROUTES),
    "runner": NoEffect(("auto", "generate", "pooling"), _ROUTES),
    "convert": NoEffect(("auto", "none", "embed"), _ROUTES),
    **dict.fromkeys(("enable_lora", "enable_auto_tool_choice", "enable_eplb", "enable_dbo"), NoEffect(NO)),
    **dict.fromkeys(("headless", "enable_expert_parallel", "fully_sharded_loras"), NoEffect(NO)),
    "limit_mm_per_prompt": NoEffect((), "models read text only"),
}


def no_effect(setting: str, value: str) -> str | None:
    """Why a setting with this value, as text, is accepted without effect; None if it is not."""
    found = NO_EFFECT.get(setting)
    if setting == "limit_mm_per_prompt":  # {"image": 0, "video": 0} or image=0,video=0
        counts = value.strip("{} ").replace("=", ":").split(",")
        return found.note if found and all(each.rpartition(":")[2].strip() in ("0", "") for each in counts) else None
    return found.note if found and value in found.values else None


# vLLM's short flags of settings above.
SHORT_FLAGS = {
    **{"-pp": "pipeline_parallel_size", "-dp": "data_parallel_size"},
    **{
        "-O": "optimization_level",
        "-cc": "compilation_config",
        "-sc": "speculative_config",
        "-asc": "api_server_count",
    },
    **{"-n": "nnodes", "-r": "node_rank", "-dcp": "decode_context_parallel_size", "-ep": "enable_expert_parallel"},
}

# Fields of request bodies: of completions and chats, of completions alone, of everything that is made of messages, of
# chats alone, of scores, of embeddings, of one message.
GENERATION_FIELDS = {
    **_planned("structured_outputs", "guided_regex", "guided_choice", "guided_grammar"),
    **_planned("guided_decoding_backend", "guided_whitespace_pattern", "logits_processors", "logprob_token_ids"),
    **_planned("thinking_token_budget", "repetition_detection", "routed_experts_prompt_start"),
    **_planned("kv_transfer_params", "ec_transfer_params", "vllm_xargs"),
    "guided_json": Reason("is not supported yet", REMOVE, empty=False),  # an empty schema asks for any JSON
}
COMPLETION_FIELDS = _planned("suffix", "prompt_embeds")
CONVERSATION_FIELDS = _planned("tools", "documents")
CHAT_FIELDS = {
    **_planned("functions", "audio", "prediction", "moderation"),
    "function_call": Reason("is not supported yet", REMOVE, neutral=("none", "auto")),
    "reasoning_effort": Reason("is not supported yet", REMOVE, neutral=("none",)),
    "verbosity": Reason("is not supported yet", REMOVE, neutral=("medium",)),
    "web_search_options": Reason("is not supported yet", REMOVE, empty=False),  # without options it searches too
}
SCORE_FIELDS = {
    name: Reason("is not supported yet", REMOVE, neutral=(True,)) for name in ("use_activation", "activation")
}
EMBEDDING_FIELDS = {
    **_planned("messages", "embed_dtype", "endianness"),
    **SCORE_FIELDS,
    **{name: Reason("is not supported yet", REMOVE, neutral=(True,)) for name in ("normalize", "softmax")},
    "task": Reason("is not supported", "remove it, and use /v1/embeddings for embeddings, /classify for labels"),
}
MESSAGE_FIELDS = _planned("refusal", "audio", "function_call", "tool_calls", "tool_call_id")

# Fields that cannot change the answer of a model for text. They are treated like unknown fields.
WITHOUT_EFFECT = ("session_id", "prompt_cache_retention", "media_io_kwargs", "mm_processor_kwargs")
