# SPDX-License-Identifier: Apache-2.0
"""Flags of the engine and the server: EngineConfig's fields and ServerConfig's, in groups, with vLLM's spellings.

A configuration file stands behind the flags, the defaults behind it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, cast

from jaxserve import unsupported
from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags.parsing import Flag, Parser, flags_of

ENGINE_GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        *("model", "tokenizer", "skip_tokenizer_init", "revision", "download_dir", "dtype", "max_model_len", "seed"),
    ),
    "Memory": (
        *("gpu_memory_utilization", "kv_cache_memory_bytes", "num_blocks", "block_size", "enable_prefix_caching"),
    ),
    "Scheduling": (
        *("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs", "max_num_queued_tokens"),
        *("scheduling_policy", "async_scheduling"),
    ),
    "Devices": ("tensor_parallel_size", "expert_parallel_size"),
    "Sampling": ("max_logprobs", "logprobs_mode"),
    "Start": ("warmup", "compilation_cache_dir"),
}
SERVER_GROUPS: dict[str, tuple[str, ...]] = {
    "Server": (
        *("host", "port", "served_model_name", "no_ui", "max_body_bytes", "max_connections", "tokenizer_workers"),
        *("metrics_prefix", "profile_dir", "restart_engine"),
    ),
    "Requests": (
        *("chat_template", "trust_request_chat_template", "response_role", "allow_unknown_fields"),
        *("enable_force_include_usage", "return_tokens_as_token_ids", "enable_request_id_headers"),
    ),
    "Security": (
        *("api_key", "ssl_keyfile", "ssl_certfile", "allowed_hosts", "allowed_origins", "allowed_methods"),
        *("allowed_headers", "allow_credentials"),
    ),
    "Timeouts": (
        *("request_timeout", "shutdown_timeout", "stream_timeout", "keep_alive_timeout", "header_timeout"),
        *("body_timeout", "watchdog_timeout"),
    ),
    "Logging": (
        *("log_level", "log_format", "enable_log_requests", "enable_log_outputs", "max_log_len"),
        "disable_log_stats",
    ),
}
# What `--help` shows of them; `--help=all` shows the rest.
COMMON = (
    *("model", "config", "dtype", "max_model_len", "tokenizer", "gpu_memory_utilization", "kv_cache_memory_bytes"),
    *("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs", "tensor_parallel_size", "warmup"),
    *("host", "port", "served_model_name", "chat_template", "api_key", "ssl_certfile", "ssl_keyfile"),
    *("request_timeout", "shutdown_timeout", "restart_engine", "log_level", "log_format", "enable_log_requests"),
)
SPELLINGS = {
    "tensor_parallel_size": ("-tp",),
    "num_blocks": ("--num-gpu-blocks-override",),
    "log_level": ("--uvicorn-log-level",),
}


def refused() -> dict[str, tuple[str, str]]:
    """vLLM's options that are not ours: the problem with each, and a hint."""
    found: dict[str, tuple[str, str]] = {}
    for name, reason in unsupported.SETTINGS.items():
        dashed = name.replace("_", "-")
        found |= {option: reason.about(option) for option in (f"--{dashed}", f"--no-{dashed}")}
    for short, name in unsupported.SHORT_FLAGS.items():
        found[short] = unsupported.SETTINGS[name].about(f"{short} (--{name.replace('_', '-')})")
    return found


def engine_flags(*, positional_model: bool = False) -> list[Flag]:
    """Those of EngineConfig. The model is an option, and with `positional_model` the first word too."""
    flags = flags_of(EngineConfig, groups=ENGINE_GROUPS, more=SPELLINGS)
    flags = [replace(flag, default=None, metavar="MODEL") if flag.name == "model" else flag for flag in flags]
    flags = _in_order(flags, ENGINE_GROUPS)
    if not positional_model:
        return flags
    return [replace(flags[0], name=FIRST, positional=True, help="The same as --model."), *flags]


def parser_beside_engine(kind: type, group: str, prog: str, about: str) -> Parser:
    """Of a command with an engine of its own: the model, the command's fields as a group, the engine's settings."""
    own = [replace(flag, group=group) for flag in flags_of(kind, skip={"engine"})]
    flags = engine_flags(positional_model=True)
    return Parser(prog, [flags[0], *own, *flags[1:]], about=about, refused=refused())


def _in_order(flags: Sequence[Flag], groups: Mapping[str, Sequence[str]]) -> list[Flag]:
    places = {name: place for place, name in enumerate(name for names in groups.values() for name in names)}
    return sorted(flags, key=lambda flag: places.get(flag.name, len(places)))


FIRST = "model_first"  # the model as the first word


def named_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """With the model as --model, however it was named."""
    found = dict(given)
    first = found.pop(FIRST, None)
    if first is not None and found.setdefault("model", first) != first:
        raise UsageError(f"two models are named: {first} and {found['model']}", "name one")
    return found


def names_model(given: Mapping[str, Any]) -> bool:
    """Whether a model is named at all; an empty name, of a variable that is not set, is no wish for the demo."""
    if given.get("model") == "":
        raise UsageError("--model is empty", "name a folder or a hub id, or leave it out")
    return given.get("model") is not None


def server_flags() -> list[Flag]:
    from jaxserve.server.config import ServerConfig

    return _in_order(flags_of(ServerConfig, groups=SERVER_GROUPS, more=SPELLINGS), SERVER_GROUPS)


def split[T](kind: type[T], given: Mapping[str, Any]) -> T:
    """The settings of one of the two, made of what was given."""
    names = {field.name for field in fields(cast(Any, kind))}
    return kind(**{name: value for name, value in given.items() if name in names})


def made[T](parser: Parser, make: Callable[[], T]) -> T:
    """What `make` gives; what it finds wrong with settings is wrong usage of their flags."""
    try:
        return make()
    except JaxserveError as error:
        raise UsageError(parser.in_flags_words(error.problem), parser.in_flags_words(error.hint)) from None


def from_file(path: Path, parser: Parser) -> dict[str, Any]:
    """The settings in a YAML file: flags without their dashes, and values or lists of them."""
    import yaml

    class Loader(yaml.SafeLoader):
        """That takes no key twice."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            for place, (key, _) in enumerate(node.value):
                if any(key.value == other.value for other, _ in node.value[:place]):
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            return super().construct_mapping(node, deep)

    try:
        content: object = yaml.load(path.expanduser().read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}", "check --config") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise UsageError(f"{path} is not YAML: {where}", "write one `flag: value` on each line") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no settings", "write one `flag: value` on each line")
    found: dict[str, Any] = {}
    for key, value in cast("dict[object, object]", content).items():
        try:
            flag, positive = parser.look_up("--" + str(key).strip().lstrip("-"))
            if flag.name == "config" or flag.name in found:
                again = "is given twice" if flag.name in found else "names a configuration file"
                raise UsageError(f"{key} {again}", "leave it out")
            found[flag.name] = flag.from_data(value) if positive else not flag.from_data(value)
        except UsageError as error:
            problem = error.problem.replace("unknown option --", "there is no setting ")
            raise UsageError(f"{path}: {problem}", error.hint.replace("did you mean --", "did you mean ")) from None
    return found


def check_place(file: Path | None) -> None:
    """Where figures are to be written in the end; - is standard output."""
    if file is not None and str(file) != "-" and (file.is_dir() or not file.parent.is_dir()):
        raise UsageError(f"{file} is no place for a file", "name a file in a folder that is there")


def write(file: Path, text: str) -> None:
    if str(file) == "-":
        print(text)
    else:
        file.write_text(text + "\n")


def told(flags: Sequence[Flag], given: Mapping[str, Any]) -> str:
    """What was set to something else than the default, in a line, without what is secret."""
    parts: list[str] = []
    for flag in flags:
        value = given.get(flag.name, MISSING)
        if value is MISSING or value == flag.default:
            continue
        shown = "***" if flag.secret else value
        if isinstance(shown, tuple):
            shown = ",".join(map(str, cast("tuple[object, ...]", shown)))
        parts.append(f"{flag.name}={shown}")
    return "  ".join(parts)
