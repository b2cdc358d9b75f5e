# SPDX-License-Identifier: Apache-2.0
"""`jaxserve convert` and `python -m convert`: what they write, and what a failure leaves behind."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import termios
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from convert import load, orbax
from convert.files import output
from convert.files.reader import Reader
from jaxserve import cli
from tests.convert.folders import same
from tests.convert.hub_server import Hub
from tests.golden import load as golden

COMMANDS = ([str(Path(sysconfig.get_path("scripts")) / "jaxserve"), "convert"], [sys.executable, "-m", "convert"])
CASE = "llama-gqa-tied"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = golden.write_checkpoint(CASE, tmp_path / "source", shards=2)
    shutil.copytree(golden.TOKENIZERS / "byte-level", folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


class Run(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Run the command in this process."""

    def run(*args: str | Path) -> Run:
        capsys.readouterr()
        code = cli.main(["convert", *map(str, args)])
        said = capsys.readouterr()
        return Run(code, said.out, said.err)

    return run


def user_error(run: Run, *expected: str) -> None:
    assert (run.code, run.out) == (1, ""), run
    assert re.fullmatch(r"error: [^\n]+  hint: [^\n]+\n", run.err)
    for part in expected:
        assert part in run.err, run.err


def only(folder: Path, *names: str) -> None:
    assert {path.name for path in folder.iterdir()} == set(names)


# --- what it writes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=["jaxserve", "python"])
def test_as_users_run_it(source: Path, tmp_path: Path, command: list[str]) -> None:
    place = tmp_path / "new"
    args = [*command, str(source), str(place), "--dtype", "bfloat16"]
    result = subprocess.run(args, capture_output=True, text=True, check=False, timeout=180, env=clean_env())
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(rf"wrote {re.escape(str(place))}: [\d.]+ MB in \d+ tensors, [\d.]+ s\n", result.stdout)
    names = ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    only(place, "params", "spec.json", *names)
    assert all((place / name).read_bytes() == (source / name).read_bytes() for name in names)
    same(load.load_model(place, dtype="bfloat16")[1], load.load_model(source, dtype="bfloat16")[1])


def clean_env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}


def test_the_converted_folder(source: Path, tmp_path: Path, convert: Callable[..., Run]) -> None:
    trap = tmp_path / "trap"
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text()) | {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
        (source / name).write_text(json.dumps(content))
    (source / "code.py").write_text(f"open({str(trap)!r}, 'w')")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    place = tmp_path / "new"
    assert convert(source, place).code == 0
    assert not trap.exists() and not (place / "code.py").exists() and not list(place.glob("**/*.safetensors"))
    assert (place / "additional_chat_templates/tools.jinja").read_text() == "{{ tools }}"
    assert json.loads((place / "spec.json").read_text())["source"] == {"name": str(source), "revision": None}
    same(load.load_model(place)[1], load.load_model(source)[1])
    only(tmp_path, "source", "new")


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_tokenizer_survives(source: Path, tmp_path: Path, convert: Callable[..., Run], kind: str) -> None:
    for file in (golden.TOKENIZERS / "byte-level").iterdir():
        (source / file.name).unlink()
    shutil.copytree(golden.TOKENIZERS / kind, source, dirs_exist_ok=True)
    assert convert(source, tmp_path / "new").code == 0
    content = json.loads((golden.TOKENIZERS / "expected.json").read_text())[kind]
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in content["texts"]:
        assert tokenizer(text["text"]).input_ids == text["ids"]
    rendered = tokenizer.apply_chat_template(content["messages"], tokenize=False, add_generation_prompt=True)
    assert rendered == content["rendered"]


# --- what it refuses, and when --------------------------------------------------------------------------------------

# Fails as soon as anything imports jax.
TRIPWIRE = """
import sys
class Tripwire:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("jax", "jaxlib", "flax", "orbax"), name
sys.meta_path.insert(0, Tripwire())
from jaxserve.cli import main
sys.exit(main(sys.argv[1:]))
"""


def before_jax(*args: str | Path) -> Run:
    command = [sys.executable, "-c", TRIPWIRE, "convert", *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    return Run(result.returncode, result.stdout, result.stderr)


def test_wrong_paths_and_flags_before_jax(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "new"
    user_error(before_jax(tmp_path / "absent", place), "does not exist", "absent")
    user_error(before_jax(source, tmp_path / "no/where/new"), "does not exist", "no/where")
    user_error(before_jax(source, tmp_path), "exists and is not a converted model")
    wrong = before_jax(source, place, "--dtype", "int4")
    assert wrong.code == 2 and "bfloat16" in wrong.err and "Traceback" not in wrong.err
    (source / "config.json").write_text('{"architectures": ["NewForCausalLM"], "model_type": "new"}')
    user_error(before_jax(source, place), "'NewForCausalLM' is not supported  hint: supported: ", "LlamaForCausalLM")
    only(tmp_path, "source")


def test_help_is_quick() -> None:
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run([*COMMANDS[1], "--help"], capture_output=True, text=True, check=True, timeout=180)
        times.append(time.perf_counter() - start)
    assert "SRC DST" in result.stdout and "--overwrite" in result.stdout
    assert min(times) < 0.5


def test_destination_is_never_lost(source: Path, tmp_path: Path, convert: Callable[..., Run]) -> None:
    place = tmp_path / "new"
    place.mkdir()
    assert convert(source, place).code == 0  # an empty folder is as good as none
    before = json.loads((place / "spec.json").read_text())
    user_error(convert(source, place), "exists", "--overwrite")
    assert convert(source, place, "--overwrite", "--dtype", "bfloat16").code == 0
    only(tmp_path, "source", "new")
    same(load.load_model(place, dtype="bfloat16")[1], load.load_model(source, dtype="bfloat16")[1])
    before["spec"]["dtype"] = "bfloat16"
    assert json.loads((place / "spec.json").read_text()) == before

    for name in ("someone", "file", "link"):
        other = tmp_path / name
        if name == "someone":
            other.mkdir()
            (other / "thesis.tex").write_text("x")
        elif name == "file":
            other.write_text("x")
        else:
            other.symlink_to(place)
        for flags in ([], ["--overwrite"]):
            user_error(convert(source, other, *flags), "exists")
    assert (tmp_path / "someone/thesis.tex").exists()
    only(tmp_path, "source", "new", "someone", "file", "link")


def test_a_failed_replacement_keeps_the_old_folder(
    source: Path, tmp_path: Path, convert: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "new"
    assert convert(source, place).code == 0

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Reader, "fill", broken)
    user_error(convert(source, place, "--overwrite"), "cannot write", "(input/output error)")
    only(tmp_path, "source", "new")
    load.open_model(place)


def test_other_files_are_never_lost(source: Path, tmp_path: Path, convert: Callable[..., Run]) -> None:
    place, beside = tmp_path / "new", tmp_path / "new.replaced"
    assert convert(source, place).code == 0
    beside.mkdir()
    (beside / "thesis.tex").write_text("x")
    user_error(convert(source, place, "--overwrite"), "cannot write", "(directory not empty)")
    assert (beside / "thesis.tex").exists()
    load.open_model(place)
    shutil.rmtree(beside)
    shutil.copytree(place, beside)  # as a replacement leaves it that dies between its two renames
    assert convert(source, place, "--overwrite").code == 0
    only(tmp_path, "source", "new")


# --- when it is cut short -------------------------------------------------------------------------------------------

STOPS = """
import sys, time
from convert.files.reader import Reader
from jaxserve.cli import main
fill, calls = Reader.fill, []
def slow(self, copies):
    calls.append(fill(self, copies))
    if len(calls) == 5:
        print("half way", flush=True)
        time.sleep(60)
Reader.fill = slow
main(sys.argv[1:])
"""


def test_killed_half_way(source: Path, tmp_path: Path, convert: Callable[..., Run]) -> None:
    place = tmp_path / "new"
    command = [sys.executable, "-c", STOPS, "convert", str(source), str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "half way\n"
        user_error(convert(source, place), "another conversion is writing", "wait until it ends")
        process.kill()
    only(tmp_path, "source", "new.converting")
    assert convert(source, place).code == 0
    only(tmp_path, "source", "new")
    same(load.load_model(place)[1], load.load_model(source)[1])


def test_existing_destinations(source: Path, tmp_path: Path, convert: Callable[..., Run]) -> None:
    (tmp_path / "new.converting").mkdir()
    (tmp_path / "new.converting/thesis.tex").write_text("x")
    user_error(convert(source, tmp_path / "new"), "new.converting exists and was not created by a conversion")
    assert (tmp_path / "new.converting/thesis.tex").exists()


def test_ctrl_c(source: Path, tmp_path: Path, convert: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Reader, "fill", interrupted)
    assert convert(source, tmp_path / "new") == (130, "", "")
    only(tmp_path, "source")


def test_no_room(source: Path, tmp_path: Path, convert: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, used=10**6, free=1000))
        user_error(convert(source, tmp_path / "new"), "needs 1 MB, but its disk has 0 MB free")
    only(tmp_path, "source")


# What tensorstore and the system say when a disk is full: files here cannot grow beyond 20 kB.
SMALL_FILES = """
import resource, signal, sys
from jaxserve.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


def test_a_write_that_fails(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SMALL_FILES, "convert", str(source), str(tmp_path / "new")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    user_error(Run(result.returncode, result.stdout, result.stderr), "cannot write", "(file too large)")
    only(tmp_path, "source")


def test_a_full_disk_is_reported_as_such(tmp_path: Path) -> None:
    for error in (
        OSError(errno.ENOSPC, "x"),
        ValueError("RESOURCE_EXHAUSTED: ...: No space left on device [os_error_code='28']"),
    ):
        with (
            pytest.raises(output.CheckpointError, match=r"the disk of .* is full; free disk space"),
            orbax._explained(tmp_path),  # pyright: ignore[reportPrivateUsage]
        ):
            raise error


# --- from the hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with Hub().running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
        huggingface_hub.close_session()


def test_from_the_hub(hub: Hub, source: Path, tmp_path: Path, convert: Callable[..., Run]) -> None:
    commit = hub.commit("org/tiny", {path.name: path.read_bytes() for path in source.iterdir()}, ref="v1")
    hub.commit("org/tiny", {"config.json": b"{}"})
    place = tmp_path / "new"
    assert convert("org/tiny", place, "--revision", "v1").code == 0
    assert json.loads((place / "spec.json").read_text())["source"] == {"name": "org/tiny", "revision": commit}
    same(load.load_model(place)[1], load.load_model(source)[1])
    asked = len(hub.asked)
    assert convert("org/tiny", tmp_path / "again", "--revision", "v1", "--offline").code == 0
    assert len(hub.asked) == asked


def test_weights_of_unsupported_models_are_not_downloaded(
    hub: Hub, source: Path, tmp_path: Path, convert: Callable[..., Run]
) -> None:
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    config = golden.read(CASE).config
    for change, complaint in (
        ({"architectures": ["NewForCausalLM"]}, "'NewForCausalLM' is not supported  hint: supported: "),
        ({"quantization_config": {"quant_method": "torchao"}}, "is quantized"),
    ):
        hub.commit("org/tiny", files | {"config.json": json.dumps(config | change).encode()})
        user_error(convert("org/tiny", tmp_path / "new"), complaint)
    assert not [name for name in hub.bodies() if name.endswith(".safetensors")]


# --- the bar --------------------------------------------------------------------------------------------------------

BAR = """
from convert.files import progress
with progress.bar("converting", 2 * 10**9) as reported:
    for _ in range(10):
        reported(2 * 10**8)
"""


def test_the_progress_bar_needs_a_terminal() -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-c", BAR]
    subprocess.run(command, stderr=theirs, check=True, timeout=180)
    shown = os.read(ours, 10_000).decode()
    os.close(theirs)
    os.close(ours)
    assert re.search(r"converting: 100%\|.*\| 2\.00G/2\.00G \[.*B/s\]", shown), shown
    result = subprocess.run(command, capture_output=True, check=True, timeout=180)
    assert (result.stdout, result.stderr) == (b"", b"")
