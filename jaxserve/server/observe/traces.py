# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry traces: a span for each HTTP request that uses the model, sent over OTLP/HTTP.

    llm_request      from arrival to the end of the response
      queue          until the first sequence gets a row
      prefill        until the first token
      decode         until the last token
      respond        until the response is sent: the last text is decoded, formatted and written

A `traceparent` header of the request makes it part of the client's trace; the response has one too. Nothing of
OpenTelemetry is imported unless an endpoint is set. The usual OTEL_* environment variables apply.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from jaxserve.config import ConfigError
from jaxserve.server.observe.request_record import RequestRecord

PARENT = "traceparent"
PATH = "/v1/traces"
SERVICE = "jaxserve"
SHUTDOWN = 2.0  # seconds


class Tracer:
    """Thread-safe. Spans are sent by a thread of OpenTelemetry's."""

    def __init__(self, endpoint: str) -> None:
        try:
            self._api = import_module("opentelemetry.trace")
            propagation = import_module("opentelemetry.trace.propagation.tracecontext")
            sdk = import_module("opentelemetry.sdk.trace")
            resources = import_module("opentelemetry.sdk.resources")
            batches = import_module("opentelemetry.sdk.trace.export")
            otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        except ImportError:
            problem = "otlp_traces_endpoint needs OpenTelemetry, which is not installed"
            raise ConfigError(problem, "run pip install 'jaxserve[traces]'") from None
        resource = resources.Resource.create({"service.name": SERVICE})
        self._provider: Any = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            batches.BatchSpanProcessor(otlp.OTLPSpanExporter(endpoint=_with_path(endpoint)))
        )
        self._tracer: Any = self._provider.get_tracer(SERVICE)
        self._propagator: Any = propagation.TraceContextTextMapPropagator()
        # Of the wall clock, which spans have, to the monotonic one, which the server measures by.
        self._offset = time.time() - time.monotonic()

    def begin(self, headers: Mapping[str, str], record: RequestRecord) -> "RequestTrace":
        sent = {name: headers[name] for name in (PARENT, "tracestate") if name in headers}
        context = self._propagator.extract(sent)
        span = self._tracer.start_span(
            "llm_request", context, kind=self._api.SpanKind.SERVER, start_time=self._nanoseconds(record.arrival)
        )
        return RequestTrace(self, span)

    def parent_of(self, span: Any) -> str:
        """The header that names this span."""
        found: dict[str, str] = {}
        self._propagator.inject(found, self._api.set_span_in_context(span))
        return found[PARENT]

    def end(self, span: Any, record: RequestRecord, *, model: str, status: int) -> None:
        now = time.monotonic()
        context = self._api.set_span_in_context(span)
        for name, begin, end in _phases(record, now):
            phase = self._tracer.start_span(name, context, start_time=self._nanoseconds(begin))
            phase.end(self._nanoseconds(end))
        span.set_attributes(_attributes(record, now, model=model, status=status))
        if status >= 500:
            span.set_status(self._api.StatusCode.ERROR, record.error)
        span.end(self._nanoseconds(now))

    def shutdown(self) -> None:
        """Send what is left. A collector that does not answer delays this no longer than SHUTDOWN seconds."""
        # A daemon: the exporter retries for longer.
        ending = threading.Thread(target=self._provider.shutdown, name="jaxserve-traces", daemon=True)
        ending.start()
        ending.join(SHUTDOWN)

    def _nanoseconds(self, moment: float) -> int:
        return int((moment + self._offset) * 1e9)


class RequestTrace:
    """The span of one HTTP request."""

    def __init__(self, tracer: Tracer, span: Any) -> None:
        self._tracer, self._span = tracer, span

    @property
    def header(self) -> str:
        return self._tracer.parent_of(self._span)

    def end(self, record: RequestRecord, *, model: str, status: int) -> None:
        self._tracer.end(self._span, record, model=model, status=status)


def _phases(record: RequestRecord, now: float) -> Iterator[tuple[str, float, float]]:
    """Names, begins and ends of the phases that the request reached."""
    ends = [("queue", record.scheduled), ("prefill", record.first_token), ("decode", record.last_token)]
    begin = record.arrival
    for name, end in ends:
        if end is None:
            return
        yield name, begin, max(begin, end)
        begin = max(begin, end)
    yield "respond", begin, now


def _attributes(record: RequestRecord, now: float, *, model: str, status: int) -> dict[str, Any]:
    """OpenTelemetry's and vLLM's names."""
    found: dict[str, Any] = {
        "gen_ai.request.id": record.id,
        "gen_ai.response.model": model,
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.completion_tokens": record.generated_tokens,
        "gen_ai.latency.e2e": now - record.arrival,
        "http.response.status_code": status,
        "jaxserve.cached_tokens": record.cached_tokens,
    }
    if record.scheduled is not None:
        found["gen_ai.latency.time_in_queue"] = record.scheduled - record.arrival
    if record.first_token is not None:
        found["gen_ai.latency.time_to_first_token"] = record.first_token - record.arrival
    if record.finish_reasons:
        found["gen_ai.response.finish_reasons"] = tuple(record.finish_reasons)
    if record.key is not None:
        found["jaxserve.api_key"] = record.key
    return found


def check_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        problem = f"otlp_traces_endpoint is {endpoint!r}, not an address of OTLP over HTTP"
        raise ConfigError(problem, f"use for example http://localhost:4318{PATH}")


def _with_path(endpoint: str) -> str:
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + PATH
