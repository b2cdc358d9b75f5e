# SPDX-License-Identifier: Apache-2.0
"""From a model folder to parameters: errors, values and their shardings, memory."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import load
from convert.files.reader import Reader, aligned
from convert.load import LoadPlan
from convert.plan import Piece
from jaxserve.errors import JaxserveError
from jaxserve.models import param_layout, registry
from jaxserve.parallel import mesh
from tests.convert.folders import Tensors, edit_json, refused, same, tensors_of, write
from tests.golden import load as golden
from tests.models import tiny

BIAS, MOE, FUSED = "llama-bias", "mixtral", "phi3"
Q = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
QKV = "model.layers.0.self_attn.qkv_proj.weight"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_missing_tensor(tmp_path: Path) -> None:
    folder = write(tmp_path, BIAS, lambda tensors: tensors.pop(Q))
    refused(folder, str(folder), f"tensor '{Q}' is missing", "layers.0.attention.q.kernel [4, 16, 64]")


def test_missing_expert(tmp_path: Path) -> None:
    refused(write(tmp_path, MOE, lambda tensors: tensors.pop(EXPERT)), f"'{EXPERT}' is missing", "mlp.experts.up")


def test_unused_tensors(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors |= {"strange.weight": np.zeros(3, np.float32), "stranger": np.zeros(3, np.float32)}

    refused(
        write(tmp_path, BIAS, add), "model.safetensors: tensor 'strange", "config.json describes, and neither are 1"
    )


def test_layers_beyond_those_of_the_config(tmp_path: Path) -> None:
    refused(write(tmp_path, BIAS, num_hidden_layers=1), "tensor 'model.layers.1.", "is not part of the model")


def test_buffers_are_not_weights(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)

    load.load_model(write(tmp_path, BIAS, add))


@pytest.mark.parametrize(
    ("case", "name", "shape", "expected"),
    [
        (BIAS, "lm_head.weight", (64, 96), "has shape [64, 96], expected [96, 64]"),
        (BIAS, "model.layers.0.mlp.up_proj.weight", (64, 96), "has shape [64, 96], expected [96, 64]"),
        (BIAS, Q, (64, 63), "has shape [64, 63], expected [4, 16, 64]"),
        (BIAS, "model.norm.weight", (65,), "has shape [65], expected [64]"),
        (BIAS, "model.norm.weight", (), "has shape [], expected [64]"),
        (BIAS, "model.norm.weight", (0, 2**40), "has shape [0, 1099511627776], expected [64]"),
        (MOE, EXPERT, (64, 97), "has shape [64, 97], expected"),
        (FUSED, QKV, (129, 64), "has shape [129, 64], expected"),
        (FUSED, "model.layers.0.mlp.gate_up_proj.weight", (321, 64), "has shape [321, 64], "),
    ],
)
def test_wrong_shape(tmp_path: Path, case: str, name: str, shape: tuple[int, ...], expected: str) -> None:
    def change(tensors: Tensors) -> None:
        assert name in tensors
        tensors[name] = np.zeros(shape, np.float32)

    refused(write(tmp_path, case, change), f"model.safetensors: tensor '{name}' {expected}")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "int32"])
def test_wrong_dtype(tmp_path: Path, dtype: str) -> None:
    tensors = tensors_of(BIAS)
    write(tmp_path, BIAS)
    save_file(tensors | {Q: tensors[Q].astype(jnp.dtype(dtype))}, tmp_path / "model.safetensors")
    kind = "which is not a weight dtype" if dtype == "int32" else "a quantized form"
    refused(tmp_path, f"tensor '{Q}' has dtype", kind, "expected one of F64, F32, F16, BF16")


def test_other_folders(tmp_path: Path) -> None:
    refused(tmp_path, "config.json cannot be read (no such file or directory)")
    folder = write(tmp_path, BIAS)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "only in an unsupported format", "safetensors")


def test_quantized_checkpoint(tmp_path: Path) -> None:
    refused(write(tmp_path, BIAS, quantization_config={"quant_method": "tea"}), "is quantized", "tea")


def test_unknown_architecture(tmp_path: Path) -> None:
    message = refused(write(tmp_path, BIAS, architectures=["NewForCausalLM"]), "'NewForCausalLM' is not supported")
    assert all(name in message for name in registry.FAMILIES)


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    plan = load.open_model(write(tmp_path, BIAS))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(JaxserveError, match=r"cannot read .*model.safetensors \(the file was truncated\)"):
        load.read(plan)


def test_code_of_a_checkpoint_never_runs(tmp_path: Path) -> None:
    trap, folder = tmp_path / "trap", tmp_path / "model"
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    write(folder, BIAS, auto_map=auto_map)
    for name in ("code.py", "__init__.py", "tokenization.py"):
        (folder / name).write_text(f"open({str(trap)!r}, 'w')")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}')
    load.load_model(folder)
    edit_json(folder / "config.json", architectures=["Code"], model_type="code")
    refused(folder, "'Code' is not supported, and code from a checkpoint is never run")
    assert not trap.exists()


# --- where the values land ------------------------------------------------------------------------------------------

MESHES = [
    ("llama-gqa-tied", dict(tensor=2)),
    ("llama-mqa-3-layers", dict(tensor=4)),  # one KV head, stored four times
    ("qwen2-tied", dict(tensor=2)),
    (MOE, dict(tensor=2, expert=2)),
    ("deepseek-v3", dict(tensor=4)),
    ("gpt-oss", dict(tensor=2)),
    ("gpt2", dict(tensor=2)),
]


@pytest.mark.parametrize(("case", "sizes"), MESHES, ids=lambda value: str(value))
def test_each_device_gets_its_shard(tmp_path: Path, case: str, sizes: Any) -> None:
    folder = golden.write_checkpoint(case, tmp_path)
    spec, alone = load.load_model(folder)
    public = tiny.public_again(spec, alone)
    with jax.set_mesh(mesh.make_mesh(**sizes)):
        _, params = load.load_model(folder)
        same(params, tiny.engine_params(spec, public))


def test_padded_vocabulary_and_repeated_heads(tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:95]

    folder = write(tmp_path, "llama-mqa-3-layers", cut, vocab_size=95)
    spec, alone = load.load_model(folder)
    with jax.set_mesh(mesh.make_mesh(tensor=4)):
        _, params = load.load_model(folder)
        same(params, tiny.engine_params(spec, tiny.public_again(spec, alone)))
    assert params["head"].shape[0] == 96 and not np.asarray(params["head"])[95:].any()
    assert params["layers"][0]["attention"]["qkv"]["kernel"].shape[0] == 4


def test_public_values_are_those_of_the_file(tmp_path: Path) -> None:
    folder = golden.write_checkpoint(FUSED, tmp_path, shards=3)
    spec, params = load.load_model(folder)
    public, stored = param_layout.to_public_layout(spec, params), tensors_of(FUSED)
    attention = public["layers"][0]["attention"]
    rows = [np.asarray(attention[part]["kernel"]).reshape(-1, spec.hidden) for part in "qkv"]
    np.testing.assert_array_equal(np.concatenate(rows), stored[QKV])


def test_mixed_dtypes(tmp_path: Path) -> None:
    folder = write(tmp_path, BIAS)
    kinds = [np.float32, np.float16, np.float64, jnp.bfloat16]
    tensors = {name: value.astype(kinds[i % 4]) for i, (name, value) in enumerate(tensors_of(BIAS).items())}
    save_file(tensors, folder / "model.safetensors")
    _, params = load.load_model(folder)
    rounded = {name: value.astype(np.float32) for name, value in tensors.items()}
    save_file(rounded, folder / "model.safetensors")
    same(params, load.load_model(folder)[1])


def test_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = golden.write_checkpoint("gpt-oss", tmp_path, dtype="bfloat16")
    plan = load.open_model(folder)
    assert load.param_dtype(plan) == jnp.float32
    assert load.param_dtype(plan, "float16") == load.param_dtype(plan, jnp.float16) == jnp.float16
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert load.param_dtype(plan) == jnp.bfloat16
    _, params = load.load_model(folder)
    assert params["embed"]["weight"].dtype == jnp.bfloat16
    assert params["layers"][0]["attention"]["sinks"].dtype == jnp.float32  # whatever the rest is
    for wrong in ("int8", "float64", "nonsense"):
        with pytest.raises(JaxserveError, match="; choose one of bfloat16"):
            load.param_dtype(plan, wrong)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("held", ["float32", "float16", "bfloat16"])
def test_casts_are_numpys(tmp_path: Path, stored: str, held: str) -> None:
    folder = golden.write_checkpoint("gpt2", tmp_path, dtype=stored)
    _, params = load.load_model(folder, dtype=held)
    [table] = [value for name, value in load_file(folder / "model.safetensors").items() if name.endswith("wte.weight")]
    np.testing.assert_array_equal(np.asarray(params["embed"]["weight"]), table.astype(jnp.dtype(held)))


# --- how it is read -------------------------------------------------------------------------------------------------


def test_progress_adds_up(tmp_path: Path) -> None:
    folder = golden.write_checkpoint(MOE, tmp_path)
    reported: list[int] = []
    load.load_model(folder, progress=reported.append)
    assert sum(reported) == load.open_model(folder).bytes


def test_the_buffer_becomes_the_parameter() -> None:
    host = aligned((1000, 300), jnp.bfloat16)
    array = load._to_devices(host, jax.ShapeDtypeStruct(host.shape, host.dtype))  # pyright: ignore[reportPrivateUsage]
    assert array.unsafe_buffer_pointer() == host.ctypes.data


VIEWS: dict[str, Any] = {
    "whole": lambda x: x,
    "transposed": lambda x: x.T,
    "rows": lambda x: x[20:60],
    "columns": lambda x: x[:, 15:45],
    "every other": lambda x: x[:, 1::2].T,
    "backwards": lambda x: x[::-1],
    "blocks": lambda x: x.reshape(10, 12, 48)[:, :8].reshape(10, 2, 4, 48),
    "one of each block": lambda x: x.reshape(10, 12, 48)[:, 9],
    "a copy": lambda x: np.concatenate((x[60:], x[:60])),
    "one value": lambda x: x[3, 4, ...],
    "none": lambda x: x[:0],
}


@pytest.mark.parametrize("span", [64, 5000, 1 << 20])
@pytest.mark.parametrize("name", VIEWS)
def test_any_view_into_any_strides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, span: int) -> None:
    monkeypatch.setattr("convert.files.reader.SPAN", span)
    monkeypatch.setattr("convert.files.reader.HOLE", span // 10)
    values = np.random.default_rng(0).normal(size=(120, 48)).astype(np.float32)
    save_file({"a": np.zeros(1, np.uint8), "x": values}, tmp_path / "model.safetensors")
    info = load.plan.__globals__["read_checkpoint"](tmp_path)["x"]
    wanted = VIEWS[name](values)
    piece = Piece(info, lambda data, layer: VIEWS[name](data))
    plan = LoadPlan(tiny.SPECS["dense"], {("x",): [piece]})
    for dtype in (np.float32, np.float64):
        room = np.full((*wanted.shape, 3, 2), -1.0, dtype)
        for into in (np.zeros(wanted.shape, dtype), room[..., 1, 0], np.zeros(wanted.shape[::-1], dtype).T):
            with Reader() as reader:
                reader.fill(plan.copies(("x",), into, wanted.shape))
            np.testing.assert_array_equal(into, wanted)
        assert (room[..., 0, :] == -1).all() and (room[..., 1, 1] == -1).all()
