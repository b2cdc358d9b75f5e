# SPDX-License-Identifier: Apache-2.0
"""`jaxserve bench`: the load generator's counts and times, vLLM's table, JSON, and benchmarks without a server."""

import asyncio
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cli import load
from jaxserve.cli.bench_serve import BenchServe
from tests.cli.conftest import Command, one_error
from tests.cli.fake_server import KEY, FakeServer
from tests.golden import load as golden

LABELS, KINDS = ("Mean", "Median", "P99"), ("ttft", "tpot", "itl")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def test_table_and_json(command: Command, server: FakeServer, tmp_path: Path) -> None:
    server.pause = 0.01
    file = tmp_path / "result.json"
    said = command(
        *("bench", "serve", "--base-url", server.url, "--num-prompts", "6", "--random-input-len", "9"),
        *("--random-output-len", "4", "--max-concurrency", "2", "--ignore-eos", "--json", file),
    )
    assert (said.code, said.err) == (0, "")
    rows = dict(re.findall(r"^([^=\n:]+): +([\d.]+) *$", said.out, re.MULTILINE))
    assert [rows[name] for name in ("Successful requests", "Failed requests", "Maximum request concurrency")] == [
        *("6", "0", "2")
    ]
    assert (rows["Total input tokens"], rows["Total generated tokens"]) == (
        "66",
        "24",
    )  # 11 and 4, as reported by the server
    figures = json.loads(file.read_text())
    for row, name in (
        ("Request throughput (req/s)", "request_throughput"),
        ("Output token throughput (tok/s)", "output_throughput"),
        ("Total token throughput (tok/s)", "total_token_throughput"),
        *((f"{label} {kind.upper()} (ms)", f"{label.lower()}_{kind}_ms") for label in LABELS for kind in KINDS),
    ):
        assert float(rows[row]) == pytest.approx(figures[name], abs=0.006), row
    assert figures["completed"] == 6 and figures["model_id"] == "fake" and figures["errors"] == []
    assert figures["output_throughput"] == pytest.approx(24 / figures["duration"])
    assert figures["mean_ttft_ms"] >= 10 and figures["mean_itl_ms"] >= 8
    assert server.most_at_once == figures["max_concurrent_requests"] == 2
    bodies = server.bodies(COMPLETIONS)
    assert len(bodies) == 7  # one to warm up
    assert all(len(body["prompt"]) == 9 and set(body["prompt"]) <= {5, 6, 7, 8} for body in bodies)
    assert all((body["max_tokens"], body["ignore_eos"], body["temperature"]) == (4, True, 0.0) for body in bodies)


def test_chat_and_saved_results(command: Command, server: FakeServer, tmp_path: Path) -> None:
    said = command(
        *("bench", "serve", "--url", server.url, "--endpoint", CHAT, "--num-prompts", "2", "--random-input-len", "3"),
        *("--save-result", "--result-dir", tmp_path, "--request-rate", "200", "--json", "-"),
    )
    [saved] = tmp_path.iterdir()
    assert json.loads(said.out) == json.loads(saved.read_text())
    assert json.loads(said.out)["total_output_tokens"] == 8
    assert len(server.bodies(CHAT)[0]["messages"][0]["content"].split()) == 3


def test_a_server_without_tokenize_gets_words(command: Command) -> None:
    from tests.cli.fake_server import running

    fake = FakeServer()
    fake.has_tokenize = False
    with running(fake):
        assert command("bench", "serve", "--url", fake.url, "--num-prompts", "1", "--random-input-len", "5").code == 0
    assert len(fake.bodies(COMPLETIONS)[0]["prompt"].split()) == 5


def test_same_seed_same_jobs() -> None:
    bench = BenchServe(num_prompts=5, random_input_len=20, random_range_ratio=0.5, random_prefix_len=3, seed=1)
    jobs = bench.jobs("m", range(100))
    assert jobs == bench.jobs("m", range(100)) != BenchServe(num_prompts=5, seed=2).jobs("m", range(100))
    prompts = [job.body["prompt"] for job in jobs]
    assert all(prompt[:3] == prompts[0][:3] and 13 <= len(prompt) <= 33 for prompt in prompts)
    assert len({len(prompt) for prompt in prompts}) > 1


def test_failures_are_reported(command: Command, server: FakeServer) -> None:
    words = ("bench", "serve", "--url", server.url, "--num-prompts", "3")
    server.faults[COMPLETIONS] = 503
    one_error(command(*words), 1, "the first request failed: 503 The server is loading")
    said = command(*words, "--num-warmups", "0")
    assert said.code == 1 and said.err == "failed: 503 The server is loading the model.\n"
    assert re.search(r"Failed requests: +3", said.out) and "nan" not in said.out
    for fault, text in (("cut", "the response ended early"), ("late", "the engine failed")):
        server.faults[COMPLETIONS] = fault
        assert command(*words, "--num-warmups", "0").err == f"failed: {text}\n"


def test_keys_and_wrong_flags(command: Command, server: FakeServer) -> None:
    server.needs_key = True
    words = ("bench", "serve", "--url", server.url, "--num-prompts", "1")
    one_error(command(*words), 1, "Unauthorized", "--api-key")
    assert command(*words, "--api-key", KEY).code == 0
    for flag, value in (("--num-prompts", "0"), ("--request-rate", "0"), ("--random-range-ratio", "1")):
        one_error(command("bench", "serve", flag, value), 2, f"{flag} is {value}")
    one_error(command("bench", "throughputt"), 2, "did you mean throughput?")


def test_rate_and_at_once(server: FakeServer) -> None:
    jobs = [load.Job(COMPLETIONS, {"prompt": "x"}, 1)] * 20
    outcome = asyncio.run(load.run(server.url.removesuffix("/v1"), jobs, rate=100, seed=3))
    assert outcome.seconds > 0.05
    begun = [sample.began for sample in outcome.samples]
    assert begun == sorted(begun) and begun[-1] - begun[0] > 0.05
    assert [sample.output_tokens for sample in outcome.samples] == [4] * 20
    assert [len(sample.stamps) for sample in outcome.samples] == [4] * 20


def test_figures_by_hand() -> None:
    samples = [
        load.Sample(began=0.0, stamps=[1.0, 1.5, 2.5], prompt_tokens=10, output_tokens=4),
        load.Sample(began=1.0, stamps=[4.0], prompt_tokens=20, output_tokens=1),
        load.Sample(began=1.0, error="no"),
    ]
    figures = load.summary(load.Outcome(samples, 10.0, 2))
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (30, 5)
    assert (figures["request_throughput"], figures["output_throughput"]) == (0.2, 0.5)
    assert (figures["mean_ttft_ms"], figures["mean_tpot_ms"], figures["mean_itl_ms"]) == (2000, 500, 750)
    assert figures["median_e2el_ms"] == 2750


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(0, 100))
def test_percentiles_are_numpys(values: list[float], share: int) -> None:
    assert load.percentile(sorted(values), share) == pytest.approx(np.percentile(values, share), rel=1e-9, abs=1e-9)


# Few shapes, each compiled when it is needed.
SMALL = (
    *("--max-num-seqs", "2", "--max-num-batched-tokens", "8", "--no-warmup", "--compilation-cache-dir="),
    *("--num-blocks", "32"),
)


def test_without_a_server(command: Command, tmp_path: Path) -> None:
    model, file = golden.write_checkpoint("llama-gqa-tied", tmp_path / "tiny"), tmp_path / "result.json"
    said = command(
        *("bench", "throughput", model, *SMALL, "--num-prompts", "1", "--input-len", "5", "--output-len", "4"),
        *("--json", file),
    )
    assert said.code == 0, said
    assert re.search(r"^Throughput: [\d.]+ requests/s, [\d.]+ total tokens/s, [\d.]+ output tokens/s$", said.out, re.M)
    assert said.out.endswith("Total num prompt tokens:  5\nTotal num output tokens:  4\n")
    assert json.loads(file.read_text())["total_num_tokens"] == 9
    said = command(
        *("bench", "latency", "--model", model, *SMALL, "--batch-size", "1", "--input-len", "5", "--output-len", "4"),
        *("--num-iters", "3", "--num-iters-warmup", "0", "--json", file),
    )
    assert said.code == 0, said
    assert re.match(r"Avg latency: [\d.e-]+ seconds\n10% percentile latency: [\d.e-]+ seconds\n", said.out)
    found = json.loads(file.read_text())
    assert len(found["latencies"]) == 3 and found["percentiles"]["50"] == sorted(found["latencies"])[1]
    one_error(command("bench", "latency", model, "--num-iters", "0"), 2, "--num-iters is 0")
