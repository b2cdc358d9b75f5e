# SPDX-License-Identifier: Apache-2.0
"""/metrics after known requests agrees with their answers. Dashboards query existing metrics."""

import json
import random
import re
import socket
import string
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.server import observe
from jaxserve.server.observe.prometheus import Metrics
from tests.server import live as living
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live

# What vLLM's own dashboards and the usual autoscalers ask for, without its prefix.
VLLM = re.findall(
    r"\w+",
    """
    e2e_request_latency_seconds_bucket e2e_request_latency_seconds_sum e2e_request_latency_seconds_count
    time_to_first_token_seconds_bucket time_to_first_token_seconds_sum time_to_first_token_seconds_count
    inter_token_latency_seconds_bucket inter_token_latency_seconds_sum inter_token_latency_seconds_count
    prompt_tokens_total generation_tokens_total num_requests_running num_requests_waiting kv_cache_usage_perc
    request_prompt_tokens_bucket request_generation_tokens_bucket request_success_total request_queue_time_seconds_sum
    request_prefill_time_seconds_sum request_decode_time_seconds_sum request_max_num_generation_tokens_sum
    iteration_tokens_total_count num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total
    cache_config_info engine_sleep_state num_requests_waiting_by_reason request_params_n_bucket
    request_params_max_tokens_bucket request_time_per_output_token_seconds_bucket request_inference_time_seconds_bucket
    request_prefill_kv_computed_tokens_bucket prompt_tokens_by_source_total prompt_tokens_cached_total
    admission_rejections_total
    """,
)
BODY: dict[str, Any] = {"prompt": "a b c d e f g h i j k l m n o p", "max_tokens": 7, "ignore_eos": True}


@pytest.fixture(scope="module")
def counted(model: Path) -> Iterator[tuple[Live, dict[str, Any]]]:
    """A warm server that has answered three requests, and the sum of their usage."""
    with living.live(model, engine={"warmup": True, "max_num_seqs": 2, "max_num_batched_tokens": 16}) as server:
        replies = [server.post("/v1/completions", BODY).json]
        replies.append(server.post("/v1/completions", BODY | {"n": 2, "temperature": 1, "seed": 1}).json)
        usage = server.post("/v1/completions", BODY | {"stream": True, "stream_options": {"include_usage": True}})
        replies.append(usage.events[-2])
        total = {"prompt": sum(reply["usage"]["prompt_tokens"] for reply in replies)}
        total["generated"] = sum(reply["usage"]["completion_tokens"] for reply in replies)
        total["cached"] = sum(reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies)
        assert total["generated"] == 28
        server.wait_idle()
        yield server, total


def test_counts(counted: tuple[Live, dict[str, Any]]) -> None:
    server, total = counted
    got = {name.removeprefix("jaxserve:"): value for name, value in server.metrics().items()}
    assert got["prompt_tokens_total"] == total["prompt"]
    assert got["generation_tokens_total"] == total["generated"]
    assert got["prompt_tokens_cached_total"] == total["cached"] > 0
    assert got['prompt_tokens_by_source_total{source="local_cache_hit"}'] == total["cached"]
    assert got['prompt_tokens_by_source_total{source="local_compute"}'] == total["prompt"] - total["cached"]
    assert got['request_success_total{finished_reason="length"}'] == 4
    assert got["compiled_late_total"] == 0
    assert got['kv_blocks{state="used"}'] == got["kv_cache_usage_perc"] == 0
    assert sum(got[f'kv_blocks{{state="{state}"}}'] for state in ("free", "cached", "used")) == 128
    for name in ("e2e_request_latency", "time_to_first_token", "request_queue_time", "request_decode_time"):
        assert got[f"{name}_seconds_count"] == 3
    assert got["request_prompt_tokens_sum"] == total["prompt"]
    assert got["request_generation_tokens_count"] == 4
    assert got["request_generation_tokens_sum"] == total["generated"]
    assert got["request_max_num_generation_tokens_sum"] == 21
    assert got["request_params_n_sum"] == 4
    assert got["request_params_max_tokens_sum"] == 21
    assert got["inter_token_latency_seconds_count"] == total["generated"] - 4  # all but the first of each
    assert got["iteration_tokens_total_sum"] >= total["prompt"] - total["cached"]
    assert got["iteration_tokens_total_count"] == got["engine_steps_total"]
    assert 0 < got["time_to_first_token_seconds_sum"] < got["e2e_request_latency_seconds_sum"]
    parts = sum(got[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode"))
    assert parts == pytest.approx(got["e2e_request_latency_seconds_sum"], abs=1)
    assert got['http_requests_total{handler="/v1/completions",method="POST",status="200"}'] == 3
    assert got["process_open_fds"] > 0
    assert got["jaxserve_engine_process_resident_memory_bytes"] > 2**20


def test_programs_are_compiled_while_it_serves(model: Path) -> None:
    """Also while nothing is asked of it."""
    with living.live(model, engine={"warmup": "staged", "max_num_seqs": 2, "max_num_batched_tokens": 16}) as server:
        assert server.post("/v1/completions", BODY).status == 200
        living.wait(lambda: server.get("/health").json == {"status": "ok"}, 60)
        got = {name.removeprefix("jaxserve:"): value for name, value in server.metrics().items()}
        assert got['programs{state="pending"}'] == got["compiled_late_total"] == 0
        assert got['programs{state="compiled"}'] > 15
        assert "ready with " in server.log and "all programs are compiled (" in server.log


def test_prometheus_can_parse_it(counted: tuple[Live, dict[str, Any]]) -> None:
    reply = counted[0].get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(reply.body.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    for family in families:
        assert family.documentation
        assert family.type != "unknown"
        if family.name.startswith("jaxserve:"):
            assert all({"model_name", "engine"} <= set(sample.labels) for sample in family.samples)


def test_every_panel_queries_existing_metrics(counted: tuple[Live, dict[str, Any]]) -> None:
    names = {name.split("{")[0] for name in counted[0].metrics()}
    labels = dict(re.findall(r"^(\S+?)\{(.*)\} ", counted[0].get("/metrics").body.decode(), re.MULTILINE))
    dashboard = json.loads((files(observe) / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [note["expr"] for note in dashboard["annotations"]["list"]]
    assert len(dashboard["panels"]) >= 12
    asked: set[str] = set()
    for query in queries:
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
        found = re.findall(r"([a-z_]+(?::[a-z0-9_]+)?)\{([^}]*)\}", query)
        assert found, query
        for name, selectors in found:
            assert name in names, name
            asked.add(name)
            for label in re.findall(r"(\w+)=", selectors):
                assert label == "instance" or f'{label}="' in labels[name], (name, label)
        for label in re.findall(r"by \((\w+)\)", query):
            assert all(f'{label}="' in labels[name] for name, _ in found), query
    assert len(asked) > 25
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_the_scrape_configuration() -> None:
    config = yaml.safe_load((files(observe) / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:8000"]


# What routers ask for: by the names of the Gateway API's inference extension, and of the production stack's router.
ROUTERS = (
    *("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "cache_config_info"),
    *("gpu_cache_usage_perc", "gpu_prefix_cache_hit_rate"),
    *("gpu_prefix_cache_hits_total", "gpu_prefix_cache_queries_total"),
)


def test_older_names_have_the_same_values() -> None:
    metrics = Metrics("vllm", "tiny")
    metrics.stats = lambda: replace(FakeEngine({}).metrics(), kv_usage=0.25, prefix_queries=40, prefix_hits=30)
    found = dict(re.findall(r"^vllm:(\w+)\{\S*\} (\S+)$", metrics.text().decode(), re.MULTILINE))
    assert float(found["gpu_cache_usage_perc"]) == float(found["kv_cache_usage_perc"]) == 0.25
    assert float(found["gpu_prefix_cache_hit_rate"]) == 0.75
    for name in ("hits_total", "queries_total"):
        assert found[f"gpu_prefix_cache_{name}"] == found[f"prefix_cache_{name}"]


def test_names_for_dashboards_of_vllm(tmp_path: Path) -> None:
    with living.live(tmp_path, fake="slow=0", server={"metrics_prefix": "vllm"}) as server:
        server.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 3})
        text = server.get("/metrics").body.decode()
        names = {name.split("{")[0] for name in server.metrics()}
    for name in (*VLLM, *ROUTERS):
        assert f"vllm:{name}" in names, name
    assert "jaxserve:" not in text
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"}' in text
    assert re.search(r'vllm:time_to_first_token_seconds_bucket\{engine="0",le="0\.06",', text)
    assert 'num_gpu_blocks="1025"' in text


def test_clients_cannot_make_series(counted: tuple[Live, dict[str, Any]]) -> None:
    server = counted[0]
    chance = random.Random(1)

    def word() -> str:
        return "".join(chance.choices(string.ascii_letters, k=8))

    def ask(count: int) -> None:
        with server.connect() as sock:
            for _ in range(count):
                method = chance.choice(["GET", "PUT", "DELETE", "PROPFIND", "LOCK", "POST"])
                path = chance.choice([f"/{word()}", f"/v1/{word()}", f"/version?{word()}", f"/v1/models/{word()}"])
                head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {word()}\r\nContent-Length: 0"
                sock.sendall(f"{head}\r\n\r\n".encode())
                living.answer(sock)

    ask(200)
    before = set(server.metrics())
    ask(1000)
    assert set(server.metrics()) == before
    assert all(len(name) < 200 for name in before)


def test_it_is_cheap(counted: tuple[Live, dict[str, Any]]) -> None:
    assert len(counted[0].get("/metrics").body) < 200_000


def test_the_connections_are_counted(counted: tuple[Live, dict[str, Any]]) -> None:
    server = counted[0]
    held: list[socket.socket] = []
    try:
        held += [server.connect() for _ in range(5)]
        living.wait(lambda: server.metrics()["jaxserve:http_connections"] == 6, 5)
    finally:
        for sock in held:
            sock.close()
    living.wait(lambda: server.metrics()["jaxserve:http_connections"] == 1, 5)
