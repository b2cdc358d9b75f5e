# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints of the real packers: every value, and logits beside transformers'."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load, orbax
from jaxserve.models import param_layout, registry
from jaxserve.models.weight import component_at
from jaxserve.parallel import mesh
from jaxserve.quant.kinds import KINDS
from tests.convert.folders import same
from tests.golden import load as golden
from tests.models.paged import run_forward
from tests.quant import unpackers

DATA = golden.DATA / "quantized"
CASES = sorted(path.name for path in DATA.iterdir())
TOKENS = jnp.asarray([[3, 7, 5, 14, 11, 2, 13, 8]], jnp.int32)
FLOAT32 = jnp.dtype(jnp.float32)
TOLERANCE = 1e-3  # of the logits' spread
CUT_IN_FOUR = ("awq-rows", "gptq-4-ordered", "gptq-4-asymmetric-v2", "ct-w8a16", "ct-w8a8", "fp8-tensor", "fp8-block")


# Groups of 64 in 64 columns, and the heads of MLA, 20 values each, in groups of 16.
UNCUT = ("awq-64", "bnb-nf4", "bnb-nf4-nested", "bnb-fp4", "fp8-deepseek")


def logits(spec: Any, params: Any) -> np.ndarray:
    return np.asarray(run_forward(spec, params, TOKENS))[0]


def agrees(found: np.ndarray, case: str) -> None:
    wanted = np.load(DATA / case / "logits.npy")
    assert np.abs(found - wanted).max() < TOLERANCE * wanted.std(), np.abs(found - wanted).max() / wanted.std()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    spec, params = load.load_model(DATA / case, dtype="float32")
    assert spec.quantized
    agrees(logits(spec, params), case)


def dense(spec: Any, params: Any) -> dict[str, np.ndarray]:
    """Each quantized weight as one matrix, by its public path."""
    public = dict(param_layout.leaves(param_layout.to_public_layout(spec, params)))
    found: dict[str, np.ndarray] = {}
    for path in public:
        component = component_at(spec, path)
        scheme = spec.scheme_of(path[:-1])
        if component is None or scheme is None or component != scheme.components[0]:
            continue
        arrays = {each.name: public[*path[:-1], each.name] for each in scheme.components}
        tensor = KINDS[scheme.kind](arrays, scheme, "experts" in path)
        found[param_layout.dotted(path[:-1])] = np.asarray(tensor.dense(FLOAT32))
    return found


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_formula(case: str) -> None:
    """Within one rounding of each step in float32."""
    spec, params = load.load_model(DATA / case, dtype="float32")
    plain = unpackers.plain(DATA / case)
    _, family = registry.read_config(DATA / case)
    found = dense(spec, params)
    assert len(found) >= 3
    for path, value in found.items():
        number = path.split(".")[1] if path.startswith("layers.") else ""
        general = path.replace(f"layers.{number}.", "layers.{layer}.", 1) if number else path
        layer = spec.layers[int(number)] if number else None
        matrices: list[np.ndarray] = []
        for rule in family.WEIGHTS:
            if rule.path == general and not matrices:
                name = rule.source.replace("{layer}", number)
                count = len(value) if "{expert}" in name else 1
                names = [name.replace("{expert}", str(i)) for i in range(count)]
                if names[0] in plain:
                    each = [plain[one] for one in names]
                    matrices = [one if rule.view is None else rule.view(one, layer) for one in each]
        wanted = np.stack(matrices).reshape(value.shape)
        np.testing.assert_allclose(value, wanted, rtol=3e-7, atol=0)


@pytest.mark.parametrize(("shards", "case"), [*((2, case) for case in CASES), *((4, case) for case in CUT_IN_FOUR)])
def test_devices_share_the_weights(shards: int, case: str) -> None:
    if case in UNCUT:
        pytest.skip("the groups of columns do not divide among so many devices")
    with jax.set_mesh(mesh.make_mesh(tensor=shards)):
        spec, params = load.load_model(DATA / case, dtype="float32")
        declared = dict(param_layout.leaves(param_layout.abstract_params(spec)))
        for path, leaf in param_layout.leaves(params):
            assert leaf.sharding.is_equivalent_to(declared[path].sharding, leaf.ndim), path
        agrees(logits(spec, params), case)


@pytest.mark.parametrize("case", ["ct-moe", "fp8-deepseek", "gpt-oss-mxfp4"])
def test_devices_share_the_experts(case: str) -> None:
    with jax.set_mesh(mesh.make_mesh(expert=2)):
        agrees(logits(*load.load_model(DATA / case, dtype="float32")), case)


@pytest.mark.parametrize("case", ["awq-32", "gptq-4-ordered", "ct-mixed", "fp8-deepseek", "gpt-oss-mxfp4", "bnb-nf4"])
def test_a_converted_checkpoint_is_the_same(tmp_path: Path, case: str) -> None:
    spec, params = load.load_model(DATA / case, dtype="float32")
    place = tmp_path / "converted"
    place.mkdir()
    orbax.write(load.open_model(DATA / case).in_dtype("float32"), place, source={"name": case, "revision": None})
    again, found = load.load_model(place, dtype="float32")
    assert again == spec
    same(found, params)


@pytest.mark.parametrize("case", CASES)
def test_a_config_alone_gives_about_the_size(tmp_path: Path, case: str) -> None:
    """As for a model that is not downloaded yet."""
    for file in (DATA / case).glob("*.json"):
        shutil.copy(file, tmp_path)
    known = load.open_model(DATA / case).spec
    guessed = replace(load.open_spec(tmp_path), dtype=known.dtype)

    def size(spec: Any) -> int:
        leaves = param_layout.leaves(param_layout.abstract_public(spec))
        return sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)

    assert size(guessed) == pytest.approx(size(known), rel=0.2)


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_counted(case: str) -> None:
    plan, read = load.open_model(DATA / case), list[int]()
    load.read(plan.in_dtype("float32"), read.append)
    assert sum(read) == plan.bytes


def test_weights_of_experts_stay_4_bit() -> None:
    _, params = load.load_model(DATA / "gpt-oss-mxfp4", dtype="bfloat16")
    kernel: Any = params["layers"][0]["mlp"]["experts"]["gate_up"]["kernel"]
    assert {name: leaf.dtype.name for name, leaf in kernel.items()} == dict(codes="uint8", scales="uint8")
    size = json.loads((DATA / "gpt-oss-mxfp4" / "config.json").read_text())["hidden_size"]
    assert kernel["codes"].shape[-1] * 2 == size
