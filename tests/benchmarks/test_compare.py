# SPDX-License-Identifier: Apache-2.0
"""The load generator's and the comparison's own parts; what they measure is no test."""

import argparse
import json
import math
import statistics
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from tokenizers import Tokenizer

from benchmarks import compare, plot, quality, report, serving, words
from benchmarks.peers import commands
from benchmarks.serving import CHAT, Objectives, Target, Work
from jaxserve import demo
from jaxserve.cli.load import Job, Outcome, Sample

TARGET = Target(url="http://127.0.0.1:1", model="m", path=CHAT)


# --- the work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", serving.MIXES)
def test_a_seed_asks_for_the_same_and_another_for_none_of_it(mix: str) -> None:
    first, again, other = (serving.prompts(Work(mix=mix, seed=seed), 40) for seed in (1, 1, 2))
    assert first == again
    assert not {text for text, _ in first} & {text for text, _ in other}


def test_fixed_lengths_are_fixed() -> None:
    made = serving.prompts(Work(prompt=50, new=7), 30)
    assert {len(text.split()) for text, _ in made} == {50} and {new for _, new in made} == {7}


def test_lengths_of_chats_spread_about_their_median() -> None:
    made = serving.prompts(Work(mix="sharegpt", prompt=60, new=90, longest=512), 2000)
    for lengths, median in (([len(text.split()) for text, _ in made], 60), ([new for _, new in made], 90)):
        assert 0.85 * median < statistics.median(lengths) < 1.15 * median
        assert min(lengths) < median / 4 and max(lengths) == 512 and statistics.mean(lengths) > 1.2 * median


def test_prompts_share_their_beginnings_sixteen_at_a_time() -> None:
    made = serving.prompts(Work(mix="shared", prompt=100), 48)
    begins = Counter(" ".join(text.split()[:94]) for text, _ in made)
    assert set(begins.values()) == {16} and len({text for text, _ in made}) == 48


def test_an_unknown_mix_is_reported() -> None:
    with pytest.raises(SystemExit, match="unknown mix 'x'"):
        serving.prompts(Work(mix="x"), 1)


def test_bodies_are_chats_or_prompts() -> None:
    [chat] = serving.jobs(TARGET, Work(prompt=3, new=5), 1)
    assert chat.path == CHAT and len(chat.body["messages"][0]["content"].split()) == 3
    extra = (("ignore_eos", True),)
    [plain] = serving.jobs(Target(url="", model="m", extra=extra), Work(prompt=3, new=5), 1)
    assert plain.body["prompt"] == chat.body["messages"][0]["content"] and plain.body["ignore_eos"]
    assert plain.body["max_tokens"] == 5 and plain.body["temperature"] == 0


def test_a_server_that_is_not_there_is_reported() -> None:
    with pytest.raises(SystemExit, match=r"^error: cannot connect to http://127\.0\.0\.1:1; start a server"):
        serving.model_of("http://127.0.0.1:1", None)


@pytest.mark.parametrize(("keep_alive", "connections"), [(True, 1), (False, 5)])
def test_connections_are_kept_unless_a_server_cannot(keep_alive: bool, connections: int) -> None:
    seen: list[object] = []

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            seen.append(self.client_address)
            self.rfile.read(int(self.headers["Content-Length"]))
            event = b'data: {"choices": [{"index": 0, "text": "a"}]}\n\ndata: [DONE]\n\n'
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Content-Length", str(len(event)))
            self.end_headers()
            self.wfile.write(event)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = Target(url=f"http://127.0.0.1:{server.server_port}", model="m", keep_alive=keep_alive)
        outcome = serving.run(target, serving.jobs(target, Work(prompt=3, new=5), 5), concurrency=1)
        server.shutdown()
    assert [sample.error for sample in outcome.samples] == [None] * 5
    assert len(seen) == 5 and len(set(seen)) == connections


def test_goodput_counts_what_met_both_deadlines() -> None:
    samples = [
        Sample(began=0, stamps=[0.1, 0.2, 0.3], output_tokens=3),
        Sample(began=0, stamps=[2.0, 2.1], output_tokens=2),  # begins late
        Sample(began=0, stamps=[0.1, 1.1], output_tokens=2),  # goes on slowly
        Sample(began=0, stamps=[0.1], output_tokens=1),
        Sample(began=0, stamps=[0.1, 0.2], output_tokens=2, error="the answer broke off"),
    ]
    found = serving.figures(Outcome(samples, 2.0, 5), Objectives(ttft_ms=1000, tpot_ms=100.001))
    assert found["goodput"] == 1.0 and found["failed"] == 1 and found["completed"] == 4
    assert "1.00" in serving.table([("5 at once", found)])


# --- the comparison -------------------------------------------------------------------------------------------------


class Fake:
    def __init__(self, name: str, speeds: list[float], ttft: float, says: str = "yes") -> None:
        self.name, self.speeds, self.ttft, self.says = name, [math.nan, *speeds], ttft, says
        self.asked: list[Work] = []

    def load(self, work: Work, count: int, streams: int) -> dict[str, float]:
        self.asked.append(work)
        found = {f"{rank}_{part}_ms": self.ttft for rank in ("median", "p99") for part in ("ttft", "tpot")}
        return found | {"output_throughput": self.speeds[len(self.asked) - 1], "failed": 0}

    def answers(self, work: Work, count: int) -> list[str]:
        return [self.says if place % 2 else "yes" for place in range(count)]


def test_rows_have_medians_and_ratios_round_by_round() -> None:
    ours, theirs = Fake("ours", [100, 300, 200], 10), Fake("theirs", [50, 100, 200], 20)
    rounds = list(compare.measure([ours, theirs], Work(), streams=[4], rounds=3, each=2))
    rows = compare.rows_of(rounds, ["ours", "theirs"], [4])
    assert [(row.server, row.tokens_per_second, row.speedup, row.ttft_ratio) for row in rows] == [
        ("ours", 200, None, None),
        ("theirs", 100, 2.0, 2.0),
    ]
    shown = compare.markdown(rows)
    assert "| 4 | theirs | 100 |" in shown and "2.00 x as fast (1.00 to 3.00)" in shown
    [_, alone] = compare.rows_of(rounds[:1], ["ours", "theirs"], [4])
    assert (alone.speedup, alone.speedups, alone.spread) == (2.0, None, None), "one round has no spread"


class Ending(Fake):
    """In the place of a server that is started; ends the comparison at its third load."""

    how: type[BaseException]

    def __init__(self, name: str, model: Path, **_: Any) -> None:
        super().__init__(name, [8.0, 8.0], 1.0)
        self.start_seconds, self.closed = 0.0, False
        self.started = commands.start_command(name, model, 1, longest=64, venv=None)
        ALL.append(self)

    def load(self, work: Work, count: int, streams: int) -> dict[str, float]:
        found = super().load(work, count, streams) if len(self.asked) < 2 else None
        if found is None:
            raise self.how("jaxserve died; its log ends: no memory")
        return found

    def perplexity(self, those: quality.Passages, folder: Path) -> float:
        return 40.0 + len(those.chunks)

    def close(self) -> None:
        self.closed = True


ALL: list[Ending] = []


@pytest.mark.parametrize(
    ("how", "code"), [(KeyboardInterrupt, 130), (compare.Died, "error: jaxserve died; its log ends: no memory")]
)
def test_finished_rounds_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, how: Any, code: object
) -> None:
    ALL.clear()
    monkeypatch.setattr(Ending, "how", how, raising=False)
    monkeypatch.setattr(compare, "TimedServer", Ending)
    monkeypatch.setattr(sys, "argv", ["compare", "--streams=1", "--rounds=3", f"--out={tmp_path / 'found'}"])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == code
    assert "1 of 3 rounds were finished" in capsys.readouterr().out
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["settings"]["rounds"] == 1 and content["rows"][0]["tokens_per_second"] == 8
    assert content["perplexity"] == dict.fromkeys(("jaxserve", "jaxserve-uncached"), 40.0 + compare.CHUNKS)
    assert content["settings"]["runs"]["jaxserve"] == "its default: --dtype=auto"
    assert "| jaxserve | its default: --dtype=auto | 72.000 |" in (tmp_path / "found.md").read_text()
    assert content["settings"]["model"] == "demo"
    assert content["rows"][0]["speeds"] == [8.0] and report.kind_of(report.Result(tmp_path, content, ()))
    assert len(ALL) == 2 and all(server.closed for server in ALL)


def test_both_get_the_same_work_and_never_the_same_twice() -> None:
    ours, theirs = Fake("ours", [1] * 7, 1), Fake("theirs", [1] * 7, 1)
    list(compare.measure([ours, theirs], Work(), streams=[1, 2], rounds=3, each=1))
    assert ours.asked == theirs.asked
    assert len({work.seed for work in ours.asked}) == len(ours.asked) == 8


def test_timed_answers_have_their_full_length(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM's field, or what transformers' server has instead."""
    bodies: list[dict[str, Any]] = []

    def run(_: Target, work: list[Job], **__: Any) -> Outcome:
        bodies.extend(job.body for job in work)
        return Outcome([], 1.0, 1)

    monkeypatch.setattr(serving, "run", run)
    for name in ("vllm", "transformers"):
        server: Any = object.__new__(compare.TimedServer)
        server.target, server.process = TARGET, SimpleNamespace(poll=lambda: None)
        server.started = commands.start_command(name, tmp_path, 81, longest=64, venv=tmp_path)
        server.load(Work(prompt=3), 1, 1)
    assert bodies[0]["ignore_eos"] is True and "ignore_eos" not in bodies[1]
    assert json.loads(bodies[1]["generation_config"]) == {"eos_token_id": -1}


def test_agreement_is_the_share_of_equal_answers() -> None:
    found = compare.agreement([Fake("a", [], 1), Fake("b", [], 1, "no")], Work(), 4)
    assert found == {"a": 1.0, "b": 0.5}


ALL_NAMES = [
    name
    for server, settings in commands.SETTINGS.items()
    for name in (server, *(f"{server}:{one}" for one in settings))
]


def test_servers_are_started_with_the_same_sizes(tmp_path: Path) -> None:
    started = {
        name: commands.start_command(name, tmp_path, 81, longest=512, venv=tmp_path, place=tmp_path)
        for name in ALL_NAMES
    }
    for made in started.values():
        assert str(tmp_path) in made.command and "81" in made.command and "127.0.0.1" in made.command
    assert "--no-enable-prefix-caching" in started["jaxserve-uncached"].command
    plain, whole = started["vllm"].command, started["vllm:float32"].command
    assert "--dtype" not in plain and whole == [*plain, "--dtype", "float32"]
    assert started["jaxserve:int8"].command == [*started["jaxserve"].command, "--quantization=int8"]
    assert started["jaxserve-uncached:bfloat16"].command[-1] == "--dtype=bfloat16"
    assert started["transformers:bfloat16"].command == [*started["transformers"].command, "--dtype", "bfloat16"]
    export = started["openvino:int8"].prepare[0]
    assert export.command[-3:] == ["--weight-format", "int8", str(export.makes)]
    assert started["openvino:f32"].command[-6:-4] == ["--precision", "f32"]


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("", "is an empty list"),
        ("jaxserve,x", "unknown server 'x'; choose from jaxserve,"),
        ("jaxserve,vllm", "vllm needs an environment, vllm=FOLDER"),
        ("jaxserve,transformers=/nonexistent", "there is no virtual environment in /nonexistent"),
        ("jaxserve,jaxserve", "has duplicates"),
        ("jaxserve:int4", "jaxserve has no setting 'int4'; choose from float32, bfloat16, int8"),
        ("jaxserve=/tmp", "jaxserve runs from this checkout"),
        ("vllm:float32", "vllm needs an environment, vllm:float32=FOLDER"),
    ],
)
def test_servers_that_cannot_start_are_reported_before_any_is_started(named: str, problem: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=problem):
        compare.named(named)


def test_a_server_can_take_part_with_several_settings(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    found = compare.named(f"jaxserve:float32,vllm={tmp_path},vllm:float32={tmp_path},llamacpp:f32={tmp_path}")
    assert found == {"jaxserve:float32": None} | dict.fromkeys(("vllm", "vllm:float32", "llamacpp:f32"), tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match="llamacpp:q4_0 needs llama-quantize beside llama-server"):
        compare.named(f"llamacpp:q4_0={tmp_path}")


def test_failures_are_reported() -> None:
    """With how many it went so, the most frequent first."""
    ended = Sample(stamps=[1.0], output_tokens=1)
    samples = [Sample(error="b"), Sample(error="a"), ended, Sample(error="a"), Sample()]
    found = serving.faults(Outcome(samples, 1.0, 1))
    assert next(iter(found.items())) == ("a", 2) and found["b"] == 1 and sum(found.values()) == 4


def test_a_server_that_does_not_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"jaxserve did not start: .*does not exist"):
        compare.TimedServer("jaxserve", tmp_path / "none", longest=64, log=tmp_path / "log")


# --- perplexity -----------------------------------------------------------------------------------------------------


def test_passages_are_chunks_of_the_text_s_tokens(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("one two three " * 600)
    ids = (
        Tokenizer.from_file(str(demo.FOLDER / "tokenizer.json")).encode(file.read_text(), add_special_tokens=False).ids
    )
    those = quality.passages(demo.FOLDER, 2, file)
    assert [token for chunk in those.chunks for token in chunk] == ids[:512] and those.scored == 254
    with pytest.raises(SystemExit, match=r"90 chunks need 23,040  hint: set a smaller --quality-chunks"):
        quality.passages(demo.FOLDER, 90, file)
    assert quality.passages(demo.FOLDER, 32).scored == 32 * 127, "of the text that comes with Python"


def test_the_perplexity_of_a_server_is_that_of_the_second_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def post(_: object, path: str, body: dict[str, Any]) -> dict[str, Any]:
        asked.append((path, body["prompt"]))
        known = math.log(0.25)
        scores = [{str(token): {"logprob": known if at > 128 else -99.0}} for at, token in enumerate(body["prompt"])]
        return {"choices": [{"prompt_logprobs": [None, *scores[1:]]}]}

    monkeypatch.setattr("jaxserve.cli.client.Client.post", post)
    chunks = [list(range(256)), list(range(256, 512))]
    assert quality.by_route(TARGET, quality.Passages("", chunks)) == pytest.approx(4.0)
    assert asked == [("/v1/completions", chunk) for chunk in chunks]


def test_llama_cpp_s_program_is_asked_for_the_same_chunks(tmp_path: Path) -> None:
    program = tmp_path / "llama-perplexity"
    program.write_text('#!/bin/sh\necho "$@" >&2\ncat "$4"\necho "Final estimate: PPL = 12.3456 +/- 0.1"\n')
    program.chmod(0o755)
    those = quality.Passages("the text", [[1] * 256] * 3)
    assert quality.by_command([str(program), "--model", "m"], those, tmp_path) == 12.3456
    program.write_text("#!/bin/sh\necho no such model\n")
    with pytest.raises(SystemExit, match="printed no perplexity; it ends: no such model"):
        quality.by_command([str(program), "--model", "m"], those, tmp_path)


# --- its parts ------------------------------------------------------------------------------------------------------


def test_every_word_is_a_token(tmp_path: Path) -> None:
    words.write_tokenizer(tmp_path, 500)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = serving.prompts(Work(prompt=200), 1)[0][0]
    ids = tokenizer.encode(text).ids
    assert len(ids) == 200 and 0 not in ids and tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == 500


def test_bars_are_as_tall_as_their_values() -> None:
    drawn = ElementTree.fromstring(plot.bars({"1": {"a": 10, "b": 5}, "8 & <9>": {"a": 40, "b": 0}}, "speed"))
    tall = [float(bar.get("height", "0")) for bar in drawn.iter("{http://www.w3.org/2000/svg}rect")]
    assert tall[:4] == [plot.HEIGHT, plot.HEIGHT / 2, plot.HEIGHT, 0]
    assert "8 & <9>" in "".join(drawn.itertext())
