# SPDX-License-Identifier: Apache-2.0
"""A fault in one request, wherever it happens, ends that request; the others are answered as if nothing had happened.
What fails a whole step ends the engine, and leaves a recording of the steps before it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.engine.execute import recorder
from jaxserve.engine.schedule import commit, packing, sequence
from jaxserve.errors import EngineError, JaxserveError
from jaxserve.sampling import columns, control_row
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import Driver, Streams

GUILTY = "guilty"
AFTER = 4  # tokens


def requests() -> list[Request]:
    """Prompts that share blocks, penalties, samples, scores: what a fault beside them could break."""
    asked: dict[str, Any] = {
        "plain": dict(temperature=0, max_tokens=12),
        GUILTY: dict(presence_penalty=0.5, top_k=7, seed=4, max_tokens=12),
        "penalized": dict(repetition_penalty=1.3, seed=1, max_tokens=12),
        "samples": dict(n=2, seed=2, max_tokens=10),
        "scored": dict(prompt_logprobs=1, logprobs=2, seed=3, max_tokens=9),
    }
    prompt = list(range(1, 22))
    return [
        Request(id=name, prompt_token_ids=[*prompt, 30 + i], params=SamplingParams(ignore_eos=True, **params))
        for i, (name, params) in enumerate(asked.items())
    ]


@pytest.fixture(scope="module")
def expected() -> Streams:
    return Driver().finish(*requests())


def in_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = commit.sampled

    def sampled(of: sequence.Sequence, *rest: Any) -> Any:
        if of.request.id == GUILTY and len(of.tokens) - of.prompt_len == AFTER:
            raise ZeroDivisionError("commit")
        return usual(of, *rest)

    monkeypatch.setattr(commit, "sampled", sampled)


def in_packing(name: str, after: int) -> Callable[[pytest.MonkeyPatch], None]:
    def put(monkeypatch: pytest.MonkeyPatch) -> None:
        usual = getattr(packing.Batcher, name)

        def fill(batcher: Any, plan: Any, *rest: Any) -> Any:
            for slice in plan.slices:
                of = slice.sequence
                if of.request.id == GUILTY and len(of.tokens) - of.prompt_len >= after:
                    raise MemoryError("packing")
            return usual(batcher, plan, *rest)

        monkeypatch.setattr(packing.Batcher, name, fill)

    return put


def on_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = columns.pack

    def pack(params: SamplingParams, **rest: Any) -> Any:
        if params.top_k == 7:
            raise OverflowError("columns")
        return usual(params, **rest)

    monkeypatch.setattr(columns, "pack", pack)


STAGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "arrival": on_arrival,
    "packing the prompt": in_packing("_fill_mixed", 0),
    "packing a token": in_packing("_fill_decode", AFTER),
    "commit": in_commit,
}


@pytest.mark.parametrize("spare", [None, 24], ids=["much memory", "little memory"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_ends_its_request_alone(
    stage: str,
    spare: int | None,
    expected: Streams,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    driver = Driver(spare=spare)
    STAGES[stage](monkeypatch)
    found = driver.finish(*requests())
    guilty = found.pop((GUILTY, 0))
    assert guilty.finish_reason == "error" and re.search("columns|packing|commit", guilty.error or "")
    right = expected[GUILTY, 0].tokens
    assert guilty.tokens == right[: len(guilty.tokens)]
    assert len(guilty.tokens) == (0 if stage in ("arrival", "packing the prompt") else AFTER)
    for name, stream in found.items():
        assert (stream.tokens, stream.finish_reason, stream.error) == (expected[name].tokens, "length", None), name
        assert len(stream.prompt_logprobs) == len(expected[name].prompt_logprobs)
    assert "Error: " in capsys.readouterr().err, "the traceback is printed"
    monkeypatch.undo()
    again = driver.finish(*requests())  # nothing wrong was left in the prefix cache, the rows or the tables
    assert {name: stream.tokens for name, stream in again.items()} == {n: s.tokens for n, s in expected.items()}


def test_a_fault_of_nobody_ends_all_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could come again at every step."""
    driver = Driver()
    fill, calls = packing.Batcher._fill_edits, 0

    def broken(*rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("once")
        return fill(*rest)

    monkeypatch.setattr(packing.Batcher, "_fill_edits", broken)
    found = driver.finish(*requests()[:2])
    assert {stream.finish_reason for stream in found.values()} == {"error"}
    assert driver.finish(*requests()[:1])["plain", 0].finish_reason == "length"


def test_what_cannot_be_prepared_is_refused(monkeypatch: pytest.MonkeyPatch, expected: Streams) -> None:
    driver = Driver()
    plain, guilty, *others = requests()

    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError("controls")

    driver.add(plain)
    with monkeypatch.context() as patched:
        patched.setattr(sequence, "ControlRow", broken)
        with pytest.raises(MemoryError, match="controls"):
            driver.engine.add(guilty)
    found = driver.finish(*others)
    assert {name: stream.tokens for name, stream in found.items()} == {
        name: stream.tokens for name, stream in expected.items() if name[0] != GUILTY
    }


# --- recordings -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Driver, recorder.Recording]]:
    """What an engine left that failed after some work."""
    monkeypatch.setattr(recorder.tempfile, "tempdir", str(tmp_path))
    driver = Driver(record_steps=1000, spare=24)
    driver.add(*requests())
    for _ in range(9):
        driver.turn()
    monkeypatch.setattr(driver.runner, "read", lambda handle: 1 // 0)
    with pytest.raises(EngineError, match=r"ZeroDivisionError.*the steps before it are in .*\.steps; see jaxserve"):
        driver.engine.step()
    [file] = tmp_path.glob("*.steps")
    assert file.stat().st_mode & 0o077 == 0, "others can read what users wrote"
    yield driver, recorder.load(file)


def test_a_recording_replays_bit_for_bit(recorded: tuple[Driver, recorder.Recording]) -> None:
    driver, found = recorded
    assert found.first == 0 and "ZeroDivisionError" in found.fault and found.versions.keys() >= {"jax", "jaxserve"}
    assert [step.tokens is not None for step in found.steps] == [True] * (len(found.steps) - 2) + [False] * 2
    fresh = Driver().runner
    assert list(recorder.replay(fresh, found.steps)) == [None] * len(found.steps)
    # A bit more of penalty, and it is seen.
    changed = next(step for step in found.steps if step.controls)
    vectors = changed.controls[0].array().copy()
    vectors[0, control_row.sections(driver.engine.limits.vocab_size)["penalties"]] = 2**30
    changed.controls[0] = recorder.ArrayData.of(vectors)
    fresh.allocate()
    assert any(recorder.replay(fresh, found.steps))


def test_only_the_last_steps_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recorder.tempfile, "tempdir", str(tmp_path))
    driver = Driver(record_steps=3)
    driver.finish(*requests())
    monkeypatch.setattr(driver.runner, "launch", lambda message: 1 // 0)
    driver.add(*requests())
    with pytest.raises(EngineError, match="steps before it"):
        driver.engine.step()
    [file] = tmp_path.glob("*.steps")
    found = recorder.load(file)
    assert len(found.steps) == 3 and found.first > 3 and file.stat().st_size < 20_000


def test_without_the_setting_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recorder.tempfile, "tempdir", str(tmp_path))
    driver = Driver()
    driver.add(*requests())
    monkeypatch.setattr(driver.runner, "launch", lambda message: 1 // 0)
    with pytest.raises(EngineError) as error:
        driver.engine.step()
    assert "steps before" not in str(error.value) and not list(tmp_path.glob("*.steps"))
    assert {update.finish_reason for update in driver.engine.fail_all()} == {"error"}


@pytest.mark.parametrize("content", [b"", b"not a recording", b"\x81\xa1a\x01"])
def test_files_that_are_no_recordings(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.steps"
    file.write_bytes(content)
    with pytest.raises(JaxserveError, match="is not a recording of steps"):
        recorder.load(file)
    with pytest.raises(JaxserveError, match=r"cannot read .*No such file"):
        recorder.load(tmp_path / "none")
