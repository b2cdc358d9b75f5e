# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint from its folder to its tokens: loaded, sharded, converted, served, updated; against the same
model in plain weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert import load, orbax
from jaxserve.errors import CheckpointError, JaxserveError
from jaxserve.llm import LLM
from jaxserve.models import param_layout, registry
from jaxserve.parallel import mesh
from jaxserve.types.sampling_params import SamplingParams
from tests.convert.folders import edit_json, same
from tests.fast import programs
from tests.models import tiny
from tests.models.paged import run_forward
from tests.quant import toy

TOLERANCE = 2e-5  # of the logits' spread
# Rows fused in the checkpoint, a key and value head for each or one for all, experts, latents, tied embeddings.
CASES = {
    "llama-mqa-3-layers": ("lm_head", "layers.1."),  # a layer of plain weights between two quantized ones
    "llama-gqa-tied": (),
    "phi3": ("embed_tokens",),
    "mixtral": ("block_sparse_moe.gate", "lm_head"),
    "deepseek-v3": ("mlp.gate", "embed_tokens"),
    "gpt-neox-no-bias": ("embed_in", "embed_out"),
}
TOKENS = jnp.asarray([[5, 77, 1, 30, 30, 2, 91, 8, 64, 12, 3]], jnp.int32)


def logits(spec: Any, params: Any) -> np.ndarray:
    return np.asarray(run_forward(spec, params, TOKENS))


def agrees(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(found - wanted).max() < TOLERANCE * wanted.std()


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_agrees_with_its_plain_weights(tmp_path: Path, case: str) -> None:
    folder, plain = toy.write(tmp_path, case, ignore=CASES[case])
    wanted = logits(*load.load_model(plain))
    spec, alone = load.load_model(folder)
    assert spec.quantized and {leaf.dtype.name for leaf in jax.tree.leaves(alone)} == {"float32", "int8"}
    agrees(logits(spec, alone), wanted)
    with jax.set_mesh(mesh.make_mesh(tensor=2)):
        _, params = load.load_model(folder)
        same(params, tiny.engine_params(spec, tiny.public_again(spec, alone)))
        agrees(logits(spec, params), wanted)


@pytest.mark.parametrize("case", ["llama-mqa-3-layers", "mixtral"])
def test_a_converted_checkpoint_is_the_same(tmp_path: Path, case: str) -> None:
    folder, _ = toy.write(tmp_path, case, ignore=CASES[case])
    spec, params = load.load_model(folder)
    place = tmp_path / "converted"
    place.mkdir()
    orbax.write(load.open_model(folder), place, source={"name": "toy", "revision": None})
    again, found = load.load_model(place)
    assert again == spec
    same(found, params)
    with ocp.StandardCheckpointer() as checkpointer:  # without our reader
        public = checkpointer.restore(place / "params", param_layout.abstract_public(spec))
    same(param_layout.to_engine_layout(spec, public), params)
    assert load.open_model(place).bytes == load.open_model(place).size("float32")
    with jax.set_mesh(mesh.make_mesh(tensor=2)):
        same(load.load_model(place)[1], load.load_model(folder)[1])


OPTIONS: dict[str, Any] = dict(
    max_num_seqs=2,
    max_num_batched_tokens=16,
    block_size=8,
    warmup=False,
    skip_tokenizer_init=True,
    compilation_cache_dir=programs(),
)


def answer(llm: LLM) -> list[int]:
    prompt = list(map(int, TOKENS[0]))
    return llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids


def test_an_engine_serves_and_updates_it(tmp_path: Path) -> None:
    ignore = CASES["llama-mqa-3-layers"]
    folders = [toy.write(tmp_path / str(seed), "llama-mqa-3-layers", ignore=ignore, seed=seed) for seed in (0, 1)]
    first, second = (answer(LLM(str(plain), **OPTIONS)) for _, plain in folders)
    assert first != second
    llm = LLM(str(folders[0][0]), **OPTIONS)
    assert answer(llm) == first
    spec, newer = load.load_model(folders[1][0])
    llm.update_weights(tiny.public_again(spec, newer))
    assert answer(llm) == second
    old = llm.public_params()
    llm.update_weights(load.load_model(folders[0][0])[1])  # in engine layout
    assert answer(llm) == first
    llm.update_weights(old)
    llm.sleep(1)
    llm.wake()
    assert answer(llm) == second
    llm.sleep(2)
    llm.wake()
    assert answer(llm) == first
    broken = jax.tree.map(lambda leaf: leaf.astype(jnp.int16) if leaf.dtype == jnp.int8 else leaf, newer)
    with pytest.raises(JaxserveError, match=r"codes is int16\["):
        llm.update_weights(broken)
    assert answer(llm) == first


def test_an_engine_on_two_devices_serves_and_updates_it(tmp_path: Path) -> None:
    folders = [toy.write(tmp_path / str(seed), "mixtral", ignore=CASES["mixtral"], seed=seed) for seed in (0, 1)]
    first, second = (answer(LLM(str(plain), **OPTIONS)) for _, plain in folders)
    llm = LLM(str(folders[0][0]), tensor_parallel_size=2, **OPTIONS)
    codes = llm.params["layers"][0]["mlp"]["experts"]["gate_up"]["kernel"]["codes"]
    assert codes.sharding.shard_shape(codes.shape) == (6, 2, 48, 64)
    assert answer(llm) == first
    spec, newer = load.load_model(folders[1][0])
    llm.update_weights(tiny.public_again(spec, newer))
    assert answer(llm) == second
    llm.update_weights(llm.public_params())
    assert answer(llm) == second


def test_the_config_decides_the_dtype(tmp_path: Path) -> None:
    """Codes keep theirs; what is computed is of the spec's."""
    folder, _ = toy.write(tmp_path, "llama-gqa-tied", ignore=())
    plan = load.open_model(folder)
    assert plan.spec.dtype == "float32"  # that of the norms: the rest is quantized
    spec, params = load.load_model(folder, dtype="bfloat16")
    assert spec.dtype == "bfloat16"
    kinds = {str(path[-1]): leaf.dtype.name for path, leaf in param_layout.leaves(params)}
    assert kinds == dict(codes="int8", scales="float32", zeros="int8", tilt="float32", weight="bfloat16")
    exact = logits(*load.load_model(folder))
    assert np.abs(logits(spec, params) - exact).max() < 0.1 * exact.std()


def test_one_scheme_for_all_layers_is_one_entry(tmp_path: Path) -> None:
    folder, _ = toy.write(tmp_path, "llama-mqa-3-layers", ignore=CASES["llama-mqa-3-layers"])
    paths = {each.path for each in registry.read_config(folder)[0].quantized}
    assert {"layers.0.mlp.up.kernel", "layers.2.mlp.up.kernel", "embed.weight"} < paths
    edit_json(folder / "config.json", quantization_config={"quant_method": "toy", "ignore": ["lm_head"]})
    paths = {each.path for each in registry.read_config(folder)[0].quantized}
    assert "layers.{layer}.mlp.up.kernel" in paths and not any("layers.0" in path for path in paths)


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, toy.Change], str]] = {
    "wider codes": (
        {"1.mlp.up_proj.weight_packed": lambda array: array.astype(np.int32)},
        "'model.layers.1.mlp.up_proj.weight_packed' has shape [96, 32], of which [96, 128] is used, expected [96, 64]",
    ),
    "other integers": (
        {"1.mlp.up_proj.weight_zeros": lambda array: array.astype(np.int16)},
        "'model.layers.1.mlp.up_proj.weight_zeros' has dtype I16, expected int8",
    ),
    "scales of integers": (
        {"1.mlp.up_proj.weight_scale": lambda array: array.astype(np.int32)},
        "'model.layers.1.mlp.up_proj.weight_scale' has dtype I32, expected float32",
    ),
    "a tilt that differs within a fused weight": (
        {"1.self_attn.k_proj.weight_tilt": lambda array: array + 1},
        "layers.1.attention.k.kernel.tilt differs from that of the weights it is fused with",
    ),
    "zeros cut off": (
        {"1.mlp.up_proj.weight_zeros": lambda array: array[1:]},
        "'model.layers.1.mlp.up_proj.weight_zeros' has shape [15, 96]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_tensor_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    change, problem = WRONG[name]
    folder, _ = toy.write(tmp_path, "llama-mqa-3-layers", ignore=(), change=change)
    with pytest.raises(CheckpointError) as caught:
        load.load_model(folder)
    assert problem in str(caught.value), str(caught.value)


def test_other_quantizations_are_refused(tmp_path: Path) -> None:
    folder, plain = toy.write(tmp_path, "llama-mqa-3-layers", ignore=())
    edit_json(folder / "config.json", quantization_config={"quant_method": "tea"})
    with pytest.raises(CheckpointError, match=r"the checkpoint is quantized .*tea.*, which is not supported"):
        load.load_model(folder)
    edit_json(plain / "config.json", quantization_config={"quant_method": "toy", "ignore": []})
    with pytest.raises(CheckpointError, match=r"tensor 'model\.embed_tokens\.weight_packed' is missing"):
        load.load_model(plain)


def test_a_shared_component_must_agree_in_an_update(tmp_path: Path) -> None:
    folder, _ = toy.write(tmp_path, "llama-gqa-tied", ignore=())
    spec, params = load.load_model(folder)
    public = tiny.public_again(spec, params)
    kernel = public["layers"][0]["attention"]["k"]["kernel"]
    kernel["tilt"] = kernel["tilt"] + 1
    llm = LLM("toy", params=params, spec=replace(spec), max_num_seqs=2, max_num_batched_tokens=16, warmup=False)
    with pytest.raises(JaxserveError, match=r"k\.kernel\.tilt differs from that of the weights it is fused with"):
        llm.update_weights(public)
