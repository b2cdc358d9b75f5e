# SPDX-License-Identifier: Apache-2.0
"""A quantization that exists in tests alone: its arithmetic, its checkpoints, and the same model without it.

W[n, k] = (codes[n, k] - zeros[k // 4, n]) * scales[n] * tilt[k]: a component for each way to follow the weight. The
codes are as the matrix, the scales have no columns, the zeros are of groups of columns and stored columns first, and
all rows share the tilt. Checkpoints pack two codes in a word, transpose the zeros, and store the scales as float16.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.quant.formats import FORMATS
from jaxserve.quant.formats.format import Source, Tensors
from jaxserve.quant.scheme import Component, Scheme
from jaxserve.quant.tensor import QuantTensor, register
from tests.golden import load as golden

GROUP = 4
SCHEME = Scheme(
    kind="toy",
    components=(
        Component(name="codes", dtype="int8"),
        Component(name="scales", dtype="float32", columns=None),
        Component(name="zeros", dtype="int8", columns=GROUP, columns_first=True),
        Component(name="tilt", dtype="float32", rows=False),
    ),
)


@register("toy")
@dataclass(frozen=True)
class Toy(QuantTensor):
    def _exact(self) -> jax.Array:
        return (self.spread("codes") - self.spread("zeros")).astype(jnp.float32)

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        return (self._exact() * self.spread("scales") * self.spread("tilt")).astype(dtype)

    def matmul(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Scaled before and after the product, which is one with the codes."""
        matrix = self._exact().reshape(-1, self.shape[-1])
        y = jnp.matmul(x.astype(jnp.float32) * self.arrays["tilt"][None], matrix.T)
        return (y * self.arrays["scales"].reshape(1, -1)).astype(dtype)


def _codes(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.int8)


def _turned(zeros: np.ndarray) -> np.ndarray:
    return zeros.T


SOURCES = {
    "codes": Source(suffix=".weight_packed", unpack=_codes),
    "scales": Source(suffix=".weight_scale"),
    "zeros": Source(suffix=".weight_zeros", unpack=_turned),
    "tilt": Source(suffix=".weight_tilt"),
}


def ignored(layer: str, names: Sequence[str]) -> bool:
    """A name that ends in a dot is that of a block."""
    return any(layer.endswith(name) or (name.endswith(".") and name in layer) for name in names)


class ToyFormat:
    ignored: Sequence[str] = (r"\.weight_shape$",)
    notes: Sequence[str] = ()

    def __init__(self, settings: Mapping[str, Any], tensors: Tensors) -> None:
        self.settings = settings

    def scheme(self, layer: str) -> Scheme | None:
        return None if ignored(layer, self.settings["ignore"]) else SCHEME

    def source(self, layer: str, component: Component) -> Source:
        return SOURCES[component.name]


FORMATS["toy"] = ToyFormat


def quantize(name: str, shape: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
    """Components of a matrix by the names that checkpoints use. The tilt belongs to the inputs: layers that read the
    same share it."""
    random = np.random.default_rng([seed, *name.encode()])
    rows, columns = shape
    tilt = 1 + np.arange(columns, dtype=np.float32) % 5 / 8
    return {
        ".weight_packed": random.integers(-99, 100, shape, np.int8).view(np.int16),
        ".weight_scale": (random.uniform(0.5, 1.5, rows) / 60 / columns**0.5).astype(np.float16),
        ".weight_zeros": random.integers(-9, 10, (columns // GROUP, rows), np.int8),
        ".weight_tilt": tilt,
        ".weight_shape": np.array(shape, np.int64),
    }


def dequantized(stored: Mapping[str, np.ndarray]) -> np.ndarray:
    """By the formula, one group of columns after the other."""
    codes = stored[".weight_packed"].view(np.int8).astype(np.float64)
    for start in range(0, codes.shape[1], GROUP):
        codes[:, start : start + GROUP] -= stored[".weight_zeros"][start // GROUP][:, None]
    return codes * stored[".weight_scale"].astype(np.float64)[:, None] * stored[".weight_tilt"].astype(np.float64)


type Change = Callable[[np.ndarray], np.ndarray]


def write(
    folder: Path, case: str, *, ignore: Sequence[str], seed: int = 0, change: Mapping[str, Change] | None = None
) -> tuple[Path, Path]:
    """A golden case's model quantized, and the same model with plain weights. The matrices are random.

    `change`: edits of tensors of the quantized one, by the end of their names.
    """
    content = golden.read(case)
    plain: dict[str, np.ndarray] = {}
    packed: dict[str, np.ndarray] = {}
    for name, shape in content.tensors.items():
        layer = name.removesuffix(".weight")
        if len(shape) != 2 or name == layer or ignored(layer, ignore):
            plain[name] = packed[name] = content.tensor(name).astype(np.float32)
            continue
        stored = quantize(name, (shape[0], shape[1]), seed)
        plain[name] = dequantized(stored).astype(np.float32)
        packed |= {layer + suffix: value for suffix, value in stored.items()}
    for end, edit in (change or {}).items():
        packed |= {name: edit(value) for name, value in packed.items() if name.endswith(end)}
    config = content.config | {"quantization_config": {"quant_method": "toy", "ignore": list(ignore)}}
    return _write(folder / "quantized", config, packed), _write(folder / "plain", content.config, plain)


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    golden.write_folder(folder, config, {}, "float32", 1)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


# --- groups of columns in any order -----------------------------------------------------------------------------------

ORDERED = Scheme(
    kind="toy in any order",
    components=(
        Component(name="codes", dtype="int8"),
        Component(name="scales", dtype="float32", columns=GROUP, whole=True),
        Component(name="order", dtype="int32", rows=False),
    ),
)


@register("toy in any order")
@dataclass(frozen=True)
class Ordered(QuantTensor):
    """W[n, k] = codes[n, k] * scales[n, order[k]]: a shard of the columns may need the scales of any group."""

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        scales = self.arrays["scales"][..., self.arrays["order"]]
        return (self.arrays["codes"].astype(jnp.float32) * scales).astype(dtype)
