# SPDX-License-Identifier: Apache-2.0
"""`jaxserve bench`: the load generator's counts and times, vLLM's table, JSON, and benchmarks without a server."""

import asyncio
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cli import load
from jaxserve.cli.bench_serve import BenchServe, limits
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
    server.faults, server.pieces = {}, ()
    assert "failed: the response has no text: set --ignore-eos" in command(*words, "--num-warmups", "0").err


def test_flags_of_vllm_s_benchmark(command: Command, server: FakeServer, tmp_path: Path) -> None:
    words = ("bench", "serve", "--num-prompts", "1", "--random-input-len", "3", "--json", "-")
    here = ("--host", "127.0.0.1", "--port", str(server.port))
    for backend, path in (("openai", COMPLETIONS), ("vllm", COMPLETIONS), ("openai-chat", CHAT)):
        before = len(server.bodies(path))
        said = command(*words, *here, "--backend", backend)
        result = json.loads(said.out)
        assert (said.code, result["backend"], result["endpoint"]) == (0, backend, path)
        assert len(server.bodies(path)) == before + 2
    assert command(*words, *here, "--backend", "openai-chat", "--endpoint", CHAT).code == 0
    one_error(command(*words, *here, "--backend", "tgi"), 2, "--backend is 'tgi'", "openai, vllm, openai-chat")
    one_error(command(*words, "--backend", "vllm", "--endpoint", CHAT), 2, f"--backend vllm does not use {CHAT}")
    one_error(command(*words, *here, "--url", server.url), 2, "--host or --port is set together with --url")


def test_a_rate_limit_gets_a_hint(command: Command, server: FakeServer) -> None:
    words = ("bench", "serve", "--url", server.url, "--num-prompts", "2")
    server.faults[COMPLETIONS], server.message = 429, "Rate limit reached."
    one_error(command(*words), 1, "the first request failed: 429 Rate limit reached.", "--request-rate")
    said = command(*words, "--num-warmups", "0")
    assert said.err.startswith("failed: 429 Rate limit reached.\nhint: the server limits the rate of this API key")


def test_numbers_in_json_have_no_meaningless_digits(command: Command, server: FakeServer) -> None:
    said = command("bench", "serve", "--url", server.url, "--num-prompts", "2", "--json", "-")
    numbers = re.findall(r": (\d+\.\d+)[,}]", said.out)
    assert len(numbers) > 15 and all(len(number.replace(".", "").strip("0")) <= 8 for number in numbers)


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


# --- data sets and goodput ------------------------------------------------------------------------------------------


def lines_of(folder: Path, *entries: object) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_prompts_of_a_file(command: Command, server: FakeServer, tmp_path: Path) -> None:
    file = lines_of(tmp_path, *({"prompt": f"question {place}", "output_tokens": place} for place in (1, 2, 3)))
    words = ("bench", "serve", "--url", server.url, "--dataset-name", "custom", "--dataset-path", file)
    assert command(*words, "--num-prompts", "5", "--custom-output-len", "-1").code == 0
    bodies = server.bodies(COMPLETIONS)
    assert len(bodies) == 6 and {body["prompt"] for body in bodies} == {"question 1", "question 2", "question 3"}
    assert all(body["max_tokens"] == int(body["prompt"][-1]) for body in bodies)  # repeated: there are too few
    assert command(*words, "--num-prompts", "1", "--endpoint", CHAT).code == 0
    [body, _] = server.bodies(CHAT)
    assert body["messages"][0]["content"].startswith("question ") and body["max_tokens"] == 256


def test_files_that_are_no_data_sets(command: Command, server: FakeServer, tmp_path: Path) -> None:
    words = ("bench", "serve", "--url", server.url, "--dataset-name")
    one_error(command(*words, "custom"), 2, "needs --dataset-path")
    one_error(command(*words, "random", "--dataset-path", tmp_path), 2, "reads no file")
    one_error(command(*words, "custom", "--dataset-path", tmp_path / "absent"), 2, "cannot read", "No such file")
    for entry in ({"text": "x"}, {"prompt": ""}, [], "x"):
        file = lines_of(tmp_path, {"prompt": "x"}, entry)
        one_error(command(*words, "custom", "--dataset-path", file), 2, "line 2", '{"prompt": "..."}')
    file = lines_of(tmp_path, {"prompt": "x"})
    one_error(command(*words, "custom", "--dataset-path", file, "--custom-output-len", "-1"), 2, "output_tokens")
    one_error(command(*words, "sharegpt", "--dataset-path", file), 2, "has no prompts")


def test_conversations_of_sharegpt(tmp_path: Path) -> None:
    talk = [("a " * 50, "b " * 30), ("short", "b " * 30), ("a " * 50, "x"), ("a " * 5000, "b " * 30)]
    turns = [[{"from": "human", "value": ask}, {"from": "gpt", "value": answer}] for ask, answer in talk]
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([{"conversations": each} for each in (*turns, [], turns[0][:1])]))
    bench = BenchServe(dataset_name="sharegpt", dataset_path=file, num_prompts=3, num_warmups=0)
    jobs = bench.jobs("m", None, lambda text: len(text.split()))
    assert [(job.body["prompt"], job.body["max_tokens"], job.prompt_tokens) for job in jobs] == [
        ("a " * 50, 30, 50)
    ] * 3
    fixed = BenchServe(dataset_name="sharegpt", dataset_path=file, num_prompts=9, sharegpt_output_len=7)
    assert {job.body["max_tokens"] for job in fixed.jobs("m", None, lambda text: len(text.split()))} == {7}


def test_lengths_like_sharegpts() -> None:
    bench = BenchServe(dataset_name="sharegpt", num_prompts=2000, num_warmups=0)
    jobs = bench.jobs("m", range(1000))
    assert jobs == bench.jobs("m", range(1000))
    prompts, outputs = [job.prompt_tokens for job in jobs], [job.body["max_tokens"] for job in jobs]
    assert min(prompts) >= 4 and max(prompts) <= 1024 and max(map(sum, zip(prompts, outputs, strict=True))) <= 2048
    assert 190 < np.mean(prompts) < 230 and 180 < np.mean(outputs) < 220 and np.median(prompts) < 0.7 * np.mean(prompts)
    assert all(len(job.body["prompt"]) == job.prompt_tokens for job in jobs)


def test_shared_prefixes() -> None:
    bench = BenchServe(
        dataset_name="prefix_repetition",
        num_prompts=40,
        num_warmups=0,
        prefix_repetition_num_prefixes=4,
        prefix_repetition_prefix_len=30,
        prefix_repetition_suffix_len=10,
        prefix_repetition_output_len=5,
    )
    jobs = bench.jobs("m", range(1000))
    prompts = [tuple(job.body["prompt"]) for job in jobs]
    starts = [prompt[:30] for prompt in prompts]
    assert [len(prompt) for prompt in prompts] == [40] * 40 and len(set(prompts)) == 40
    assert {start: starts.count(start) for start in starts} == dict.fromkeys(set(starts), 10) and len(set(starts)) == 4
    assert starts[:10] != [starts[0]] * 10  # in random order
    assert {job.body["max_tokens"] for job in jobs} == {5}


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_bursts(burstiness: float) -> None:
    """The mean stays, and the squared coefficient of variation of a gamma distribution is 1 / shape."""
    draw = random.Random(1)
    pauses = np.asarray([load.pause(draw, 50, burstiness) for _ in range(20_000)])
    assert pauses.mean() == pytest.approx(1 / 50, rel=0.05)
    assert pauses.var() / pauses.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_bursts_need_a_rate(command: Command) -> None:
    one_error(command("bench", "serve", "--burstiness", "0.5"), 2, "no effect without --request-rate")
    one_error(command("bench", "serve", "--burstiness", "0"), 2, "--burstiness is 0.0, not above 0")


def test_goodput_by_hand() -> None:
    samples = [
        load.Sample(began=0.0, stamps=[0.1, 0.3], output_tokens=3),  # TTFT 100 ms, TPOT 100 ms, 300 ms in all
        load.Sample(began=0.0, stamps=[0.4], output_tokens=1),  # no TPOT
        load.Sample(began=0.0, stamps=[0.1, 0.11], output_tokens=2),
        load.Sample(began=0.0, error="no"),
    ]
    outcome = load.Outcome(samples, 2.0, 4)
    for texts, good in (
        (["ttft:200"], 2),
        (["ttft:200", "tpot:50"], 1),
        (["tpot:50"], 2),
        (["e2el:300.5", "ttft:1e3"], 2),
        (["ttft:0"], 0),
    ):
        assert load.summary(outcome, limits(texts))["request_goodput"] == good / 2, texts
    assert "request_goodput" not in load.summary(outcome)


def test_goodput_is_reported(command: Command, server: FakeServer) -> None:
    words = ("bench", "serve", "--url", server.url, "--num-prompts", "4", "--random-input-len", "3")
    said = command(*words, "--goodput", "ttft:100000", "tpot:100000")
    [rate] = re.findall(r"Request throughput \(req/s\): +([\d.]+)", said.out)
    assert re.findall(r"Request goodput \(req/s\): +([\d.]+)", said.out) == [rate]
    assert "goodput" not in command(*words).out
    for wrong, part in (
        ("ttft", "number of milliseconds"),
        ("itl:5", "ttft:MS"),
        ("tpot:x", "tpot"),
        ("ttft:-1", "ttft"),
    ):
        one_error(command(*words, "--goodput", wrong), 2, f"--goodput has '{wrong}'", part)
    one_error(command(*words, "--goodput", "ttft:1", "tpot:2", "ttft:3"), 2, "--goodput has ttft twice")


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
    numbers = re.findall(r"\d+\.\d+", file.read_text() + said.out)
    assert len(numbers) > 10 and all(len(number.replace(".", "").strip("0")) <= 8 for number in numbers)
    one_error(command("bench", "latency", model, "--num-iters", "0"), 2, "--num-iters is 0")
