# SPDX-License-Identifier: Apache-2.0
"""`jaxserve replay` with what a real engine wrote when it failed."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from jaxserve.cli import main
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.execute import recorder
from jaxserve.errors import EngineError
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.fast import programs
from tests.host.living import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("replay") / "tiny")


@pytest.fixture(scope="module")
def dump(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dumps")
    sizes: dict[str, Any] = dict(max_num_seqs=2, max_num_batched_tokens=64, num_blocks=20, max_model_len=64)
    config = EngineConfig(model=str(model), warmup=False, record_steps=100, compilation_cache_dir=programs(), **sizes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recorder.tempfile, "tempdir", str(folder))
        engine = Engine(config, report=lambda line: None)
        params = SamplingParams(temperature=0.7, seed=3, repetition_penalty=1.2, max_tokens=20, ignore_eos=True)
        engine.add(Request(id="a", prompt_token_ids=[5, 6, 7], params=params))
        for _ in range(6):
            engine.step()
        patched.setattr(engine.runner, "read", lambda handle: 1 // 0)
        with pytest.raises(EngineError):
            engine.step()
        engine.close()
    [file] = folder.glob("*.steps")
    return file


def changed(dump: Path, to: Path, **fields: Any) -> str:
    content = msgspec.msgpack.decode(dump.read_bytes())
    to.write_bytes(msgspec.msgpack.encode(content | fields))
    return str(to)


def test_equal_results(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(dump)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fault         ZeroDivisionError: integer division or modulo by zero"
    assert lines[1].startswith("recorded on   cpu ")
    assert lines[-1] == "7 steps replayed; 5 of 5 results are equal bit for bit"


def test_other_results(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = msgspec.msgpack.decode(dump.read_bytes())["steps"]
    right = steps[2]["tokens"][0]
    steps[2]["tokens"] = [right + 1]
    file = changed(dump, tmp_path / "x.steps", steps=steps)
    assert main(["replay", file]) == 1
    out = capsys.readouterr().out
    assert f"step 3: entry 0 has token {right}, recorded {right + 1}" in out
    assert "4 of 5 results are equal" in out
    # What came before is not there: no wonder that results differ.
    assert main(["replay", changed(dump, tmp_path / "y.steps", steps=steps, first=9)]) == 0
    assert "9 steps before these were not recorded" in capsys.readouterr().out


def test_other_models_and_compiler_flags(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", changed(dump, tmp_path / "x.steps", model="other")]) == 1
    assert "the steps are of another model" in capsys.readouterr().err
    assert main(["replay", changed(dump, tmp_path / "y.steps", xla_flags="--xla_other=1")]) == 0
    assert "XLA_FLAGS     were '--xla_other=1', are " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(policy_version=2), "the weights were version 2, set by update_weights"),
        (dict(has_folder=False), "the weights came from a program, not from a folder"),
        (dict(form=7), "has format 7, expected 3"),
    ],
)
def test_what_cannot_be_replayed(
    dump: Path, tmp_path: Path, fields: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", changed(dump, tmp_path / "x.steps", **fields)]) in (1, 2)
    assert message in capsys.readouterr().err


def test_weights_that_a_program_passed(
    dump: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = changed(dump, tmp_path / "x.steps", has_folder=False)
    assert main(["replay", file, "--model", str(model)]) == 0
    assert "5 of 5 results are equal" in capsys.readouterr().out
