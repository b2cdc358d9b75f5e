# SPDX-License-Identifier: Apache-2.0
"""Traces as a collector gets them."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from jaxserve.async_llm import AsyncLLM
from jaxserve.config import ConfigError
from jaxserve.server.config import ServerConfig
from jaxserve.server.observe.request_record import RequestRecord
from jaxserve.server.observe.traces import Tracer
from tests.server.routes.served import Served
from tests.server.shell import Shell

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, body))  # pyright: ignore[reportAttributeAccessIssue]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Collected:
    def __init__(self) -> None:
        self._server: Any = HTTPServer(("127.0.0.1", 0), Collector)
        self._server.got = []
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def spans(self, server: Shell) -> list[Any]:
        assert server.serving.tracer is not None
        server.serving.tracer._provider.force_flush()
        found: list[Any] = []
        for path, body in self._server.got:
            assert path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                assert "jaxserve" in str(resource.resource)
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found


@pytest.fixture
def collected() -> Iterator[Collected]:
    collected = Collected()
    yield collected
    collected.close()


def attributes(span: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        values[each.key] = getattr(each.value, kind)
    return values


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_within_the_clients_trace(collected: Collected, async_llm: AsyncLLM, stream: bool) -> None:
    with Served(async_llm, otlp_traces_endpoint=collected.endpoint) as served:
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "stream": stream}
        reply = served.post("/v1/completions", body, traceparent=f"00-{TRACE}-{PARENT}-01")
        served.send("GET", "/v1/models")
        spans = {span.name: span for span in collected.spans(served)}
    assert set(spans) == {"llm_request", "queue", "prefill", "decode", "respond"}
    root = spans["llm_request"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE} and root.parent_span_id.hex() == PARENT
    assert reply.headers["traceparent"] == f"00-{TRACE}-{root.span_id.hex()}-01"
    phases = [spans[name] for name in ("queue", "prefill", "decode", "respond")]
    assert {phase.parent_span_id for phase in phases} == {root.span_id}
    edges = [root.start_time_unix_nano, *(phase.end_time_unix_nano for phase in phases)]
    assert edges == sorted(edges) and edges[-1] == root.end_time_unix_nano
    for before, after in itertools.pairwise(phases):
        assert before.end_time_unix_nano == after.start_time_unix_nano
    found = attributes(root)
    assert found["gen_ai.usage.prompt_tokens"] == 3 and found["gen_ai.usage.completion_tokens"] == 4
    assert found["http.response.status_code"] == 200 and found["gen_ai.response.model"] == "tiny"
    assert 0 < found["gen_ai.latency.time_to_first_token"] <= found["gen_ai.latency.e2e"]


def test_refusals_and_requests_without_a_trace(collected: Collected) -> None:
    with Shell(otlp_traces_endpoint=collected.endpoint) as server:
        reply = server.post("/v1/completions", {"prompt": "x"})
        [span] = collected.spans(server)
    assert reply.status == 503 and span.name == "llm_request" and not span.parent_span_id
    assert span.status.code == 2 and "loading" in span.status.message
    assert span.trace_id.hex() in reply.headers["traceparent"]


def test_an_unreachable_collector_harms_nobody() -> None:
    with Shell(otlp_traces_endpoint="http://127.0.0.1:9") as server:
        assert server.post("/v1/completions", {"prompt": "x"}).status == 503


def test_phases_that_a_request_did_not_reach(collected: Collected) -> None:
    tracer = Tracer(collected.endpoint)
    record = RequestRecord("a", 10.0, scheduled=11.0)
    tracer.begin({}, record).end(record, model="m", status=499)
    with Shell() as server:
        server.serving.tracer = tracer
        assert [span.name for span in collected.spans(server)] == ["queue", "llm_request"]
    tracer.shutdown()


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://x:4317", "http://"])
def test_bad_endpoints(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"not an address of OTLP over HTTP; .*http://localhost:4318/v1/traces"):
        ServerConfig(otlp_traces_endpoint=endpoint)


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"is not installed; .*pip install 'jaxserve\[traces\]'"):
        Tracer("http://localhost:4318")


def test_nothing_is_imported_when_off() -> None:
    script = (
        "import sys, jaxserve.server.app\nassert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
