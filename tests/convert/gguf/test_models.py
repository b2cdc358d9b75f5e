# SPDX-License-Identifier: Apache-2.0
"""GGUF files that the package `gguf` wrote of the golden checkpoints give the models that the checkpoints give."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load
from convert.gguf import folder as folders
from convert.gguf.blocks import FORMATS
from jaxserve.errors import CheckpointError
from jaxserve.models import decoder, param_layout, registry, spec_json
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from tests.convert.gguf.crafted import blob, tensor
from tests.golden import as_gguf, gguf_cases
from tests.golden import load as golden
from tests.models.checkpoints import load_case
from tests.models.golden_cases import TOLERANCE

# What a file cannot say, and what the models that llama.cpp runs never have, are not here.
CASES = (
    *("gemma-hub", "gemma2", "gemma3", "gemma3-hub", "granite-bias", "granite-hub", "llama-bias", "llama-gqa-tied"),
    *("llama-head-dim", "llama-rope-linear", "llama-rope-yarn", "llama-tied-with-head", "llama2-hub", "mistral-window"),
    *("mixtral", "olmo2-hub", "phi3-128k-hub", "phi3-window", "phi4-mini-hub", "qwen2-head-dim", "qwen2-moe-hub"),
    *("qwen2-moe-no-bias", "qwen2.5-hub", "qwen2.5-yarn-hub", "qwen3-bias-tied", "qwen3-hub", "qwen3-moe-hub"),
    *("smollm3", "stablelm-12b-hub", "stablelm-bias", "stablelm-parallel", "starcoder2-hub", "starcoder2-no-bias"),
)
LOGITS = ("gemma2", "gemma3", "llama-rope-llama3", "mixtral", "phi3-longrope-long")


def write(case: str, file: Path, **options: Any) -> Path:
    want = golden.read(case)
    config = registry.as_config(want.config)._hf.to_dict()
    return as_gguf.write(file, config, {name: want.tensor(name) for name in want.tensors}, **options)


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_the_checkpoint(case: str, tmp_path: Path) -> None:
    spec, params = load.load_model(write(case, tmp_path / "model.gguf"), dtype=jnp.float32)
    want, given = load_case(case)
    if not case.startswith("gemma"):  # there, weights make up for what the file cannot say
        assert in_float32(replace(spec, family=want.family, max_positions=want.max_positions)) == in_float32(want)
    close(params, given, scaled=("attention.q", "qkv") if case.startswith("gemma") else ())


def in_float32(spec: ModelSpec) -> Any:
    """The spec as JSON, with numbers as files have them."""
    return json.loads(json.dumps(spec_json.to_json(spec)), parse_float=np.float32)


def close(params: Params, wanted: Params, *, scaled: tuple[str, ...] = ()) -> None:
    found = dict(param_layout.leaves(params))
    for path, want in param_layout.leaves(wanted):
        if not any(part in param_layout.dotted(path) for part in scaled):
            np.testing.assert_allclose(found[path], want, rtol=0, atol=3e-7, err_msg=param_layout.dotted(path))


@pytest.mark.parametrize("case", LOGITS)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    spec, params = load.load_model(write(case, tmp_path / "model.gguf"), dtype=jnp.float32)
    want = golden.read(case)
    assert difference(spec, params, want.prompt, want.logits) < TOLERANCE


def difference(spec: ModelSpec, params: Params, prompt: Any, wanted: np.ndarray) -> float:
    lengths = jnp.asarray([len(prompt)], jnp.int32)
    logits = decoder.forward(spec, params, jnp.asarray([prompt], jnp.int32), rope_lengths=lengths)
    return float(np.abs(np.asarray(logits)[0] - wanted).max() / wanted.std())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
@pytest.mark.parametrize("case", ["llama-gqa-tied", "mixtral", "gemma3-hub", "phi3"])
def test_blocks_are_decoded_into_place(case: str, kind: str, tmp_path: Path) -> None:
    """As the checkpoint of the values that the package makes of the blocks."""
    want = golden.read(case)
    tensors = {name: want.tensor(name) for name in want.tensors}

    def stored(name: str, values: np.ndarray) -> str:
        return kind if values.ndim > 1 and "gate_inp" not in name else "F32"

    def rounded(name: str, values: np.ndarray) -> np.ndarray:
        if values.ndim < 2 or name.endswith("moe.gate.weight"):
            return values
        as_kind = gguf.GGMLQuantizationType[kind]
        return gguf.quants.dequantize(gguf.quants.quantize(values, as_kind), as_kind)

    spec, params = load.load_model(write(case, tmp_path / "model.gguf", chooses=stored), dtype=jnp.float32)
    plain = golden.write_folder(
        tmp_path / "plain", want.config, {n: rounded(n, v) for n, v in tensors.items()}, "float32", 1
    )
    # The values of a row's block do not depend on the order of the rows.
    close(params, load.load_model(plain, dtype=jnp.float32)[1])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {spec.dtype} == {"float32"}


def test_the_dtype_is_that_of_most_values(tmp_path: Path) -> None:
    def opened(kind: str) -> Any:
        file = write(
            "llama-mha", tmp_path / f"{kind}.gguf", chooses=lambda name, values: kind if values.ndim > 1 else "F32"
        )
        return load.open_model(folders.of(file)).spec.dtype

    assert [opened(kind) for kind in ("F32", "F16", "BF16", "Q8_0")] == ["float32", "float16", "bfloat16", "bfloat16"]


def test_llama3_scaling_is_recognized(tmp_path: Path) -> None:
    """The file has only the numbers that frequencies are divided by."""
    parameters = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    parameters |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    want = golden.read("llama-mha")
    config = {**registry.as_config(want.config)._hf.to_dict(), "rope_parameters": parameters}
    config["max_position_embeddings"] = 131072
    file = as_gguf.write(tmp_path / "a.gguf", config, {name: want.tensor(name) for name in want.tensors})
    assert replace(load.open_spec(folders.of(file)), dtype="float32") == registry.spec_of({**want.config, **config})


PAIRS = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
EMBEDDING = tensor("token_embd.weight", [8, 16], 0, 0)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"general.architecture": 1}, "'general.architecture' has 1, expected a text"),
    "another one": ({"general.architecture": "mamba"}, "'mamba' is not supported; supported: llama, qwen2,"),
    "a part of a model": ({"split.count": 3}, "is one of 3 parts of a model; join them"),
    "no heads": ({"llama.attention.head_count": 0}, "has 0 attention heads"),
    "many layers": ({"llama.block_count": 2**31 - 1}, "2147483647 layers"),
    "half a head": ({"llama.attention.key_length": 3, "llama.attention.value_length": 3}, "RoPE rotates 3 dims"),
    "a text for a number": ({"llama.context_length": "64"}, "'llama.context_length' has '64', expected a number"),
    "a flag for a number": ({"llama.context_length": True}, "has True, expected a number"),
    "layers that differ": ({"llama.attention.head_count_kv": [1, 2]}, "differs between layers"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "eps is nan"),
    "other values": ({"llama.attention.value_length": 7}, "values of another length than keys"),
    "scaling": ({"llama.rope.scaling.type": "x"}, "the RoPE scaling 'x' is not supported"),
}


@pytest.mark.parametrize(("changes", "fault"), BAD.values(), ids=BAD.keys())
def test_rejects_what_describes_no_model(changes: dict[str, Any], fault: str, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(blob({**PAIRS, **changes}, [EMBEDDING], bytes(512)))
    with pytest.raises(CheckpointError) as caught:
        folders.of(file)
    assert str(file) in str(caught.value) and fault in str(caught.value)
    assert not cache.exists() or not any(cache.iterdir())


TENSORS = {
    "missing": ([], "a.gguf: tensor 'model.norm.weight' is missing"),
    "unknown": ([tensor("blk.0.ssm_a", [8], 0, 512)], "'blk.0.ssm_a' is not part of a supported llama model"),
    "beyond the layers": ([tensor("blk.7.attn_q.weight", [8, 8], 0, 512)], "missing"),
    "experts of no matrix": ([tensor("blk.0.ffn_up_exps.weight", [8], 0, 512)], "expected one matrix for each expert"),
}


@pytest.mark.parametrize(("more", "fault"), TENSORS.values(), ids=TENSORS.keys())
def test_rejects_tensors_of_no_model(more: list[bytes], fault: str, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(blob(PAIRS, [EMBEDDING, *more], bytes(1024)))
    with pytest.raises(CheckpointError) as caught:
        load.load_model(file)
    assert str(file) in str(caught.value) and fault in str(caught.value)


def test_formats_are_those_of_the_issue() -> None:
    wanted = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F32", "F16", "BF16"}
    assert wanted <= FORMATS.keys()


@pytest.mark.parametrize("name", gguf_cases.CASES)
def test_logits_of_quantized_files_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """transformers decodes the blocks by itself."""
    spec, params = load.load_model(gguf_cases.write(name, tmp_path / "model.gguf"), dtype=jnp.float32)
    assert difference(spec, params, gguf_cases.PROMPT, gguf_cases.logits(name)) < TOLERANCE
