# SPDX-License-Identifier: Apache-2.0
"""ServerConfig: the settings of the HTTP server, declared once, checked when made.

Settings of the model and its engine are EngineConfig's. Nothing is opened or read here except a chat template.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from jaxserve.config import ConfigError
from jaxserve.flags.setting import Setting
from jaxserve.flags.values import check
from jaxserve.server.http.addresses import is_loopback
from jaxserve.server.http.api_keys import KeySources
from jaxserve.server.http.limits import UNSET, RateLimit
from jaxserve.server.observe.traces import check_endpoint
from jaxserve.types.checks import check_names

type LogFormat = Literal["text", "json"]
type LogLevel = Literal["debug", "info", "warning", "error"]
type UnknownFields = Literal["warn", "refuse", "ignore"]

ROOT_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)+/?")
KEYS_VARIABLE, ADMIN_KEYS_VARIABLE = "JAXSERVE_API_KEY", "JAXSERVE_ADMIN_API_KEY"
NO_KEY_VARIABLE = "JAXSERVE_ALLOW_NO_KEY"
MAX_QUEUED = 1024  # waiting requests, unless the engine's settings say otherwise: memory must be bounded


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The settings of the server, with vLLM's names; help and flags come from each Setting."""

    host: Annotated[
        str,
        Setting(
            "Address to listen on. 0.0.0.0 or :: listens on all interfaces, reachable from other machines. "
            "JAXSERVE_HOST sets another default.",
            "Server",
            common=True,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, Setting("Port to listen on; 0 picks a free port.", "Server", low=0, high=65535, common=True)
    ] = 8000
    uds: Annotated[
        str | None,
        Setting("Path of a Unix domain socket to listen on instead of host and port.", "Server", metavar="PATH"),
    ] = None
    root_path: Annotated[
        str,
        Setting(
            "Prefix of the server's routes behind a reverse proxy, such as /llm; they work with and without it.",
            "Server",
            empty=True,
        ),
    ] = ""
    served_model_name: Annotated[
        tuple[str, ...],
        Setting(
            "Model names that requests may use; responses show the first (default: the path or ID of the model).",
            "Server",
            common=True,
        ),
    ] = ()
    no_ui: Annotated[bool, Setting("Do not serve the chat page at /.", "Server")] = False
    max_body_bytes: Annotated[
        int,
        Setting(
            "Maximum size of a request body, after decompression.", "Server", low=1024, high=2**31 - 1, unit="bytes"
        ),
    ] = 32 * 2**20
    max_connections: Annotated[
        int,
        Setting(
            "Maximum number of open connections. Beyond it, idle ones are closed, then new ones are refused.",
            "Server",
            low=1,
            high=2**20,
        ),
    ] = 8192
    tokenizer_workers: Annotated[
        int, Setting("Number of threads that tokenize and validate requests.", "Server", low=2, high=64)
    ] = 2
    metrics_prefix: Annotated[
        str, Setting("Prefix of metric names; use vllm for dashboards made for vLLM.", "Server")
    ] = "jaxserve"
    profile_dir: Annotated[
        str | None, Setting("Folder for traces of /start_profile (default: profiling is disabled).", "Server")
    ] = None
    restart_engine: Annotated[
        bool,
        Setting(
            "Restart the engine when it fails, up to three times in ten minutes, instead of exiting.",
            "Server",
            common=True,
        ),
    ] = False

    chat_template: Annotated[
        str | None,
        Setting("Chat template, or a file that contains one, to use instead of the model's.", "Requests", common=True),
    ] = None
    classifier_from_token: Annotated[
        tuple[str, ...],
        Setting(
            "Two tokens, such as no yes: /score and /rerank return the probability of the second. For rerankers that "
            "answer with a word.",
            "Requests",
        ),
    ] = ()
    trust_request_chat_template: Annotated[
        bool,
        Setting(
            "Accept chat templates in requests. They run in the server: enable only for trusted clients.", "Requests"
        ),
    ] = False
    response_role: Annotated[str, Setting("Role of generated chat messages.", "Requests")] = "assistant"
    unknown_fields: Annotated[
        UnknownFields,
        Setting(
            "What to do with unknown fields of requests: ignore them, and name each in the log and in the header "
            "x-jaxserve-ignored; refuse the request; or ignore them silently.",
            "Requests",
        ),
    ] = "warn"
    enable_force_include_usage: Annotated[
        bool,
        Setting("Include token usage at the end of every stream, even if the request does not ask for it.", "Requests"),
    ] = False
    return_tokens_as_token_ids: Annotated[
        bool, Setting("Show tokens in log probabilities as token_id:N.", "Requests")
    ] = False
    enable_request_id_headers: Annotated[
        bool, Setting("Add an X-Request-Id header to responses: the client's, or a generated one.", "Requests")
    ] = False

    api_key: Annotated[
        tuple[str, ...],
        Setting(
            "Accepted API keys, sent as `Authorization: Bearer KEY` (default: JAXSERVE_API_KEY, comma-separated). "
            "Other users of this machine can see flags in the list of processes: prefer api_key_file or the variable.",
            "Security",
            common=True,
        ),
    ] = field(default=(), repr=False)
    api_key_file: Annotated[
        str | None,
        Setting(
            "File of accepted API keys, one per line: KEY [name=NAME] [scope=metrics|api|admin] [rpm=N] [tpm=N] "
            "[concurrent=N]. SIGHUP reloads it.",
            "Security",
            metavar="FILE",
            common=True,
        ),
    ] = None
    admin_api_key: Annotated[
        tuple[str, ...],
        Setting(
            "API keys for administration; then only they may abort all requests, profile, reset caches, and put the "
            "engine to sleep (default: JAXSERVE_ADMIN_API_KEY, comma-separated).",
            "Security",
        ),
    ] = field(default=(), repr=False)
    admin_api_key_file: Annotated[
        str | None,
        Setting(
            "File of API keys for administration, like api_key_file. SIGHUP reloads it.", "Security", metavar="FILE"
        ),
    ] = None
    enable_admin_routes: Annotated[
        bool,
        Setting(
            "Serve the routes for administration without admin_api_key on an address that other machines can reach. "
            "Every client may then use them.",
            "Security",
        ),
    ] = False
    rate_limit: Annotated[
        str | None,
        Setting(
            "Limits of each API key: requests and tokens per minute, concurrent requests; such as "
            "rpm=600,tpm=200k,concurrent=32. A key file may set others for a key. Without keys, clients share them.",
            "Security",
            common=True,
        ),
    ] = None
    ssl_keyfile: Annotated[
        str | None, Setting("Private key for HTTPS. SIGHUP reloads it.", "Security", common=True)
    ] = None
    ssl_certfile: Annotated[
        str | None,
        Setting(
            "Certificate for HTTPS, followed by any intermediate certificates. SIGHUP reloads it.",
            "Security",
            common=True,
        ),
    ] = None
    allowed_hosts: Annotated[
        tuple[str, ...],
        Setting(
            "Additional Host headers to accept when no API key is set; * accepts any. The server then accepts "
            "localhost, host and, unless it listens on a loopback address, IP addresses.",
            "Security",
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...], Setting("Origins of web pages that may call this server (CORS); * allows any.", "Security")
    ] = ()
    allowed_methods: Annotated[
        tuple[str, ...], Setting("HTTP methods that pages from allowed_origins may use.", "Security")
    ] = ("*",)
    allowed_headers: Annotated[
        tuple[str, ...], Setting("Request headers that pages from allowed_origins may send.", "Security")
    ] = ("*",)
    allow_credentials: Annotated[
        bool, Setting("Let pages from allowed_origins send credentials such as cookies.", "Security")
    ] = False

    request_timeout: Annotated[
        float | None,
        Setting(
            "Maximum duration of a request, including time in the queue (default: no limit).",
            "Timeouts",
            above=0,
            common=True,
            unit="seconds",
        ),
    ] = None
    shutdown_timeout: Annotated[
        float,
        Setting(
            "Time that running requests have to finish after the first SIGTERM or SIGINT.",
            "Timeouts",
            low=0,
            common=True,
            unit="seconds",
        ),
    ] = 30.0
    stream_timeout: Annotated[
        float,
        Setting(
            "Time after which a client that does not read its response is disconnected.",
            "Timeouts",
            above=0,
            unit="seconds",
        ),
    ] = 60.0
    sse_keep_alive: Annotated[
        float,
        Setting(
            "Time without news after which a stream gets a comment, so that proxies do not close it; 0 sends none.",
            "Timeouts",
            low=0,
            unit="seconds",
        ),
    ] = 15.0
    keep_alive_timeout: Annotated[
        float, Setting("Time that an idle connection stays open.", "Timeouts", above=0, unit="seconds")
    ] = 75.0
    header_timeout: Annotated[
        float, Setting("Timeout for receiving request headers.", "Timeouts", above=0, unit="seconds")
    ] = 10.0
    body_timeout: Annotated[
        float,
        Setting(
            "Timeout for receiving a request body; header_timeout applies below 1 KiB per second.",
            "Timeouts",
            above=0,
            unit="seconds",
        ),
    ] = 30.0
    watchdog_timeout: Annotated[
        float,
        Setting(
            "Time without progress after which the engine counts as hung; 0 disables the check.",
            "Timeouts",
            low=0,
            unit="seconds",
        ),
    ] = 300.0

    log_level: Annotated[
        LogLevel, Setting("Minimum log level.", "Logging", common=True, spellings=("--uvicorn-log-level",))
    ] = "info"
    log_format: Annotated[
        LogFormat, Setting("Log as text, or as one JSON object per line.", "Logging", common=True)
    ] = "text"
    enable_log_requests: Annotated[bool, Setting("Log the parameters of each request.", "Logging", common=True)] = False
    enable_log_outputs: Annotated[
        bool, Setting("With enable_log_requests, also log prompts and outputs.", "Logging")
    ] = False
    max_log_len: Annotated[
        int, Setting("Maximum number of characters of a prompt or an output to log.", "Logging", low=0, high=2**20)
    ] = 200
    otlp_traces_endpoint: Annotated[
        str | None,
        Setting(
            "Send OpenTelemetry traces of requests to this OTLP/HTTP address, such as http://localhost:4318; requires "
            "jaxserve[traces].",
            "Logging",
        ),
    ] = None
    disable_access_log_for: Annotated[
        tuple[str, ...],
        Setting(
            "Routes whose requests are not logged, such as /v1/embeddings, separated by spaces or commas.",
            "Logging",
            spellings=("--disable-access-log-for-endpoints",),
        ),
    ] = ()
    disable_log_stats: Annotated[
        bool, Setting("Do not log throughput every ten seconds while the server is busy.", "Logging")
    ] = False

    def __new__(cls, *args: object, **given: object) -> Self:
        check_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check(self, ConfigError)
        paths = [path.strip() for text in self.disable_access_log_for for path in text.split(",") if path.strip()]
        object.__setattr__(self, "disable_access_log_for", tuple(paths))
        if wrong := next((path for path in paths if not path.startswith("/")), None):
            raise ConfigError(f"disable_access_log_for has {wrong!r}, not a path", "start it with /")
        if self.root_path and not ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(f"root_path is {self.root_path!r}, not a path", "use a path such as /llm")
        object.__setattr__(self, "root_path", self.root_path.rstrip("/"))
        prefix = self.metrics_prefix
        if not prefix.isascii() or not prefix.replace("_", "a").isalnum() or prefix[0].isdigit():
            raise ConfigError(f"metrics_prefix is {prefix!r}", "use letters, digits and _, not starting with a digit")
        self.default_limit()
        if self.otlp_traces_endpoint is not None:
            check_endpoint(self.otlp_traces_endpoint)
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ConfigError("ssl_keyfile requires ssl_certfile", "set both")
        if self.enable_log_outputs and not self.enable_log_requests:
            raise ConfigError("enable_log_outputs requires enable_log_requests", "set both")
        if self.allow_credentials and "*" in self.allowed_origins:
            problem = "allow_credentials with allowed_origins * would let any page act as its visitor"
            raise ConfigError(problem, "list the origins in allowed_origins")

    def with_environment(self, environment: Mapping[str, str]) -> "ServerConfig":
        """With the API keys of the environment, unless keys of their kind are set. If JAXSERVE_ALLOW_NO_KEY is set to
        anything but 1, a key is required where other machines can reach the server."""
        config = self
        if not self.keyed:
            config = replace(config, api_key=_keys(environment.get(KEYS_VARIABLE)))
        if not (self.admin_api_key or self.admin_api_key_file):
            config = replace(config, admin_api_key=_keys(environment.get(ADMIN_KEYS_VARIABLE)))
        allowed = environment.get(NO_KEY_VARIABLE, "1").lower() in ("1", "true", "yes", "on")
        if not (allowed or config.keyed or is_loopback(config.host)):
            problem = f"no API key is set, and other machines may reach this server ({config.host})"
            raise ConfigError(problem, f"set {KEYS_VARIABLE} or --api-key-file, or allow it with {NO_KEY_VARIABLE}=1")
        return config

    @property
    def keyed(self) -> bool:
        """Whether the API needs a key. Keys for administration alone do not close it."""
        return bool(self.api_key or self.api_key_file)

    def default_limit(self) -> RateLimit:
        return UNSET if self.rate_limit is None else RateLimit.parse(self.rate_limit, where="rate_limit")

    def keys(self) -> KeySources:
        return KeySources(
            api=self.api_key, api_file=self.api_key_file, admin=self.admin_api_key, admin_file=self.admin_api_key_file
        )

    def template(self) -> str | None:
        """The text of the chat template. A setting that contains a brace is the template itself, any other a file."""
        if self.chat_template is None or "{" in self.chat_template:
            return self.chat_template
        path = Path(self.chat_template).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            problem = f"cannot read the chat template {self.chat_template}: {getattr(error, 'strerror', None) or error}"
            raise ConfigError(problem, "name a readable file, or pass the template itself") from None


def _keys(text: str | None) -> tuple[str, ...]:
    return tuple(key.strip() for key in (text or "").split(",") if key.strip())
