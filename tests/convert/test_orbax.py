# SPDX-License-Identifier: Apache-2.0
"""The converted form: exact in every direction, readable with plain Orbax, small in memory, safe with bad files."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert import load, orbax
from jaxserve.models import param_layout
from jaxserve.parallel import mesh
from tests.convert.folders import edit_json, refused, same
from tests.golden import load as golden

SOURCE: dict[str, str | None] = {"name": "here", "revision": None}
Q = "layers.0.attention.q.kernel"


def converted(source: Path, place: Path, dtype: str | None = None) -> Path:
    place.mkdir()
    orbax.write(load.open_model(source), place, source=SOURCE, dtype=dtype)
    return place


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    return converted(golden.write_checkpoint("llama-bias", folder / "hf"), folder / "new")


@pytest.fixture
def model(kept: Path, tmp_path: Path) -> Path:
    return shutil.copytree(kept, tmp_path / "model")


# --- exactness ------------------------------------------------------------------------------------------------------

CASES = [
    ("llama-bias", dict(tensor=2)),
    ("llama-gqa-tied", dict(tensor=4)),
    ("qwen2-tied", dict(tensor=2)),
    ("mixtral", dict(tensor=2, expert=2)),
    ("deepseek-v3", dict(tensor=4)),
    ("phi3", dict(tensor=2)),
    ("falcon-new", dict(tensor=2)),
    ("gpt-neox-parallel", dict(tensor=2)),
    ("gpt-oss", dict(tensor=2)),
    ("gpt2", dict(tensor=2)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "sizes"), CASES, ids=lambda value: str(value))
def test_round_trip(tmp_path: Path, case: str, sizes: Any, dtype: str) -> None:
    source = golden.write_checkpoint(case, tmp_path / "hf", dtype=dtype, shards=3)
    place = converted(source, tmp_path / "new")
    for held in ("float32", "bfloat16"):
        spec, wanted = load.load_model(source, dtype=held)
        found = load.load_model(place, dtype=held)
        assert found[0] == spec
        same(found[1], wanted)
    with jax.set_mesh(mesh.make_mesh(**sizes)):
        same(load.load_model(place)[1], load.load_model(source)[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_orbax_restores_the_public_tree(tmp_path: Path, dtype: str) -> None:
    source = golden.write_checkpoint("llama-mqa-3-layers", tmp_path / "hf", dtype=dtype)
    place = converted(source, tmp_path / "new")
    spec, wanted = load.load_model(source, dtype=dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        public = checkpointer.restore(place / "params", param_layout.abstract_public(spec, dtype))
        untyped: Any = checkpointer.restore(place / "params")
    same(param_layout.to_engine_layout(spec, public), wanted)
    assert untyped["layers"]["0"]["attention"]["q"]["kernel"].dtype == jnp.dtype(dtype)
    with jax.set_mesh(mesh.make_mesh(tensor=4)):
        same(param_layout.to_engine_layout(spec, public), load.load_model(place, dtype=dtype)[1])


def test_another_dtype(tmp_path: Path) -> None:
    source = golden.write_checkpoint("gpt-oss", tmp_path / "hf")
    place = converted(source, tmp_path / "new", dtype="bfloat16")
    plan = load.open_model(place)
    assert plan.leaf_dtype(("embed", "weight")) == jnp.bfloat16
    assert plan.leaf_dtype(("layers", 0, "attention", "sinks")) == jnp.float32  # whatever the rest is
    same(load.load_model(place, dtype="bfloat16")[1], load.load_model(source, dtype="bfloat16")[1])
    again = converted(place, tmp_path / "again")  # a converted model can be converted
    same(load.load_model(again)[1], load.load_model(place)[1])


def test_spec_says_where_the_model_came_from(model: Path) -> None:
    content = json.loads((model / "spec.json").read_text())
    assert (content["format"], content["source"]) == (1, SOURCE)


# --- what is refused ------------------------------------------------------------------------------------------------


def spec_of(model: Path) -> dict[str, Any]:
    return json.loads((model / "spec.json").read_text())["spec"]


WRONG_SPECS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another version": (lambda m: edit_json(m / "spec.json", format=2), "has format version 2"),
    "no version": (lambda m: edit_json(m / "spec.json", format=None), "was not written by a conversion"),
    "no JSON": (lambda m: (m / "spec.json").write_text('{"format": 1,'), "spec.json is not valid JSON"),
    "cut off": (lambda m: (m / "spec.json").write_text(""), "spec.json is not valid JSON"),
    "a list": (lambda m: (m / "spec.json").write_text("[]"), "spec.json is not a JSON object"),
    "no spec": (lambda m: edit_json(m / "spec.json", spec=None), "contains no valid model spec"),
    "another class": (
        lambda m: edit_json(m / "spec.json", spec=spec_of(m)["layers"][0]),
        "contains no valid model spec",
    ),
    "a class of strangers": (lambda m: edit_json(m / "spec.json", spec={"is": "Popen"}), "does not fit this version"),
    "a field too many": (lambda m: edit_json(m / "spec.json", spec=spec_of(m) | {"x": 1}), "does not fit this version"),
    "words for numbers": (
        lambda m: edit_json(m / "spec.json", spec=spec_of(m) | {"hidden": "64"}),
        "contains no valid model spec",
    ),
    "no layers": (lambda m: edit_json(m / "spec.json", spec=spec_of(m) | {"layers": 3}), "layers is 3"),
    "absurd": (lambda m: edit_json(m / "spec.json", spec=spec_of(m) | {"hidden": 2**40}), "config is invalid"),
    "another size": (lambda m: edit_json(m / "spec.json", spec=spec_of(m) | {"hidden": 128}), "expected"),
    "another head": (
        lambda m: edit_json(m / "spec.json", spec=spec_of(m) | {"tied": True}),
        "has 'head', which is not",
    ),
}


@pytest.mark.parametrize("name", WRONG_SPECS)
def test_wrong_spec(model: Path, name: str) -> None:
    change, complaint = WRONG_SPECS[name]
    change(model)
    refused(model, complaint)


def truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def edit_array(**changes: Any) -> Callable[[Path], object]:
    return lambda params: edit_json(params / Q / ".zarray", **changes)


WRONG_PARAMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (shutil.rmtree, "params: cannot be read (no such file or directory)"),
    "empty": (lambda p: (shutil.rmtree(p), p.mkdir()), "has no 'embed.weight' and 34 more"),
    "one less": (lambda p: shutil.rmtree(p / Q), f"has no '{Q}', which spec.json requires"),
    "one more": (lambda p: shutil.copytree(p / Q, p / "layers.9.q"), "has 'layers.9.q', which is not part"),
    "cut off": (lambda p: truncate(p / Q / "0.0.0"), "has 16383 bytes, expected 16384 for F32"),
    "no data": (lambda p: (p / Q / "0.0.0").unlink(), "0.0.0: cannot be read (no such file or directory)"),
    "another shape": (edit_array(shape=[4, 64, 16]), f"{Q}: has shape [4, 64, 16], expected [4, 16, 64]"),
    "another dtype": (edit_array(dtype="<i4"), "has dtype '<i4', expected one of bfloat16"),
    "compressed": (edit_array(compressor={"id": "zstd", "level": 1}), "not stored as one uncompressed chunk"),
    "in chunks": (edit_array(chunks=[1, 16, 64]), "not stored as one uncompressed chunk"),
    "no array": (lambda p: (p / Q / ".zarray").write_text("{"), ".zarray is not valid JSON"),
}


@pytest.mark.parametrize("name", WRONG_PARAMS)
def test_wrong_params(model: Path, name: str) -> None:
    change, complaint = WRONG_PARAMS[name]
    change(model / "params")
    refused(model, complaint)


# --- memory ---------------------------------------------------------------------------------------------------------

# Peaks while a model of many equal tensors is converted and loaded, over what stays; the first run pays for imports.
MEASURE = """
import ctypes, gc, re, shutil, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
from convert import load, orbax

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def over(action):
    gc.collect()  # jax holds host buffers of arrays that are gone until then
    ctypes.CDLL(None).malloc_trim(0)  # and the C library holds what was freed
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = action()
    return status("VmHWM") - before, kept

source, place = map(Path, sys.argv[1:])
for _ in range(2):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    plan = load.open_model(source)
    print(over(lambda: orbax.write(plan, place, source={}))[0])
for folder in (source, place):
    for _ in range(2):
        peak, (spec, params) = over(lambda: load.load_model(folder))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        print(peak - size)
        del params
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory counters")
def test_peak_memory(tmp_path: Path) -> None:
    hidden, layers = 768, 8
    config = golden.read("llama-mha").config | {
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": 64,
        "head_dim": hidden // 4,
    }
    tensors: dict[str, np.ndarray] = {}
    for name, shape in golden.read("llama-mha").tensors.items():
        wide = tuple(64 if size == 96 and "mlp" not in name else hidden for size in shape)
        for i in range(layers) if "layers.0." in name else [0]:
            if "layers.1." not in name:
                tensors[name.replace("layers.0.", f"layers.{i}.")] = np.ones(wide, np.float32)
    source = golden.write_folder(tmp_path / "hf", config, tensors, "float32", 2)
    del tensors
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "new")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 0, result.stderr
    _, writing, _, loading, _, loading_converted = map(int, result.stdout.split())
    largest, slack = 3 * hidden * hidden * 4, 3_000_000  # qkv in the engine; the interpreter breathes
    assert writing < 4 * hidden * hidden * 4 + slack, result.stdout  # of 56 tensors
    assert max(loading, loading_converted) < 1.1 * largest + slack, result.stdout
