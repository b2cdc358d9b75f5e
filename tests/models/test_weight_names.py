# SPDX-License-Identifier: Apache-2.0
"""Checkpoints under other names, and fused weights of other sizes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convert import load
from jaxserve.errors import CheckpointError
from jaxserve.models import registry
from tests.golden import load as golden


def written(case: str, folder: Path, rename: Callable[[str], str] = str) -> Path:
    read = golden.read(case)
    tensors = {rename(name): read.tensor(name) for name in read.tensors}
    return golden.write_folder(folder, read.config, tensors, dtype="float32", shards=1)


@pytest.mark.parametrize(("case", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_names_without_their_prefix(case: str, prefix: str, tmp_path: Path) -> None:
    folders = (
        written(case, tmp_path / "with"),
        written(case, tmp_path / "without", lambda name: name.removeprefix(prefix)),
    )
    plans = [load.plan(folder, *registry.read_config(folder)) for folder in folders]
    assert plans[0].pieces.keys() == plans[1].pieces.keys()
    assert plans[0].bytes == plans[1].bytes


@pytest.mark.parametrize(
    ("case", "name", "expected"),
    [
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", r"\[127, 64\].*expected 128 outputs"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", r"\[191, 64\], of which \[95, 64\]"),
        ("gpt-neox-parallel", "gpt_neox.layers.1.attention.query_key_value.bias", r"\[191\].*expected 192 outputs"),
        ("falcon-new", "transformer.h.1.self_attention.query_key_value.weight", r"\[127, 64\].*expected 128 outputs"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias", r"\[191\].*expected 192 outputs"),
    ],
)
def test_fused_weights_of_another_size(case: str, name: str, expected: str, tmp_path: Path) -> None:
    read = golden.read(case)
    tensors = {other: read.tensor(other) for other in read.tensors}
    tensors[name] = tensors[name][:-1]
    folder = golden.write_folder(tmp_path, read.config, tensors, dtype="float32", shards=1)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load.plan(folder, *registry.read_config(folder))
    assert name in str(caught.value)


def test_a_head_without_its_norm(tmp_path: Path) -> None:
    read = golden.read("stablelm-qk-norm")
    lost = "model.layers.1.self_attn.k_layernorm.norms.1.weight"
    tensors = {name: read.tensor(name) for name in read.tensors if name != lost}
    folder = golden.write_folder(tmp_path, read.config, tensors, dtype="float32", shards=1)
    with pytest.raises(CheckpointError, match=r"norms\.1\.weight"):
        load.plan(folder, *registry.read_config(folder))


def test_gemma_3_has_newer_names_too(tmp_path: Path) -> None:
    case = golden.read("gemma3-vision-hub")
    prefixes = {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    renamed: dict[str, np.ndarray] = {}
    for name in case.tensors:
        [old] = [old for old in prefixes if name.startswith(old)]
        renamed[prefixes[old] + name.removeprefix(old)] = case.tensor(name)
    published, newer = tmp_path / "published", tmp_path / "newer"
    golden.write_checkpoint(case.case, published)
    golden.write_folder(newer, case.config, renamed, dtype="float32", shards=1)
    plans = [load.plan(folder, *registry.read_config(folder)) for folder in (published, newer)]
    assert plans[0].pieces.keys() == plans[1].pieces.keys()
    assert plans[0].bytes == plans[1].bytes
