# SPDX-License-Identifier: Apache-2.0
"""`jaxserve run`: settings from flags and files, and the errors that are found before anything heavy is imported."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from jaxserve import cli, demo, unsupported
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineError
from jaxserve.server import lifecycle
from jaxserve.server.config import ServerConfig
from jaxserve.server.http.api_keys import KeyRing
from tests.cli.conftest import Command, Said, Served, one_error
from tests.golden import load as golden

# --- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EngineConfig, ServerConfig])
def test_every_setting_is_a_flag_in_a_group_with_help(kind: Any) -> None:
    flags = {flag.name: flag for flag in cli.parser_of("run").flags}
    for name in [field.name for field in fields(kind)]:
        assert flags[name].help.endswith(".") and flags[name].group not in ("", "Options"), name
        assert flags[name].option == "--" + name.replace("_", "-")


def test_no_spelling_has_two_meanings() -> None:
    for name in cli.COMMANDS:
        options = [option for flag in cli.parser_of(name).flags for option in flag.options if flag.is_option]
        assert len(options) == len(set(options)), name


def test_unsupported_flags_are_not_also_supported() -> None:
    flags = cli.parser_of("run").flags
    assert not {flag.name for flag in flags} & unsupported.SETTINGS.keys()
    assert not {option for flag in flags for option in flag.options} & unsupported.SHORT_FLAGS.keys()


def test_every_flag_of_every_command_has_help() -> None:
    for name in cli.COMMANDS:
        assert all(flag.help for flag in cli.parser_of(name).flags), name


def test_flags_reach_their_settings(
    command: Command, served: Served, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    said = command(
        *("serve", model, "-tp", "2", "--max_model_len", "64", "--no-enable-prefix-caching", "--port", "0"),
        *("--kv-cache-memory-bytes", "1G", "--served-model-name", "a", "b", "--api-key", "k1", "--api-key=k2"),
        *("--num-gpu-blocks-override=none", "--disable-log-stats", "--request-timeout", "2.5"),
    )
    assert said.code == 7, said
    engine, server = served.engine, served.server
    assert (engine.model, engine.tensor_parallel_size, engine.max_model_len) == (str(model), 2, 64)
    assert (engine.enable_prefix_caching, engine.kv_cache_memory_bytes, engine.num_blocks) == (False, 2**30, None)
    assert (server.port, server.served_model_name, server.api_key) == (0, ("a", "b"), ("k1", "k2"))
    assert (server.disable_log_stats, server.request_timeout) == (True, 2.5)


def test_the_first_lines_of_output(command: Command, served: Served, model: Path) -> None:
    said = command("run", model, "--port", "0", "--api-key", "hunter2", "--max-num-seqs", "4", "--host", "127.0.0.1")
    assert said.out == ""
    first, second = said.err.splitlines()
    assert first == f"jaxserve 0.1.0  model {model}"
    assert second == f"settings: model={model}  max_num_seqs=4  port=0  api_key=***"


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        (["--enable-chunked-prefill"], ["--enable-chunked-prefill has no effect: prompts are always processed in"]),
        (["--enable_chunked_prefill=True"], ["--enable_chunked_prefill has no effect: prompts are always"]),
        (["--disable-log-requests"], ["--disable-log-requests has no effect: their parameters are logged only with"]),
        (["-pp", "1", "--data-parallel-size=1"], ["-pp has no effect: this is", "--data-parallel-size has no effect"]),
        (
            ["--guided-decoding-backend", "auto", "--load-format", "auto", "--tokenizer-mode", "auto"],
            ["--guided", "--load", "--tok"],
        ),
        (
            ["--trust-remote-code"],
            ["--trust-remote-code has no effect: code that comes with a checkpoint is never run"],
        ),
        (["--enforce-eager", "--seed", "0"], ["--enforce-eager has no effect"]),
        (["--no-enforce-eager", "--no-enable-lora"], ["--no-enforce-eager has no", "--no-enable-lora has no"]),
        (["--limit-mm-per-prompt", '{"image": 0, "video": 0}'], ["--limit-mm-per-prompt has no effect: models read"]),
        (["--limit-mm-per-prompt", "image=0,video=0"], ["--limit-mm-per-prompt has no effect"]),
        (["--swap-space", "0", "--cpu-offload-gb=0"], ["--swap-space has no effect", "--cpu-offload-gb has no"]),
        (["--task", "generate"], ["--task has no effect"]),
        (
            ["--runner", "pooling", "--convert", "embed"],
            ["--runner has no effect: every route", "--convert has no effect"],
        ),
        (["--no-enable-expert-parallel=true"], ["--no-enable-expert-parallel has no effect"]),
    ],
)
def test_flags_that_ask_for_what_is_so_anyway(
    command: Command, served: Served, model: Path, words: list[str], notes: list[str]
) -> None:
    said = command("run", *words, model, "--port", "0")
    assert said.code == 7, said
    assert served.engine.model == str(model)
    lines = [line for line in said.err.splitlines() if line.startswith("note: ")]
    assert len(lines) == len(notes)
    for line, note in zip(lines, notes, strict=True):
        assert line.startswith(f"note: {note}")


def test_such_settings_in_a_file(command: Command, served: Served, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "enable-chunked-prefill: true\nno-enable-lora: true\nswap_space: 0\nlimit-mm-per-prompt: {image: 0}\n"
    )
    said = command("run", model, "--port", "0", "--config", file)
    assert said.code == 7 and said.err.count("note: ") == 4, said


def test_other_commands_take_them_too(command: Command, model: Path) -> None:
    said = command("check", model, "--trust-remote-code", "--dtype", "half")
    assert said.code == 0 and said.err.startswith("note: --trust-remote-code has no effect"), said


def test_every_flag_without_effect_has_a_reason_to_be_refused() -> None:
    """For its other values."""
    assert unsupported.NO_EFFECT.keys() <= unsupported.SETTINGS.keys()
    assert set(unsupported.SHORT_FLAGS.values()) <= unsupported.SETTINGS.keys()


def test_other_names_of_dtypes(command: Command, served: Served, model: Path) -> None:
    for name, dtype in (("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16")):
        assert command("run", model, "--port", "0", "--dtype", name).code == 7
        assert served.engine.dtype == dtype


def test_the_form_of_vllms_module(
    command: Command, served: Served, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["openai_api_server", "--model", str(model), "--port", "0"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("jaxserve.openai_api_server", run_name="__main__")
    assert end.value.code == 7 and served.engine.model == str(model)


def test_the_demo_is_the_default(command: Command, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.cli.preflight.check_model", lambda _: None)
    assert command("run", "--port", "0").err.startswith("jaxserve 0.1.0  model demo\n")
    assert served.engine.model == str(demo.FOLDER)
    assert served.server.served_model_name == ("demo",)


def test_a_key_file_may_be_a_pipe(command: Command, served: Served, model: Path) -> None:
    """As a shell's <(command) is: it can be read once, which the server does."""
    reader, writer = os.pipe()
    try:
        os.write(writer, b"sk-piped name=me\n")
        os.close(writer)
        assert command("run", model, "--port", "0", "--api-key-file", f"/dev/fd/{reader}").code == 7
        assert served.server.api_key_file == f"/dev/fd/{reader}"
        assert [key.name for key in KeyRing(served.server.keys()).keys] == ["me"]
    finally:
        os.close(reader)


# --- the configuration file -----------------------------------------------------------------------------------------


def test_flag_before_file_before_environment_and_default(
    command: Command, served: Served, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {model}\nport: 0\nmax-model-len: 32\nmax_num_seqs: 1k\nno-warmup: true\napi-key: [a, b]\n"
        "tensor-parallel-size: 2\nseed: 3\n"
    )
    command("run", "--config", file, "--max-model-len", "64", "--seed", "0")
    engine, server = served.engine, served.server
    assert (engine.max_model_len, engine.max_num_seqs, engine.seed) == (64, 1000, 0)
    assert (engine.warmup, engine.tensor_parallel_size, engine.block_size) == ("none", 2, 16)
    assert server.api_key == ("a", "b")
    monkeypatch.setenv("JAXSERVE_API_KEY", "x,y")
    command("run", "--config", file)
    assert served.server.api_key == ("a", "b")
    command("run", model, "--port", "0")
    assert served.server.api_key == ("x", "y")


@pytest.mark.parametrize(
    ("line", "warmup"),
    [("warmup: true", "all"), ("warmup: all", "all"), ("no-warmup: false", "all"), ("warmup: off", "none")],
)
def test_spellings_of_warmup(
    command: Command, served: Served, model: Path, tmp_path: Path, line: str, warmup: str
) -> None:
    (tmp_path / "config.yaml").write_text(line)
    command("run", model, "--port", "0")
    assert served.engine.warmup == "staged"
    command("run", model, "--port", "0", "--config", tmp_path / "config.yaml")
    assert served.engine.warmup == warmup
    command("run", model, "--port", "0", "--config", tmp_path / "config.yaml", "--no-warmup")
    assert served.engine.warmup == "none"
    assert EngineConfig(model="x", warmup=True).warmup == "all"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("max-modle-len: 5", ("unknown setting max-modle-len", "did you mean max-model-len?")),
        ("kv_cache_dtype: fp4", ("--kv-cache-dtype is 'fp4'",)),
        ("pipeline-parallel-size: 2", ("--pipeline-parallel-size is not supported yet",)),
        ("enable-chunked-prefill: false", ("--enable-chunked-prefill is not needed",)),
        ("port: [1, 2]", ("--port is [1, 2]",)),
        ("port: yes", ("--port is True",)),
        ("warmup: 3", ("--warmup is 3",)),
        ("no-warmup: staged", ("--no-warmup is 'staged'",)),
        ("dtype: bf16", ("--dtype is 'bf16'",)),
        ("- a", ("contains no settings",)),
        ("a: [", ("is not valid YAML",)),
        ("config: b.yaml", ("config names another configuration file",)),
        ("port: 1\nport_: 2", ("unknown setting port_", "did you mean port?")),
        ("max-num-seqs: 5\nmax_num_seqs: 6", ("is given twice",)),
        ("port: 99999", ("--port is 99999",)),
    ],
)
def test_wrong_files(command: Command, tmp_path: Path, content: str, parts: tuple[str, ...]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    one_error(command("run", "x", "--config", file), 2, *parts)


def test_no_such_file(command: Command, tmp_path: Path) -> None:
    one_error(command("run", "--config", tmp_path / "absent"), 2, "absent", "No such file")
    (tmp_path / "empty.yaml").write_text("")
    one_error(command("run", "--config", tmp_path / "empty.yaml", "--seed", "x"), 2, "--seed")


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--max-modle-len", "5"], ("unknown option --max-modle-len", "did you mean --max-model-len?")),
        (["--speculative-config", "{}"], ("--speculative-config is not supported yet",)),
        (
            ["--quantization", "torchao"],
            ("--quantization is 'torchao'", "choose one of int8, int8_per_channel_weight_only, int4, fp8, "),
        ),
        (["--speculative-config={}"], ("--speculative-config is not supported yet",)),
        (["-pp", "2"], ("-pp (--pipeline-parallel-size) is not supported yet",)),
        (["--no_enable_chunked_prefill"], ("--no-enable-chunked-prefill is not needed: prompts",)),
        (["--pipeline-parallel-size", "2"], ("--pipeline-parallel-size is not supported yet",)),
        (["--pipeline-parallel-size=2"], ("--pipeline-parallel-size is not supported yet",)),
        (["-dp"], ("-dp (--data-parallel-size) is not supported yet",)),
        (["--swap-space", "4"], ("--swap-space is not supported", "recomputed")),
        (["--kv-cache-dtype", "fp4"], ("--kv-cache-dtype is 'fp4'", "choose one of auto, bfloat16")),
        (["--load-format", "dummy"], ("--load-format is not supported",)),
        (["--limit-mm-per-prompt", '{"image": 1}'], ("--limit-mm-per-prompt is not supported yet",)),
        (["--enable-lora"], ("--enable-lora is not supported yet",)),
        (["-O3"], ("-O3 (--optimization-level) is not supported yet",)),
        (["-O.level=3"], ("-O.level (--optimization-level) is not supported yet",)),
        (["-cc.mode=3"], ("-cc.mode (--compilation-config) is not supported yet",)),
        (["--compilation-config.level", "3"], ("--compilation-config.level is not supported yet",)),
        (["--generation-config", "/absent"], ("--generation-config is '/absent'", "generation_config.json")),
        (["--root-path", "llm"], ("--root-path is 'llm', not a path",)),
        (["--disable-access-log-for", "health"], ("--disable-access-log-for has 'health', not a path",)),
        (["--block-size", "7"], ("--block-size is 7, below the minimum of 8", "256")),
        (["--block-size", "24"], ("--block-size is 24, not a power of two", "256")),
        (["--gpu-memory-utilization", "1.5"], ("--gpu-memory-utilization is 1.5, above the maximum of 1",)),
        (["--port", "70000"], ("--port is 70000, above the maximum of 65535", "from 0 to 65535")),
        (["--num-blocks", "9", "--kv-cache-memory-bytes", "1G"], ("--num-blocks and --kv-cache-memory-bytes",)),
        (["--max-num-seqs", "9", "--max-num-batched-tokens", "8"], ("--max-num-batched-tokens is 8",)),
        (["--model", "y"], ("MODEL is given twice: x and --model y",)),
        (["--ssl-keyfile", "k"], ("--ssl-keyfile requires --ssl-certfile",)),
        (["--port", "x"], ("--port is 'x'",)),
        (["--help=nonsense"], ("no help on 'nonsense'",)),
    ],
)
def test_wrong_flags(command: Command, words: list[str], parts: tuple[str, ...]) -> None:
    one_error(command("run", "x", *words), 2, *parts)


def test_port_in_use(command: Command, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one_error(command("run", model, "--port", str(port)), 1, f"port {port} is already in use", "--port")


def test_certificates(command: Command, tmp_path: Path) -> None:
    one_error(command("run", "x", "--ssl-certfile", tmp_path / "absent"), 1, "certificate", "absent")
    (tmp_path / "junk.pem").write_text("junk")
    one_error(command("run", "x", "--ssl-certfile", tmp_path / "junk.pem"), 1, "certificate")


@pytest.mark.parametrize("name", ["/absent/x", "./absent", "~/absent", "a/b/c", "bad name"])
def test_no_such_model(command: Command, name: str) -> None:
    one_error(command("run", name, "--port", "0"), 1, name, "org/name")


def broken(command: Command, folder: Path, *words: str) -> Said:
    return command("run", folder, "--port", "0", *words)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "copy")


def test_broken_models(command: Command, copy: Path) -> None:
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(b"junk" * 100)
    one_error(broken(command, copy), 1, "model.safetensors")
    weights.write_bytes(data[:-10])
    one_error(broken(command, copy), 1, "model.safetensors")
    weights.unlink()
    one_error(broken(command, copy), 1, "safetensors")
    weights.write_bytes(data)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["Novel"]}))
    one_error(broken(command, copy), 1, "'Novel' is not supported")
    (copy / "config.json").unlink()
    one_error(broken(command, copy), 1, "no config.json")


def test_missing_tokenizer(command: Command, copy: Path, served: Served) -> None:
    (copy / "tokenizer.json").unlink()
    one_error(broken(command, copy), 1, "has no tokenizer", "--skip-tokenizer-init")
    one_error(broken(command, copy, "--tokenizer", "/absent"), 1, "no such folder: /absent")
    assert broken(command, copy, "--skip-tokenizer-init").code == 7
    assert broken(command, copy, "--tokenizer", str(golden.TOKENIZERS / "byte-level")).code == 7


def test_internal_errors_are_one_line_without_debug(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise KeyError("x\ny")

    monkeypatch.delenv("JAXSERVE_DEBUG", raising=False)
    monkeypatch.setattr(lifecycle, "serve", fails)
    said = command("run", model, "--port", "0")
    assert said.code == 1 and "error: KeyError: 'x\\ny'" in said.err and "Traceback" not in said.err
    for words in (("--debug", "run", model, "--port", "0"), ("run", model, "--port", "0", "--debug")):
        monkeypatch.setenv("JAXSERVE_DEBUG", "")
        said = command(*words)
        assert said.code == 1 and "Traceback" in said.err and "error: KeyError" in said.err


def test_errors_import_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from jaxserve.cli import main\n"
        "assert main(sys.argv[1:]) in (1, 2)\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'transformers'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    words = ["run", "/absent", "--port", "0"]
    result = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("error: folder '/absent' does not exist") and result.stderr.count("\n") == 1


def test_a_length_that_is_too_long_is_found_without_jax(model: Path) -> None:
    script = "import sys; from jaxserve.cli import main; code = main(sys.argv[1:]); assert 'jax' not in sys.modules; "
    words = ["run", str(model), "--port", "0", "--max-model-len", "1M"]
    ask = [sys.executable, "-c", script + "sys.exit(code)", *words]
    result = subprocess.run(ask, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stderr
    assert (
        result.stderr
        == "error: --max-model-len is 1048576, above the model's limit of 128  hint: lower it to 128 or less\n"
    )


def test_help(command: Command) -> None:
    few, everything = command("run", "--help"), command("run", "--help=all")
    assert few.code == everything.code == 0
    assert "--max-model-len N" in few.out and "--header-timeout" not in few.out and "--help=all" in few.out
    flags = cli.parser_of("run").flags
    assert all(flag.shown in everything.out or flag.option[5:] in everything.out for flag in flags)
    group = command("run", "--help=security").out
    assert "--api-key" in group and "--port" not in group


def test_errors_of_the_engine_name_flags(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise EngineError("no memory for /x/num_blocks/y and max_model_len 5", "lower max_num_seqs.")

    monkeypatch.setattr(lifecycle, "serve", fails)
    said = command("run", model, "--port", "0")
    last = said.err.splitlines()[-1]
    assert said.code == 1
    assert last == "error: no memory for /x/num_blocks/y and --max-model-len 5  hint: lower --max-num-seqs."
