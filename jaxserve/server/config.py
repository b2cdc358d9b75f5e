# SPDX-License-Identifier: Apache-2.0
"""How the server is set up. One frozen dataclass with vLLM's names, checked when made; flags come from its fields.

What a model or its engine needs is EngineConfig's. Nothing is opened or read here but a chat template.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self, cast, get_args

from jaxserve.config import ConfigError
from jaxserve.types.checks import check_names

type LogFormat = Literal["text", "json"]
type LogLevel = Literal["debug", "info", "warning", "error"]

KEYS_VARIABLE = "JAXSERVE_API_KEY"
MAX_QUEUED = 1024  # requests that may wait, where the engine's configuration gives no number: memory must be bounded


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 or :: for all of this machine's, which other machines can then reach."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: tuple[str, ...] = field(default=(), repr=False)
    """Keys that clients must send one of, as "Authorization: Bearer KEY". Or JAXSERVE_API_KEY, with commas between."""
    served_model_name: tuple[str, ...] = ()
    """Names that requests may call the model by; the first is in the answers. The model's own if not given."""
    chat_template: str | None = None
    """A chat template, or a file that holds one, in place of the model's."""
    trust_request_chat_template: bool = False
    """Let requests bring a chat template. It runs here: only for clients that are trusted."""
    response_role: str = "assistant"
    """The role that chat answers have."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names in the Host header that a server without keys answers to; * for any."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of other web pages that may call this server (CORS); * for any."""
    allowed_methods: tuple[str, ...] = ("*",)
    """Methods that pages of allowed_origins may use."""
    allowed_headers: tuple[str, ...] = ("*",)
    """Headers that pages of allowed_origins may send."""
    allow_credentials: bool = False
    """Let pages of allowed_origins send cookies and the like."""
    ssl_keyfile: str | None = None
    """The private key for HTTPS."""
    ssl_certfile: str | None = None
    """The certificate for HTTPS, with those between it and the root."""
    enable_request_id_headers: bool = False
    """Answer with X-Request-Id: the client's, or one that is made."""
    enable_force_include_usage: bool = False
    """End every stream with its usage, asked for or not."""
    return_tokens_as_token_ids: bool = False
    """Write tokens in log-probabilities as token_id:N."""
    enable_log_requests: bool = False
    """Log the parameters of each request."""
    enable_log_outputs: bool = False
    """With enable_log_requests: log prompts and answers too."""
    max_log_len: int = 200
    """How many characters of a prompt or an answer are logged."""
    log_format: LogFormat = "text"
    """Lines for people, or one JSON object on each."""
    log_level: LogLevel = "info"
    """What is logged, and everything graver."""
    disable_log_stats: bool = False
    """Leave out the line about throughput that comes every ten seconds while there is work."""
    metrics_prefix: str = "jaxserve"
    """What the names of metrics begin with; vllm for its dashboards."""
    no_ui: bool = False
    """Serve no page at /."""
    allow_unknown_fields: bool = False
    """Ignore fields of requests that are not known, instead of refusing them."""
    request_timeout: float | None = None
    """Seconds a request may take, waiting included; no limit if not given."""
    shutdown_timeout: float = 30.0
    """Seconds that requests in flight have to finish after the first SIGTERM or SIGINT."""
    stream_timeout: float = 60.0
    """Seconds that a client may leave its answer unread before it is cut off."""
    keep_alive_timeout: float = 75.0
    """Seconds that a connection may stay idle between two requests."""
    header_timeout: float = 10.0
    """Seconds in which a request must have come, but for its body: of a connection's first from its opening."""
    body_timeout: float = 30.0
    """Seconds in which a request's body must have come. Below 1 KiB a second it has header_timeout."""
    max_body_bytes: int = 32 * 2**20
    """The largest body of a request, unpacked."""
    max_connections: int = 8192
    """How many connections may be open. Past it idle ones are closed, then new ones refused."""
    tokenizer_workers: int = 2
    """Threads that tokenize and check requests."""
    watchdog_timeout: float = 300.0
    """Seconds without a sign of progress after which the engine counts as hung; 0 for never."""
    restart_engine: bool = False
    """Start the engine again when it fails, up to three times within ten minutes, instead of ending."""
    profile_dir: str | None = None
    """Where /start_profile may write; it is refused if not given."""

    def __new__(cls, *args: object, **given: object) -> Self:
        check_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in _TEXTS:
            self._check(name, isinstance(getattr(self, name), str) and getattr(self, name), "give a text")
        for name in _OPTIONAL_TEXTS:
            value = getattr(self, name)
            self._check(name, value is None or (isinstance(value, str) and value), "give a text")
        for name in _LISTS:
            value: object = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, tuple | list):
                raise ConfigError(f"{name} is of type {type(value).__name__}", "give a list of texts")
            items = tuple(cast("tuple[object, ...]", value))
            if not all(isinstance(item, str) and item for item in items):
                raise ConfigError(f"{name} has an entry that is no text, or is empty", "correct it, or leave it out")
            if name != "api_key" and any(str(item).startswith('["') for item in items):
                raise ConfigError(f"{name} has an entry that is a JSON list", "give its entries one after the other")
            object.__setattr__(self, name, items)
        for name in _SWITCHES:
            self._check(name, isinstance(getattr(self, name), bool), "give True or False")
        for name, kind in (("log_format", LogFormat), ("log_level", LogLevel)):
            allowed = get_args(kind.__value__)
            self._check(name, getattr(self, name) in allowed, f"choose one of {', '.join(allowed)}")
        self._check_numbers()
        good = self.metrics_prefix.isascii() and self.metrics_prefix.replace("_", "a").isalnum()
        self._check("metrics_prefix", good and not self.metrics_prefix[0].isdigit(), "use letters, digits and _")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ConfigError("ssl_keyfile is given and ssl_certfile is not", "give both")
        if self.enable_log_outputs and not self.enable_log_requests:
            raise ConfigError("enable_log_outputs is given and enable_log_requests is not", "give both")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError("allow_credentials with allowed_origins * lets any page act for its visitor", "name them")

    def _check_numbers(self) -> None:
        for name, low, high in _WHOLE:
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            self._check(name, whole and low <= value <= high, f"give a whole number from {low} to {high}")
        for name, zero in _SECONDS:
            value = getattr(self, name)
            if name == "request_timeout" and value is None:
                continue
            real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            self._check(name, real and (value > 0 or (zero and value == 0)), "give a number of seconds")

    def _check(self, name: str, good: object, hint: str) -> None:
        if not good:
            raise ConfigError(f"{name} is {getattr(self, name)!r}", hint)

    def with_environment(self, environment: Mapping[str, str]) -> "ServerConfig":
        """With the keys that the environment gives, where there are no others."""
        keys = tuple(key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",") if key.strip())
        return replace(self, api_key=keys) if keys and not self.api_key else self

    def template(self) -> str | None:
        """The chat template's text. What holds a brace is the text itself, all else is a file."""
        if self.chat_template is None or "{" in self.chat_template:
            return self.chat_template
        path = Path(self.chat_template).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            problem = f"cannot read the chat template {self.chat_template}: {getattr(error, 'strerror', None) or error}"
            raise ConfigError(problem, "give a file, or the template itself") from None


_TEXTS = ("host", "response_role", "metrics_prefix")
_OPTIONAL_TEXTS = ("chat_template", "ssl_keyfile", "ssl_certfile", "profile_dir")
_LISTS = ("api_key", "served_model_name", "allowed_hosts", "allowed_origins", "allowed_methods", "allowed_headers")
_SWITCHES = (
    *("trust_request_chat_template", "allow_credentials", "enable_request_id_headers", "enable_force_include_usage"),
    *("return_tokens_as_token_ids", "enable_log_requests", "enable_log_outputs", "disable_log_stats", "no_ui"),
    *("allow_unknown_fields", "restart_engine"),
)
_WHOLE = (
    ("port", 0, 65535),
    ("max_log_len", 0, 2**20),
    ("max_body_bytes", 1024, 2**31 - 1),
    ("max_connections", 1, 2**20),
    ("tokenizer_workers", 2, 64),
)
# Name, and whether 0 has a meaning.
_SECONDS = (
    ("request_timeout", False),
    ("shutdown_timeout", True),
    ("stream_timeout", False),
    ("keep_alive_timeout", False),
    ("header_timeout", False),
    ("body_timeout", False),
    ("watchdog_timeout", True),
)
