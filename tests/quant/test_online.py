# SPDX-License-Identifier: Apache-2.0
"""Weights that are rounded while a plain checkpoint is loaded: values by formulas written out here, models, sizes,
engines, updates. test_int8.py has int8."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import load
from jaxserve import LLM, SamplingParams
from jaxserve.errors import JaxserveError
from jaxserve.models import decoder, online, param_layout, registry
from jaxserve.models.weight import component_at
from jaxserve.parallel import mesh
from jaxserve.quant import rounding, schemes
from jaxserve.quant.kinds import KINDS
from jaxserve.quant.scheme import Rounding, Scheme
from tests.cli.test_check import LLAMA_8B
from tests.fast import programs
from tests.golden import load as golden
from tests.quant import toy

FLOAT32 = jnp.dtype(jnp.float32)
NEW: tuple[online.Online, ...] = tuple(name for name in online.ONLINE if name != "int8")
HOWS: dict[Rounding, Scheme] = {
    "rows": online.INT8_ROWS[0],
    "groups": schemes.in_groups(bits=4, group=32, scales="bfloat16", zeros="uint8"),
    "float8_tensor": online.FLOAT8_MATRIX[0],
    "float8_rows": online.FLOAT8_ROWS[0],
    "float8_blocks": schemes.float8(group=32),
}


def matrix(rows: int, columns: int, dtype: Any = np.float32) -> np.ndarray:
    """Rows and columns of very different sizes, a row of zeros, and groups without negative or positive numbers."""
    random = np.random.default_rng(3)
    weight = random.standard_normal((rows, columns)) * np.exp(random.standard_normal((rows, 1)) * 2)
    weight *= np.exp(random.standard_normal(columns))
    weight[rows // 2] = 0
    weight[0, :32], weight[1, :32] = abs(weight[0, :32]) + 1, -abs(weight[1, :32]) - 1
    return weight.astype(dtype)


# --- the formulas, value by value -------------------------------------------------------------------------------------


FLOAT8 = np.unique(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64))
FLOAT8 = FLOAT8[np.isfinite(FLOAT8)]


def steps(how: Rounding, weight: np.ndarray, group: int = 32) -> np.ndarray:
    """The scale of each value in float64."""
    found, wide = np.zeros(weight.shape), np.abs(weight.astype(np.float64))
    for n, k in np.ndindex(weight.shape):
        if how == "groups":
            part = weight[n, k // group * group : (k // group + 1) * group].astype(np.float64)
            span = max(part.max(), 0) - min(part.min(), 0)
            found[n, k] = np.float64(np.float32(span / 15).astype(ml_dtypes.bfloat16))
        elif how == "float8_blocks":
            n0, k0 = n // 128 * 128, k // 128 * 128
            found[n, k] = wide[n0 : n0 + 128, k0 : k0 + 128].max() / 448
        else:
            most = wide.max() if how == "float8_tensor" else wide[n].max()
            found[n, k] = most / (127 if how == "rows" else 448)
    return found


def nearest(how: Rounding, weight: np.ndarray, group: int = 32) -> np.ndarray:
    """The values after rounding, in float64."""
    step = steps(how, weight, group)
    ratio = weight.astype(np.float64) / np.where(step > 0, step, 1)
    if how == "rows":
        return np.rint(ratio) * step
    if how == "groups":
        low = np.minimum(weight.astype(np.float64).reshape(len(weight), -1, group).min(-1), 0).repeat(group, -1)
        zeros = np.clip(np.rint(-low / np.where(step > 0, step, 1)), 0, 15)
        return (np.clip(np.rint(ratio) + zeros, 0, 15) - zeros) * step
    after = np.clip(np.searchsorted(FLOAT8, ratio), 1, len(FLOAT8) - 1)
    below, above = FLOAT8[after - 1], FLOAT8[after]
    return np.where(ratio - below < above - ratio, below, above) * step


def values(arrays: dict[str, Any], scheme: Scheme) -> np.ndarray:
    tensor = KINDS[scheme.kind]({name: jnp.asarray(array) for name, array in arrays.items()}, scheme)
    return np.asarray(tensor.dense(FLOAT32), np.float64)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_values_are_the_nearest_of_the_formula(how: Rounding, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_CHUNK", 128 * 160)  # several chunks
    weight, scheme = matrix(200, 160, dtype), HOWS[how]
    names = [each.name for each in scheme.components]
    host = {name: rounding.encode_on_host(how, scheme, name, weight) for name in names}
    device = rounding.encode(how, scheme, jnp.asarray(weight))
    wanted, step = nearest(how, weight), steps(how, weight)
    for arrays in (host, device):
        assert {name: str(array.dtype) for name, array in arrays.items()} == {
            each.name: each.dtype for each in scheme.components
        }
        found = values(dict(arrays), scheme)
        exact = weight.astype(np.float64)  # as near as the nearest: some are half-way between two
        assert (np.abs(np.abs(found - exact) - np.abs(wanted - exact)) <= 1e-4 * np.abs(step) + 1e-6 * abs(exact)).all()
    for name in names:
        np.testing.assert_array_equal(np.asarray(device[name]), host[name])


# --- models -----------------------------------------------------------------------------------------------------------


def plain_of(spec: Any, params: Any, plain_spec: Any) -> Any:
    """The parameters of the plain model that has these values, in engine layout."""
    public = dict(param_layout.leaves(param_layout.to_public_layout(spec, params)))
    shapes = dict(param_layout.leaves(param_layout.abstract_public(plain_spec)))
    found: dict[str, Any] = {}
    for path, leaf in shapes.items():
        scheme = spec.scheme_of(path)
        if scheme is None:
            value = public[path]
        else:
            arrays = {each.name: public[*path, each.name] for each in scheme.components}
            value = KINDS[scheme.kind](arrays, scheme, "experts" in path).dense(FLOAT32)
        param_layout.put(found, path, value.reshape(leaf.shape))
    return param_layout.to_engine_layout(plain_spec, found)


FORWARD = jax.jit(decoder.forward, static_argnums=0)


def logits(case: str, spec: Any, params: Any) -> np.ndarray:
    return np.asarray(FORWARD(spec, params, jnp.asarray([golden.read(case).prompt], jnp.int32)))[0]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *(("llama-gqa-tied", name) for name in NEW),
        *(("deepseek-v3", "int4"), ("qwen2-moe", "fp8_per_block"), ("gpt2", "int4"), ("phi3", "fp8")),
        *(("gpt-oss", "int4"), ("gpt-oss", "int8")),
    ],
)
def test_a_model_is_the_plain_one_with_these_values(tmp_path: Path, case: str, name: online.Online) -> None:
    folder = golden.write_checkpoint(case, tmp_path)
    original = load.open_model(folder).in_dtype("float32")
    plan = original.quantized(name)
    read: list[int] = []
    params = load.read(plan, read.append)
    assert sum(read) == plan.bytes
    found, wanted = (
        logits(case, plan.spec, params),
        logits(case, original.spec, plain_of(plan.spec, params, original.spec)),
    )
    near = 2e-3 if "int8" in {each.scheme.kind for each in plan.spec.quantized if each.scheme} else 1e-5
    assert np.abs(found - wanted).max() < near * np.ptp(wanted)
    exact = golden.read(case).logits
    far = 0.25 if name == "int4" else 0.12
    # Of most tokens: where a router has two nearly equal scores, rounding chooses another expert.
    assert 0 < np.median(np.abs(found - exact).max(-1)) < far * np.ptp(exact)


def test_each_expert_has_a_scale_of_its_own(tmp_path: Path) -> None:
    plan = load.open_model(golden.write_checkpoint("gpt-oss", tmp_path)).in_dtype("float32")
    path = ("layers", 0, "mlp", "experts", "down", "kernel")
    shape = dict(param_layout.leaves(param_layout.abstract_public(plan.spec)))[path].shape
    host = np.zeros(shape, np.float32)
    with load.Reader() as reader:
        reader.fill(plan.copies(path, host, shape))
    scales = load.read(plan.quantized("fp8"))["layers"][0]["mlp"]["experts"]["down"]["kernel"]["scales"]
    np.testing.assert_allclose(
        scales, np.broadcast_to(np.abs(host).max((1, 2))[:, None] / 448, scales.shape), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["int4", "fp8_per_block"])
def test_two_devices_compute_the_same(tmp_path: Path, name: online.Online) -> None:
    folder = golden.write_checkpoint("llama-mha", tmp_path)
    plan = load.open_model(folder).in_dtype("float32").quantized(name)
    wanted = logits("llama-mha", plan.spec, load.read(plan))
    with jax.set_mesh(mesh.make_mesh(tensor=2, expert=1)):
        found = logits("llama-mha", plan.spec, load.read(plan))
    assert np.abs(found - wanted).max() < 2e-3 * np.ptp(wanted)


def test_an_engine_serves_and_updates_it(tmp_path: Path) -> None:
    folder = golden.write_checkpoint("qwen3-moe", tmp_path)
    settings: dict[str, Any] = dict(
        skip_tokenizer_init=True, max_model_len=64, num_blocks=16, max_num_seqs=2, max_num_batched_tokens=16
    ) | dict(quantization="int4", compilation_cache_dir=programs(), warmup=False)
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompt = [[3, 5, 7]]
    llm = LLM(str(folder), **settings)
    first = llm.generate(prompt, greedy)[0].outputs[0].token_ids
    spec, given = load.load_model(folder, dtype="float32")
    given = param_layout.to_public_layout(spec, given)
    other = jax.tree.map(lambda leaf: leaf * jnp.asarray(-1.1, leaf.dtype), given)
    llm.update_weights(other)
    changed = llm.generate(prompt, greedy)[0].outputs[0].token_ids
    fresh = LLM(str(folder), params=other, spec=spec, **settings)
    assert changed == fresh.generate(prompt, greedy)[0].outputs[0].token_ids != first
    llm.update_weights(given)
    assert llm.generate(prompt, greedy)[0].outputs[0].token_ids == first
    with pytest.raises(JaxserveError, match=r"(down|gate)\.kernel has shape .*, expected as many values as in"):
        llm.update_weights(_wrong(given))


def _wrong(public: Any) -> Any:
    """With one column less in a weight that is rounded."""
    changed: dict[str, Any] = {}
    for path, leaf in param_layout.leaves(public):
        short = path[:2] == ("layers", 0) and path[-2:] in (("down", "kernel"), ("gate", "kernel"))
        param_layout.put(changed, path, leaf[..., :-1] if short else leaf)
    return changed


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    quantized, _ = toy.write(tmp_path, "llama-mha", ignore=("lm_head",))
    for name in NEW:
        with pytest.raises(JaxserveError, match=f"already quantized; leave out quantization='{name}'"):
            load.open_model(quantized).quantized(name)


# --- sizes ------------------------------------------------------------------------------------------------------------


LAYERS = 32 * (4096 * 4096 * 2 + 2 * 1024 * 4096 + 3 * 14336 * 4096)  # weights in the layers of Llama 3 8B
ROWS = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
TABLES, NORMS = 2 * 128256 * 4096, 65 * 4096


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("int8", LAYERS + TABLES + 4 * (ROWS + 2 * 128256 + 32 * (4096 + 14336)) + 2 * NORMS),
        ("int8_per_channel_weight_only", LAYERS + TABLES + 4 * (ROWS + 2 * 128256) + 2 * NORMS),
        ("int4", LAYERS * (64 + 3) // 128 + TABLES + 4 * 2 * 128256 + 2 * NORMS),
        ("fp8", LAYERS + 4 * ROWS + 2 * (TABLES + NORMS)),
        ("fp8_per_channel", LAYERS + 4 * ROWS + 2 * (TABLES + NORMS)),
        ("fp8_per_block", LAYERS * (128 + 4) // 128 + 2 * (TABLES + NORMS)),
    ],
)
def test_sizes_of_a_large_model(name: online.Online, size: int) -> None:
    spec = online.quantized(registry.spec_of(json.loads(json.dumps(LLAMA_8B))), name)
    shapes = param_layout.abstract_params(spec, "bfloat16")
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) == size


@pytest.mark.parametrize(
    ("ins", "group"), [((4096,), 128), ((576,), 64), ((9, 64), 64), ((32, 80), 32), ((96,), 32), ((40,), None)]
)
def test_groups_divide_columns_and_heads(ins: tuple[int, ...], group: int | None) -> None:
    assert online.group_of(ins) == group
    scheme, how = online.in_groups(ins)
    assert (how, scheme.components[1].columns) == (("rows", None) if group is None else ("groups", group))


def test_layers_of_other_widths_have_other_groups(tmp_path: Path) -> None:
    """A width of 96 in one layer, and experts of 32 and 40 in others."""
    for case in ("deepseek-v3", "qwen2-moe"):
        plan = load.open_model(golden.write_checkpoint(case, tmp_path / case)).quantized("int4")
        for path, _ in param_layout.leaves(param_layout.abstract_public(plan.spec)):
            component = component_at(plan.spec, path)
            if component is not None and component.name == "zeros":
                assert component.columns in (32, 64), path
    assert plan.spec.rounding_of(("layers", 0, "mlp", "shared", "down", "kernel")) == "rows"  # 40 columns
