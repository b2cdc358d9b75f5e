# SPDX-License-Identifier: Apache-2.0
"""`jaxserve convert --quantize`: values by the formulas and unpackers of other tests, and the files beside the weights.

tests/golden/check_converted.py has compressed-tensors and transformers read such checkpoints.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert import load
from convert.files import shards
from jaxserve import cli
from jaxserve.models import online, param_layout
from jaxserve.quant.scheme import Rounding
from tests.golden import load as golden
from tests.quant import toy, unpackers
from tests.quant.test_formats import dense
from tests.quant.test_online import nearest, steps

ROUNDINGS: dict[str, Rounding] = {
    "int8": "rows",
    "int8_per_channel_weight_only": "rows",
    "int4": "groups",
    "fp8": "float8_tensor",
    "fp8_per_channel": "float8_rows",
    "fp8_per_block": "float8_blocks",
}


def like(name: str) -> online.Online:
    """The same method while loading, which scales columns too under int8."""
    wanted = "int8_per_channel_weight_only" if name == "int8" else name
    return next(each for each in online.ONLINE if each == wanted)


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Path]:
    def run(source: Path, *words: str, fails: bool = False) -> Any:
        capsys.readouterr()
        code = cli.main(["convert", str(source), str(tmp_path / "out"), *words])
        said = capsys.readouterr()
        assert bool(code) == fails, said.err
        return said.err if fails else tmp_path / "out"

    return run


def source_of(case: str, folder: Path) -> Path:
    return golden.write_checkpoint(case, folder / case, dtype="bfloat16", shards=2)


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("case", ["llama-gqa-tied", "qwen3-moe"])
def test_values_are_the_nearest_of_the_formula(
    tmp_path: Path, convert: Callable[..., Path], name: str, case: str
) -> None:
    if case == "qwen3-moe" and name not in ("int4", "fp8"):
        pytest.skip("one method of integers and one of floats are enough for experts")
    out, content, how = convert(source_of(case, tmp_path), "--quantize", name), golden.read(case), ROUNDINGS[name]
    found = unpackers.plain(out)
    assert found.keys() == content.tensors.keys()
    for tensor, shape in content.tensors.items():
        weight = content.tensor(tensor).astype(ml_dtypes.bfloat16)
        plain = "embed" in tensor or "lm_head" in tensor or "norm" in tensor or tensor.endswith("mlp.gate.weight")
        if plain or len(shape) < 2:
            np.testing.assert_array_equal(found[tensor], weight.astype(np.float64))
            continue
        group = 64 if shape[1] == 64 and "o_proj" not in tensor else 32
        step, wanted, exact = steps(how, weight, group), nearest(how, weight, group), weight.astype(np.float64)
        off = np.abs(np.abs(found[tensor] - exact) - np.abs(wanted - exact))
        assert (off <= 1e-4 * step + 1e-6 * np.abs(exact)).all(), tensor


@pytest.mark.parametrize("name", ROUNDINGS)
def test_our_loader_reads_what_it_rounds_itself(tmp_path: Path, convert: Callable[..., Path], name: str) -> None:
    source = source_of("llama-gqa-tied", tmp_path)
    converted = load.open_model(convert(source, "--quantize", name)).in_dtype("float32")
    rounded = load.open_model(source).in_dtype("float32").quantized(like(name))
    wanted = dense(rounded.spec, load.read(rounded))
    found = dense(converted.spec, load.read(converted))
    assert found and found.keys() == {path for path in wanted if path.startswith("layers")}
    for path, values in found.items():
        np.testing.assert_array_equal(values, wanted[path], err_msg=path)


def test_matrices_that_the_checkpoint_fuses(tmp_path: Path, convert: Callable[..., Path]) -> None:
    source = source_of("phi3", tmp_path)
    converted = load.open_model(convert(source, "--quantize", "int4")).in_dtype("float32")
    rounded = load.open_model(source).in_dtype("float32").quantized("int4")
    wanted = dense(rounded.spec, load.read(rounded))
    for path, values in dense(converted.spec, load.read(converted)).items():
        np.testing.assert_array_equal(values, wanted[path], err_msg=path)


def test_the_config_and_the_other_files(tmp_path: Path, convert: Callable[..., Path]) -> None:
    source = source_of("llama-gqa-tied", tmp_path)
    shutil.copytree(golden.TOKENIZERS / "byte-level", source, dirs_exist_ok=True)
    out = convert(source, "--quantize", "int4", "--dtype", "float16")
    config = json.loads((out / "config.json").read_text())
    settings = config.pop("quantization_config")
    groups = list(settings["config_groups"].values())
    assert {group["weights"]["group_size"] for group in groups} == {
        32,
        64,
    }  # 96 columns, or 64; attention output has heads of 16 columns
    assert [group["weights"]["symmetric"] for group in groups] == [False, False]
    assert set(settings["ignore"]) == {"lm_head", "model.embed_tokens"}
    those = [f"re:model\\.layers\\.\\d+\\.{name}$" for name in ("mlp\\.down_proj", "self_attn\\.o_proj")]
    assert [group["targets"] for group in groups if group["weights"]["group_size"] == 32] == [those]
    assert config == {**golden.config("llama-gqa-tied"), "torch_dtype": "float16"} | (
        {"dtype": "float16"} if "dtype" in config else {}
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert unpackers.read(out)["model.norm.weight"].dtype == np.float16
    about = json.loads((out / "jaxserve.json").read_text())
    assert about["quantize"] == "int4" and about["source"]["name"] == str(source)
    one = convert(source, "--quantize", "fp8", "--overwrite")
    [group] = json.loads((one / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["input_activations"]["strategy"] == "token"


def test_large_models_have_several_files(
    tmp_path: Path, convert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("llama-gqa-tied", tmp_path)
    whole = convert(source, "--quantize", "int4")
    wanted = dense(load.open_model(whole).spec, load.load_model(whole)[1])
    monkeypatch.setattr(shards, "SHARD", 10_000)
    several = convert(source, "--quantize", "int4", "--overwrite")
    index = json.loads((several / "model.safetensors.index.json").read_text())
    files = {*index["weight_map"].values()}
    assert len(files) > 3 and all((several / name).stat().st_size < 25_000 for name in files)
    for path, values in dense(load.open_model(several).spec, load.load_model(several)[1]).items():
        np.testing.assert_array_equal(values, wanted[path])


def test_what_cannot_be_written_is_refused(tmp_path: Path, convert: Callable[..., Any]) -> None:
    quantized, plain = toy.write(tmp_path / "toy", "llama-mha", ignore=("lm_head",))
    assert "already quantized  hint: name the plain one" in convert(quantized, "--quantize", "int4", fails=True)
    converted = convert(plain)
    shutil.move(converted, tmp_path / "orbax")
    problem = convert(tmp_path / "orbax", "--quantize", "int4", fails=True)
    assert "is a converted model" in problem and "name the model that it was converted from" in problem
    for case in ("gpt2", "gpt-oss"):  # outputs last; experts in one tensor
        problem = convert(source_of(case, tmp_path), "--quantize", "int4", fails=True)
        assert "is not one matrix with an output in each row" in problem and "--quantization" in problem
    assert not (tmp_path / "out").exists()
    assert "--quantize is 'int3'" in convert(plain, "--quantize", "int3", fails=True)


def test_only_what_a_conversion_wrote_is_replaced(tmp_path: Path, convert: Callable[..., Any]) -> None:
    source = source_of("llama-gqa-tied", tmp_path)
    out = convert(source, "--quantize", "int4")
    assert "already exists" in convert(source, "--quantize", "fp8", fails=True)
    convert(source, "--quantize", "fp8", "--overwrite")
    (out / "jaxserve.json").write_text("{}")
    assert "is not a converted model" in convert(source, "--quantize", "fp8", "--overwrite", fails=True)


def test_paths_are_of_layers_alone(tmp_path: Path, convert: Callable[..., Path]) -> None:
    spec = load.open_model(convert(source_of("qwen3-moe", tmp_path), "--quantize", "int4")).spec
    paths = {path for path, _ in param_layout.leaves(param_layout.abstract_public(spec)) if spec.scheme_of(path[:-1])}
    assert paths and all(path[0] == "layers" and "router" not in path for path in paths)
