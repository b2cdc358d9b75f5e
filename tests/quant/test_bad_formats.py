# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints that are refused: one line that names the file, the tensor and what was expected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import load
from jaxserve.errors import CheckpointError, JaxserveError
from tests.golden import load as golden
from tests.quant import unpackers

DATA = golden.DATA / "quantized"
UP = "model.layers.0.mlp.up_proj."

type Edit = Callable[[np.ndarray], np.ndarray]


def edited(folder: Path, case: str, tensors: dict[str, Edit | None], settings: dict[str, Any]) -> Path:
    """A golden checkpoint with other tensors (None: without them) and other settings."""
    shutil.copytree(DATA / case, folder / case)
    place = folder / case
    held = unpackers.read(place)
    for name, edit in tensors.items():
        old = held.pop(name)
        if edit is not None:
            held[name] = edit(old)
    unpackers.write(place, held)
    content = json.loads((place / "config.json").read_text())
    if "quantization_config" in content:
        content["quantization_config"] |= settings
    (place / "config.json").write_text(json.dumps(content))
    return place


def with_value(value: float, at: int = 0) -> Edit:
    def edit(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[at] = value
        return array

    return edit


WRONG: dict[str, tuple[str, dict[str, Edit | None], dict[str, Any], str]] = {
    "AWQ without a part of its scales": (
        "awq-32",
        {UP + "scales": lambda array: array[:1]},
        {},
        f"model.safetensors: tensor '{UP}scales' has shape [1, 64], expected [2, 64]",
    ),
    "AWQ with too few zero points": (
        "awq-32",
        {UP + "qzeros": lambda array: array[:, 1:]},
        {},
        f"tensor '{UP}qzeros' has shape [2, 7], expected [2, 8]",
    ),
    "AWQ without zero points": ("awq-32", {UP + "qzeros": None}, {}, f"tensor '{UP}qzeros' is missing"),
    "a group size that does not divide": (
        "awq-32",
        {},
        {"group_size": 48},
        "has 64 columns, expected a multiple of the group size 48",
    ),
    "a scale that is not a number": (
        "awq-32",
        {UP + "scales": with_value(np.nan, 5)},
        {},
        f"tensor '{UP}scales' has values that are not finite, expected scales",
    ),
    "scales of zero": ("gptq-4", {UP + "scales": np.zeros_like}, {}, f"tensor '{UP}scales' is zero, expected scales"),
    "another number of bits": (
        "gptq-4",
        {},
        {"bits": 8},
        "'model.layers.0.self_attn.q_proj.scales' has shape [2, 64], expected [1, 64]",
    ),
    "an unsupported number of bits": ("gptq-4", {}, {"bits": 5}, "by GPTQ with 5 bits, which is not supported"),
    "g_idx out of range": (
        "gptq-4-ordered",
        {UP + "g_idx": with_value(2, 9)},
        {},
        f"tensor '{UP}g_idx' has the group 2, expected 0 to 1",
    ),
    "g_idx below zero": (
        "gptq-4-ordered",
        {UP + "g_idx": with_value(-1)},
        {},
        f"tensor '{UP}g_idx' has the group -1, expected 0 to 1",
    ),
    "g_idx of fused layers that differ": (
        "gptq-4-ordered",
        {UP + "g_idx": lambda array: array[::-1]},
        {},
        "layers.0.mlp.up.kernel.order differs from that of the weights it is fused with",
    ),
    "a layout for other kernels": ("gptq-4", {}, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "AWQ for other kernels": ("awq-32", {}, {"version": "gemv"}, "by AWQ with version 'gemv', which is not supported"),
    "packed for other columns": (
        "ct-w4a16",
        {UP + "weight_packed": lambda array: array[:, :-1]},
        {},
        f"tensor '{UP}weight_packed' has shape [64, 7], expected [64, 8] for 64 columns of 4 bits",
    ),
    "packed zero points of other rows": (
        "ct-w4a16-asymmetric",
        {UP + "weight_zero_point": lambda array: array[1:]},
        {},
        f"tensor '{UP}weight_zero_point' has shape [7, 2], expected [8, 2]",
    ),
    "a transform": ("ct-w4a16", {}, {"transform_config": {"config_groups": {}}}, "with transform_config"),
    "sparsity": ("ct-w4a16", {}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity"),
    "a format of another tool": ("ct-w4a16", {}, {"format": "marlin-24"}, "with format 'marlin-24'"),
    "an invalid pattern": ("ct-w4a16", {}, {"config_groups": {"g": {"targets": ["re:("]}}}, "invalid regular expr"),
    "a divisor of zero": (
        "ct-nvfp4",
        {UP + "weight_global_scale": np.zeros_like},
        {},
        f"tensor '{UP}weight_global_scale' is zero, expected scales",
    ),
    "float8 without scales": (
        "fp8-tensor",
        {UP + "weight_scale": None},
        {},
        f"tensor '{UP}weight' has no scales beside it, expected a tensor weight_scale",
    ),
    "scales of other blocks": (
        "fp8-block",
        {UP + "weight_scale_inv": lambda array: array[:, 1:]},
        {},
        f"tensor '{UP}weight_scale_inv' has shape [2, 3], expected scales: one value, or one for each row, or [2, 4]",
    ),
    "blocks that are none": ("fp8-block", {}, {"weight_block_size": 128}, "with weight_block_size 128"),
    "exponents of NaN": (
        "gpt-oss-mxfp4",
        {"model.layers.0.mlp.experts.down_proj_scales": with_value(255)},
        {},
        "'model.layers.0.mlp.experts.down_proj_scales' has the exponent 255, which stands for NaN",
    ),
    "MXFP4 of other blocks": (
        "gpt-oss-mxfp4",
        {"model.layers.0.mlp.experts.down_proj_scales": lambda array: array[..., 1:]},
        {},
        "down_proj_scales' has shape [4, 64, 2], expected [4, 64, 3]",
    ),
    "another algorithm": ("modelopt-nvfp4", {}, {"quant_algo": "W4A8_AWQ"}, "by ModelOpt with quant_algo 'W4A8_AWQ'"),
    "a table of other values": (
        "bnb-nf4",
        {UP + "weight.quant_map": with_value(-0.9)},
        {},
        f"tensor '{UP}weight.absmax' belongs to a quant_map with other values than those of nf4",
    ),
    "bytes of another shape": (
        "bnb-nf4",
        {UP + "weight": lambda array: array[1:]},
        {},
        f"tensor '{UP}weight' has shape [2047, 1], expected 2,048 bytes",
    ),
    "no description": (
        "bnb-nf4",
        {UP + "weight.quant_state.bitsandbytes__nf4": None},
        {},
        f"tensor '{UP}weight' has no description",
    ),
    "a description of nothing": (
        "bnb-nf4",
        {UP + "weight.quant_state.bitsandbytes__nf4": lambda array: array[:9]},
        {},
        "bitsandbytes__nf4' is not the JSON of a quantized matrix",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    case, tensors, settings, problem = WRONG[name]
    with pytest.raises(JaxserveError) as caught:
        load.load_model(edited(tmp_path, case, tensors, settings), dtype="float32")
    assert problem in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["torchao", "quark", "tea"])
def test_other_methods_are_refused_with_those_that_work(tmp_path: Path, method: str) -> None:
    folder = edited(tmp_path, "awq-32", {}, {"quant_method": method})
    with pytest.raises(CheckpointError, match=rf"{method}.*not supported.* awq, .*gptq"):
        load.open_model(folder)


def test_plain_weights_need_no_list(tmp_path: Path) -> None:
    """Which layers are plain is seen in the files."""
    folder = edited(tmp_path, "ct-mixed", {}, {"ignore": []})
    spec = load.open_model(folder).spec
    assert spec.scheme_of(("layers", 0, "attention", "out", "kernel")) is None
    assert spec.scheme_of(("layers", 0, "attention", "q", "kernel")) is not None


@pytest.mark.parametrize(("case", "file"), [("awq-32", "quant_config.json"), ("gptq-4", "quantize_config.json")])
def test_settings_may_be_in_a_file_of_their_own(tmp_path: Path, case: str, file: str) -> None:
    """As in old repositories, with the names of then."""
    shutil.copytree(DATA / case, tmp_path / case)
    config = json.loads((tmp_path / case / "config.json").read_text())
    settings = config.pop("quantization_config")
    if case == "awq-32":
        settings = dict(zero_point=True, q_group_size=32, w_bit=4, version="GEMM")
    settings.pop("quant_method", None)
    (tmp_path / case / "config.json").write_text(json.dumps(config))
    (tmp_path / case / file).write_text(json.dumps(settings))
    assert load.open_model(tmp_path / case).spec == load.open_model(DATA / case).spec


def test_plain_checkpoints_beside_a_stale_file_stay_plain(tmp_path: Path) -> None:
    folder = golden.write_checkpoint("llama-mha", tmp_path)
    (folder / "quantize_config.json").write_text(json.dumps(dict(bits=4, group_size=128, desc_act=False)))
    assert not load.open_model(folder).spec.quantized


def test_the_unpackers_know_all_of_a_checkpoint() -> None:
    """The oracle leaves no tensor of a layer out."""
    for case in DATA.iterdir():
        names = {name for name in unpackers.plain(case) if name.endswith("weight")}
        assert {"model.embed_tokens.weight", "model.norm.weight"} < names, case
