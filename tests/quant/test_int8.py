# SPDX-License-Identifier: Apache-2.0
"""int8 weights, encoded while a plain checkpoint is loaded: the rounding, products, models, engines, updates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load
from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine.execute import loading
from jaxserve.errors import JaxserveError
from jaxserve.models import decoder, param_layout
from jaxserve.models.weight import component_at
from jaxserve.parallel import mesh
from jaxserve.quant import int8
from jaxserve.quant.int8 import Int8
from jaxserve.quant.scheme import Scheme
from tests.fast import programs
from tests.golden import load as golden
from tests.quant import toy

BOTH = (int8.FUSED, int8.ALONE)


def made(scheme: Scheme, weight: np.ndarray) -> Int8:
    arrays = int8.encode(scheme, jnp.asarray(weight))
    return Int8(arrays, scheme)


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of very different sizes, columns of different ones, and a row of zeros."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, columns)) * np.exp(random.standard_normal((rows, 1)) * 2)
    weight *= np.exp(random.standard_normal(columns))
    weight[rows // 2] = 0
    return weight.astype(np.float32)


@pytest.mark.parametrize("scheme", BOTH)
def test_weights_are_off_by_half_a_step_at_most(scheme: Scheme) -> None:
    weight = matrix(40, 96)
    tensor = made(scheme, weight)
    assert tensor.arrays["codes"].dtype == jnp.int8
    tilt = np.asarray(tensor.arrays["tilt"], np.float64) if scheme == int8.ALONE else np.ones(96)
    steps = np.abs(weight / tilt).max(1, keepdims=True) / 127 * tilt
    assert (np.abs(np.asarray(tensor.dense(jnp.dtype(jnp.float32))) - weight) <= steps * 0.5001).all()


def test_the_tilt_lowers_the_error_of_uneven_columns() -> None:
    weight = matrix(256, 128)
    errors = [np.square(np.asarray(made(each, weight).dense(jnp.dtype(jnp.float32))) - weight).mean(1) for each in BOTH]
    assert np.median(errors[1][weight.any(1)] / errors[0][weight.any(1)]) < 0.7


@pytest.mark.parametrize("scheme", BOTH)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_encodes_as_the_device_does(scheme: Scheme, dtype: str) -> None:
    weight = matrix(3000, 96).astype(dtype)  # several chunks
    wanted = int8.encode(scheme, jnp.asarray(weight))
    for name, array in wanted.items():
        found = int8.encode_on_host(scheme, name, 96, weight)
        if name == "codes":  # the order of a sum may decide between two neighbours
            assert np.abs(found.astype(int) - np.asarray(array, int)).max() <= 1
            assert np.mean(found != np.asarray(array)) < 1e-3
        else:
            np.testing.assert_allclose(found, array, rtol=1e-5)


@pytest.mark.parametrize("scheme", BOTH)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_product_keeps_small_activations_beside_large_ones(scheme: Scheme, rows: int) -> None:
    tensor = made(scheme, matrix(40, 96))
    x = np.random.default_rng(1).standard_normal((rows, 96)).astype(np.float32)
    x[:, 5] *= 300  # as some channels of real models
    found = np.asarray(tensor.matmul(jnp.asarray(x), jnp.dtype(jnp.float32)), np.float64)
    dense = np.asarray(tensor.dense(jnp.dtype(jnp.float32)), np.float64)
    # Each activation is off by at most half of its finer step.
    tilted = x * np.asarray(tensor.arrays.get("tilt", np.ones(96)), np.float64)
    finer = np.abs(tilted).max(1, keepdims=True) / 127 / 254
    codes = np.abs(np.asarray(tensor.arrays["codes"], np.float64)).sum(1) * np.asarray(tensor.arrays["scales"])
    assert (np.abs(found - x.astype(np.float64) @ dense.T) <= 0.55 * finer * codes + 1e-4 * np.abs(found)).all()


def test_rows_of_zeros_and_of_nan_stay_so() -> None:
    tensor = made(int8.FUSED, matrix(8, 16))
    x = jnp.zeros((3, 16)).at[1].set(jnp.nan)
    y = np.asarray(tensor.matmul(x, jnp.dtype(jnp.float32)))
    assert not y[[0, 2]].any() and np.isnan(y[1, [0, 1, 2, 3, 5, 6, 7]]).all()


@pytest.mark.parametrize("scheme", BOTH)
def test_a_grouped_product_is_that_of_each_expert(scheme: Scheme) -> None:
    weights = np.stack([matrix(24, 32, seed) for seed in range(3)])
    arrays = jax.vmap(lambda weight: int8.encode(scheme, weight))(jnp.asarray(weights))
    tensor = Int8(arrays, scheme, experts=True)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((9, 32)), jnp.float32)
    offsets = jnp.asarray([0, 4, 4, 8], jnp.int32)  # the second has no rows, and the last row no expert
    found = np.asarray(tensor.grouped_matmul(x, offsets))
    for rows, expert in ((slice(0, 4), 0), (slice(4, 8), 2)):
        one = Int8({name: array[expert] for name, array in arrays.items()}, scheme)
        np.testing.assert_allclose(found[rows], one.matmul(x[rows], jnp.dtype(jnp.float32)), rtol=1e-5, atol=1e-5)
    assert not found[8].any()


# --- models -----------------------------------------------------------------------------------------------------------


def opened(folder: Path, dtype: str = "float32") -> Any:
    return load.open_model(folder).in_dtype(dtype).quantized("int8")


def prompt_of(case: str) -> jax.Array:
    return jnp.asarray([golden.read(case).prompt], jnp.int32)


def dequantized(spec: Any, params: Any) -> dict[str, Any]:
    """The public tree with plain weights of the same values."""
    public = dict(param_layout.leaves(param_layout.to_public_layout(spec, params)))
    plain: dict[str, Any] = {}
    for path, array in public.items():
        component = component_at(spec, path)
        if component is None:
            param_layout.put(plain, path, array)
        elif component.name == "codes":
            names = [each.name for each in spec.scheme_of(path[:-1]).components]
            arrays = {name: public[*path[:-1], name] for name in names}
            tensor = Int8(arrays, spec.scheme_of(path[:-1]), "experts" in path)
            param_layout.put(plain, path[:-1], tensor.dense(jnp.dtype(jnp.float32)))
    return plain


def reshaped(spec: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Weights with the axes of the plain model: a component has one axis for all columns."""
    shapes = dict(param_layout.leaves(param_layout.abstract_public(spec)))
    found: dict[str, Any] = {}
    for path, array in param_layout.leaves(plain):
        param_layout.put(found, path, array.reshape(shapes[path].shape))
    return found


@pytest.mark.parametrize("case", ["llama-gqa-tied", "gpt2", "gemma3", "deepseek-v3", "qwen2-moe"])
def test_a_model_is_the_plain_one_with_these_weights(tmp_path: Path, case: str) -> None:
    folder = golden.write_checkpoint(case, tmp_path)
    plan = opened(folder)
    read: list[int] = []
    params = load.read(plan, read.append)
    assert sum(read) == plan.bytes
    plain_spec = load.open_model(folder).in_dtype("float32").spec
    plain = reshaped(plain_spec, dequantized(plan.spec, params))
    tokens = prompt_of(case)
    found = np.asarray(decoder.forward(plan.spec, params, tokens))
    engine = param_layout.to_engine_layout(plain_spec, plain)
    wanted = np.asarray(decoder.forward(plain_spec, engine, tokens))
    assert np.abs(found - wanted).max() < 2e-3 * np.ptp(wanted)
    original = np.asarray(decoder.forward(plain_spec, load.load_model(folder, dtype="float32")[1], tokens))
    # Of most tokens: where a router has two nearly equal scores, rounding chooses another expert.
    assert np.median(np.abs(found - original).max(-1)) < 0.05 * np.ptp(original)


def test_an_engine_serves_and_updates_it(tmp_path: Path) -> None:
    folder = golden.write_checkpoint("llama-mha", tmp_path / "one")
    settings: dict[str, Any] = dict(
        skip_tokenizer_init=True, max_model_len=64, num_blocks=16, max_num_seqs=2, max_num_batched_tokens=16
    ) | dict(quantization="int8", compilation_cache_dir=programs())
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompt = [[3, 5, 7]]
    llm = LLM(str(folder), **settings)
    first = llm.generate(prompt, greedy)[0].outputs[0].token_ids
    spec, other = load.load_model(folder, dtype="float32")
    other = param_layout.to_public_layout(spec, jax.tree.map(lambda leaf: leaf * jnp.asarray(-1.1, leaf.dtype), other))
    llm.update_weights(other)
    changed = llm.generate(prompt, greedy)[0].outputs[0].token_ids
    fresh = LLM(str(folder), params=other, spec=spec, **settings)
    assert changed == fresh.generate(prompt, greedy)[0].outputs[0].token_ids != first
    llm.update_weights(param_layout.to_public_layout(spec, load.load_model(folder, dtype="float32")[1]))
    assert llm.generate(prompt, greedy)[0].outputs[0].token_ids == first


def test_loading_counts_its_bytes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = golden.write_checkpoint("llama-mha", tmp_path)
    config = EngineConfig(model=str(folder), quantization="int8")
    model = loading.open_folder(config, None)
    assert model.plan is not None
    total, counted, calls = model.plan.bytes, list[tuple[int, int]](), list[str]()
    abstract = param_layout.abstract_public
    monkeypatch.setattr(param_layout, "abstract_public", lambda spec: calls.append("") or abstract(spec))
    loading.read(model, lambda what, done, all_of_it: counted.append((done, all_of_it)))
    assert len(counted) > 5 and counted[-1] == (total, total)
    assert len(calls) == 1  # it traces the whole model: once per tensor made a start five times as long


def test_two_devices_compute_the_same(tmp_path: Path) -> None:
    folder = golden.write_checkpoint("llama-mha", tmp_path)
    plan = opened(folder)
    tokens = prompt_of("llama-mha")
    wanted = np.asarray(decoder.forward(plan.spec, load.read(plan), tokens))
    on = mesh.make_mesh(tensor=2, expert=1)
    with jax.set_mesh(on):
        found = np.asarray(jax.jit(decoder.forward, static_argnums=0)(plan.spec, load.read(plan), tokens))
    assert np.abs(found - wanted).max() < 2e-3 * np.ptp(wanted)


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    quantized, _ = toy.write(tmp_path, "llama-mha", ignore=("lm_head",))
    with pytest.raises(JaxserveError, match="already quantized; leave out quantization='int8'"):
        load.open_model(quantized).quantized("int8")


def test_routers_stay_plain(tmp_path: Path) -> None:
    spec = opened(golden.write_checkpoint("deepseek-v3", tmp_path)).spec
    paths = {each.path for each in spec.quantized}
    assert any("experts" in path for path in paths) and not any("router" in path for path in paths)
