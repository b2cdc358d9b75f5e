# SPDX-License-Identifier: Apache-2.0
"""The tensors of a GGUF file under the names that they have in a Hugging Face checkpoint."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.files.header import TensorInfo, quote
from convert.gguf import blocks, header
from convert.gguf.architectures import ARCHITECTURES, Architecture, config_of
from convert.gguf.fields import Fields

type Array = np.ndarray[Any, Any]

GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
    # Files of 2023 and early 2024 have a tensor for each expert.
    "ffn_gate.{number}": "block_sparse_moe.experts.{number}.w1",
    "ffn_up.{number}": "block_sparse_moe.experts.{number}.w3",
    "ffn_down.{number}": "block_sparse_moe.experts.{number}.w2",
}
# The config has what is in these: see rope.py.
IN_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_NAME = re.compile(r"blk\.(\d{1,4})\.([a-z_]+(?:\.(\d{1,4}))?)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class BlockTensor(TensorInfo):
    """A tensor that is decoded when it is read. `dtype` is a name in blocks.FORMATS; `shape` is that of the values."""

    head_dim: int = 0  # of heads whose rows alternate between the halves that RoPE rotates; 0: rows are in order
    offset: float = 0.0  # that was added to all values

    @property
    def rows(self) -> int:
        """How many rows it is read in: a plain list has one value in each."""
        single = len(self.shape) == 1 and blocks.FORMATS[self.dtype].columns > 1
        return 1 if single else int(np.prod(self.shape[:-1] if len(self.shape) > 1 else self.shape, dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        return (self.stop - self.start) // self.rows

    @property
    def quantized(self) -> bool:
        return blocks.FORMATS[self.dtype].unpack is not None

    def decoded(self, raw: Array) -> Array:
        """The values of consecutive rows, of whole heads, from their bytes [rows, row_bytes]: float32."""
        return self.in_order(blocks.values(self.dtype, raw)) - np.float32(self.offset)

    def in_order(self, rows: Array) -> Array:
        if not self.head_dim:
            return rows
        split = rows.reshape(-1, self.head_dim // 2, 2, *rows.shape[1:])
        return np.swapaxes(split, 1, 2).reshape(rows.shape)


def read(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a GGUF file, by their names in a Hugging Face checkpoint. Those that need no decoding are as in a
    safetensors file."""
    fields = Fields(header.read(path))
    config = config_of(fields)
    architecture = ARCHITECTURES[fields.architecture]
    known = {**LAYER, **(MIXTRAL if config["model_type"] == "mixtral" else {}), **architecture.names}
    found: dict[str, TensorInfo] = {}
    for name, info in fields.header.tensors.items():
        if name in IN_CONFIG:
            continue
        for given, part in _renamed(name, info, known, fields):
            if given in found:
                fields.fail(f"tensor {quote(name)} is there under another name too")
            found[given] = _stored(name, part, architecture, config["head_dim"])
    return found


def _renamed(name: str, info: TensorInfo, known: dict[str, str], fields: Fields) -> Iterator[tuple[str, TensorInfo]]:
    """The tensor, or one for each expert, under its name in a Hugging Face checkpoint."""
    plain, _, kind = name.rpartition(".")
    if plain in GLOBAL and kind in ("weight", "bias"):
        yield f"{GLOBAL[plain]}.{kind}", info
        return
    match = _NAME.fullmatch(name)
    number = match[3] if match else None
    part = match[2] if match else name
    key = part if number is None else f"{part.rpartition('.')[0]}.{{number}}"
    if not match or key not in known:
        fields.fail(f"tensor {quote(name)} is not part of a supported {fields.architecture} model", "use another file")
    given = f"model.layers.{int(match[1])}.{known[key].replace('{number}', number or '')}.{match[4]}"
    if "{expert}" not in given:
        # The gate of shared experts is a list of one row.
        shape = (1, *info.shape) if part == "ffn_gate_inp_shexp" and len(info.shape) == 1 else info.shape
        yield given, TensorInfo(info.dtype, shape, info.start, info.stop, info.file)
        return
    count, *shape = info.shape
    size = (info.stop - info.start) // count
    if not shape or count > 1 << 16 or shape[-1] % blocks.FORMATS[info.dtype].columns:
        fields.fail(f"tensor {quote(name)} has shape {list(info.shape)}, expected one matrix for each expert")
    for expert in range(count):
        start = info.start + expert * size
        yield (
            given.replace("{expert}", str(expert)),
            TensorInfo(info.dtype, tuple(shape), start, start + size, info.file),
        )


def _stored(name: str, info: TensorInfo, architecture: Architecture, head_dim: int) -> TensorInfo:
    split = architecture.interleaved and re.search(r"\.attn_[qk]\.", name) is not None
    offset = architecture.offset if name.endswith("norm.weight") else 0.0
    if not (split or offset or blocks.FORMATS[info.dtype].unpack):
        return info
    place = (info.dtype, info.shape, info.start, info.stop, info.file)
    return BlockTensor(*place, head_dim=head_dim if split else 0, offset=offset)
