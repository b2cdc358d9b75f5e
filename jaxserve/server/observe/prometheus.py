# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics, with vLLM's names, labels and buckets under our own prefix.

Requests are counted here when they finish; the engine's counters are read on each scrape. Not thread-safe: used from
one event loop.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxserve.engine.capacity import Limits
from jaxserve.server.observe import histogram
from jaxserve.server.observe.histogram import Histogram
from jaxserve.server.observe.request_record import RequestRecord
from jaxserve.types.metrics import STEP_TOKENS, EngineMetrics

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
UNKNOWN = "unknown"  # the route label of paths that match no route


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished engine request. Times are read from the monotonic clock."""

    arrival: float
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    end: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: list[int]  # per sample
    max_tokens: int | None


class Metrics:
    def __init__(self, prefix: str, model_name: str) -> None:
        self.prefix, self.model_name = prefix, model_name
        self.stats: Callable[[], EngineMetrics | None] = lambda: None
        self.engine_pid: Callable[[], int | None] = lambda: None
        self.limits: Limits | None = None
        self.engine_up = False
        self.restarts = 0
        self.sleep_level = 0
        self.connections: Callable[[], int] = lambda: 0
        self.rejections: Counter[str] = Counter()
        self.http: Counter[tuple[str, str, str]] = Counter()  # method, route, status
        self.keys: Counter[tuple[str, str]] = Counter()  # requests by name of the API key, status
        self.key_tokens: Counter[tuple[str, str]] = Counter()  # by name of the API key, "prompt" or "generation"
        self.limited: Counter[tuple[str, str]] = Counter()  # refusals by name of the API key, limit
        self.http_seconds: dict[tuple[str, str], Histogram] = {}
        self._seconds = {name: Histogram(bounds) for name, (bounds, _) in _SECONDS.items()}
        self._tokens: dict[str, Histogram] = {}
        self.set_longest(2**20)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Reader(self._collect))
        ProcessCollector(registry=self._registry)
        ProcessCollector(namespace=f"{prefix}_engine", pid=self._pid, registry=self._registry)

    def set_limits(self, limits: Limits) -> None:
        """Called when the engine is ready, before the first request."""
        if self.limits is None:
            self.set_longest(limits.max_model_len)
        self.limits = limits

    def set_longest(self, longest: int) -> None:
        bounds = histogram.token_counts(longest)
        self._tokens = {
            name: Histogram(histogram.SAMPLES if name == "request_params_n" else bounds) for name in _TOKENS
        }

    # --- recording --------------------------------------------------------------------------------------------------

    def token_gap(self, seconds: float, tokens: int) -> None:
        """Record `tokens` gaps of `seconds` each."""
        self._seconds["inter_token_latency_seconds"].observe(seconds, tokens)

    def left(self, arrival: float, *, first_token: float | None) -> None:
        """Record a request whose client left before its end, or whose deadline passed. Under overload these are the
        slowest ones."""
        self._seconds["e2e_request_latency_seconds"].observe(time.monotonic() - arrival)
        if first_token is not None:
            self._seconds["time_to_first_token_seconds"].observe(first_token - arrival)

    def request(self, done: Finished) -> None:
        seconds, tokens = self._seconds, self._tokens
        seconds["e2e_request_latency_seconds"].observe(done.end - done.arrival)
        if done.scheduled is not None:
            seconds["request_queue_time_seconds"].observe(done.scheduled - done.arrival)
        if done.first_token is not None:
            seconds["time_to_first_token_seconds"].observe(done.first_token - done.arrival)
        if done.scheduled is not None and done.first_token is not None and done.last_token is not None:
            seconds["request_prefill_time_seconds"].observe(done.first_token - done.scheduled)
            seconds["request_decode_time_seconds"].observe(done.last_token - done.first_token)
            seconds["request_inference_time_seconds"].observe(done.last_token - done.scheduled)
            longest = max(done.generated_tokens, default=0)
            if longest > 1:
                each = (done.last_token - done.first_token) / (longest - 1)
                seconds["request_time_per_output_token_seconds"].observe(each)
        tokens["request_prompt_tokens"].observe(done.prompt_tokens)
        tokens["request_prefill_kv_computed_tokens"].observe(done.prompt_tokens - done.cached_tokens)
        for count in done.generated_tokens:
            tokens["request_generation_tokens"].observe(count)
        tokens["request_max_num_generation_tokens"].observe(max(done.generated_tokens, default=0))
        tokens["request_params_n"].observe(len(done.generated_tokens))
        if done.max_tokens is not None:
            tokens["request_params_max_tokens"].observe(done.max_tokens)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Record an HTTP response. `route` is a known route or UNKNOWN, so that clients cannot create time series."""
        method = method if method in METHODS else "other"
        self.http[method, route, str(status)] += 1
        if (method, route) not in self.http_seconds:
            self.http_seconds[method, route] = Histogram(histogram.HTTP)
        self.http_seconds[method, route].observe(seconds)

    def rate_limited(self, key: str, limit: str) -> None:
        self.rejections["rate_limited"] += 1
        self.limited[key, limit] += 1

    def served_key(self, record: RequestRecord, status: int) -> None:
        """Record what a request with an API key used."""
        key = record.key or ""
        self.keys[key, str(status)] += 1
        self.key_tokens[key, "prompt"] += record.prompt_tokens
        self.key_tokens[key, "generation"] += record.generated_tokens

    # --- exposition -------------------------------------------------------------------------------------------------

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _pid(self) -> int:
        return self.engine_pid() or -1  # no process has this id: the collector then yields nothing

    def _collect(self) -> Iterator[Metric]:
        yield from self._of_requests()
        yield from self._of_server()
        stats = self.stats()
        if stats is not None:
            yield from self._of_engine(stats)
            if self.prefix == "vllm":
                yield from self._older_names(stats)

    def _of_requests(self) -> Iterator[Metric]:
        for name, shown in self._seconds.items():
            yield self._histogram(name, _SECONDS[name][1], [((), shown)])
        for name, shown in self._tokens.items():
            yield self._histogram(name, _TOKENS[name], [((), shown)])

    def _of_server(self) -> Iterator[Metric]:
        yield self._gauge("engine_up", "1 if the engine accepts requests, else 0.", [((), self.engine_up)])
        yield self._gauge("http_connections", "Open HTTP connections.", [((), self.connections())])
        yield self._counter("engine_restarts", "Engine restarts after a failure.", [((), self.restarts)])
        states = [((state,), number == self.sleep_level) for number, state in enumerate(SLEEP_STATES)]
        yield self._gauge(
            "engine_sleep_state",
            "Sleep state of the engine: 1 for the current state, 0 for the others.",
            states,
            "sleep_state",
        )
        reasons = {
            **dict.fromkeys(("asleep", "deadline", "queue_full", "rate_limited", "unavailable"), 0),
            **self.rejections,
        }
        rows = [((reason,), count) for reason, count in reasons.items()]
        yield self._counter("admission_rejections", "Requests rejected at admission, by reason.", rows, "reason")
        labels = ("method", "handler", "status")
        yield self._counter(
            "http_requests", "HTTP responses, by method, route and status.", list(self.http.items()), *labels
        )
        series = list(self.http_seconds.items())
        yield self._histogram(
            "http_request_duration_seconds",
            "HTTP request duration in seconds, by method and route.",
            series,
            "method",
            "handler",
        )
        text = "Requests with an API key, by its name and the response's status."
        yield self._counter("key_requests", text, list(self.keys.items()), "key", "status")
        text = "Tokens of requests with an API key, by its name and kind: prompt, generation."
        yield self._counter("key_tokens", text, list(self.key_tokens.items()), "key", "kind")
        text = "Requests rejected by a rate limit, by the name of the API key and the limit: rpm, tpm, concurrent."
        yield self._counter("rate_limited", text, list(self.limited.items()), "key", "limit")
        if self.limits is not None:
            limits = self.limits
            shown = {
                "block_size": limits.block_size,
                "num_gpu_blocks": limits.num_blocks,
                "enable_prefix_caching": limits.enable_prefix_caching,
                "max_model_len": limits.max_model_len,
                "max_num_seqs": limits.max_num_seqs,
                "max_num_batched_tokens": limits.max_num_batched_tokens,
            }
            row = [(tuple(map(str, shown.values())), 1)]
            yield self._gauge("cache_config_info", "KV cache configuration, as labels.", row, *shown)

    def _of_engine(self, stats: EngineMetrics) -> Iterator[Metric]:
        gauge, counter = self._gauge, self._counter
        yield gauge("num_requests_running", "Number of sequences running.", [((), stats.running)])
        yield gauge("num_requests_waiting", "Number of sequences waiting to run.", [((), stats.waiting)])
        waiting = [(("capacity",), stats.waiting), (("deferred",), 0)]
        yield gauge(
            "num_requests_waiting_by_reason", "Number of sequences waiting to run, by reason.", waiting, "reason"
        )
        yield gauge("kv_cache_usage_perc", "KV cache usage. 1 means 100 percent.", [((), stats.kv_usage)])
        blocks = [(("free",), stats.free_blocks), (("cached",), stats.cached_blocks), (("used",), stats.used_blocks)]
        yield gauge(
            "kv_blocks", "KV blocks by state: free, cached (reusable, holds a cached prefix), used.", blocks, "state"
        )
        programs = [(("compiled",), stats.programs_compiled), (("pending",), stats.programs_pending)]
        yield gauge(
            "programs",
            "Programs by state: compiled, pending (steps are padded until they are compiled in the background).",
            programs,
            "state",
        )
        yield gauge(
            "policy_version", "Version of the weights, as set by the last weight update.", [((), stats.policy_version)]
        )
        for name, value, text in (
            ("num_preemptions", stats.preemptions, "Preempted sequences: their KV blocks went to other sequences."),
            ("engine_steps", stats.steps, "Engine steps."),
            ("compiled_late", stats.compiled_late, "Programs compiled after warm-up. Should stay 0."),
            ("prefix_cache_queries", stats.prefix_queries, "Prompt tokens looked up in the prefix cache."),
            ("prefix_cache_hits", stats.prefix_hits, "Prompt tokens found in the prefix cache."),
            ("prompt_tokens", stats.prompt_tokens, "Prompt tokens processed."),
            ("prompt_tokens_cached", stats.cached_tokens, "Prompt tokens served from the prefix cache."),
            ("generation_tokens", stats.generated_tokens, "Tokens generated."),
        ):
            yield counter(name, text, [((), value)])
        sources = (
            (("local_compute",), stats.prompt_tokens - stats.cached_tokens),
            (("local_cache_hit",), stats.cached_tokens),
        )
        yield counter("prompt_tokens_by_source", "Prompt tokens, by the source of their KV entries.", sources, "source")
        reasons = [((reason,), count) for reason, count in stats.finished.items()]
        yield counter("request_success", "Finished sequences, by finish reason.", reasons, "finished_reason")
        steps = Histogram(STEP_TOKENS)
        steps.counts, steps.sum = stats.step_tokens, float(stats.computed_tokens)
        yield self._histogram("iteration_tokens_total", "Tokens computed per engine step.", [((), steps)])

    def _older_names(self, stats: EngineMetrics) -> Iterator[Metric]:
        """The names that vLLM had before, which some routers still read."""
        yield self._gauge("gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", [((), stats.kv_usage)])
        rate = stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0
        yield self._gauge("gpu_prefix_cache_hit_rate", "Prompt tokens found in the prefix cache, of 1.", [((), rate)])
        text = "Older name of prefix_cache_{}."
        yield self._counter("gpu_prefix_cache_queries", text.format("queries"), [((), stats.prefix_queries)])
        yield self._counter("gpu_prefix_cache_hits", text.format("hits"), [((), stats.prefix_hits)])

    def _gauge(self, name: str, text: str, rows: "Rows", *labels: str) -> Metric:
        family = GaugeMetricFamily(f"{self.prefix}:{name}", text, labels=("model_name", "engine", *labels))
        for values, value in rows:
            family.add_metric((self.model_name, "0", *values), float(value))
        return family

    def _counter(self, name: str, text: str, rows: "Rows", *labels: str) -> Metric:
        family = CounterMetricFamily(f"{self.prefix}:{name}", text, labels=("model_name", "engine", *labels))
        for values, value in rows:
            family.add_metric((self.model_name, "0", *values), float(value))
        return family

    def _histogram(
        self, name: str, text: str, rows: Iterable[tuple[tuple[str, ...], Histogram]], *labels: str
    ) -> Metric:
        family = HistogramMetricFamily(f"{self.prefix}:{name}", text, labels=("model_name", "engine", *labels))
        for values, shown in rows:
            family.add_metric((self.model_name, "0", *values), buckets=shown.buckets(), sum_value=shown.sum)
        return family


type Rows = Iterable[tuple[tuple[str, ...], float]]

_SECONDS = {
    "time_to_first_token_seconds": (histogram.FIRST_TOKEN, "Time to first token in seconds."),
    "inter_token_latency_seconds": (histogram.BETWEEN_TOKENS, "Inter-token latency in seconds."),
    "request_time_per_output_token_seconds": (
        histogram.BETWEEN_TOKENS,
        "Mean time per output token of a request, in seconds, without the first.",
    ),
    "e2e_request_latency_seconds": (histogram.LATENCY, "End-to-end request latency in seconds."),
    "request_queue_time_seconds": (histogram.LATENCY, "Time from arrival to the first engine step, in seconds."),
    "request_inference_time_seconds": (
        histogram.LATENCY,
        "Time from the first engine step to the last token, in seconds.",
    ),
    "request_prefill_time_seconds": (
        histogram.LATENCY,
        "Time from the first engine step to the first token, in seconds.",
    ),
    "request_decode_time_seconds": (histogram.LATENCY, "Time from the first token to the last, in seconds."),
}
_TOKENS = {
    "request_prompt_tokens": "Prompt tokens per request.",
    "request_generation_tokens": "Generated tokens per sample.",
    "request_max_num_generation_tokens": "Generated tokens of a request's longest sample.",
    "request_params_n": "Value of n per request.",
    "request_params_max_tokens": "Value of max_tokens per request.",
    "request_prefill_kv_computed_tokens": "Prompt tokens computed per request, without cached ones.",
}


class _Reader(Collector):
    def __init__(self, read: Callable[[], Iterator[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        return self._read()
