# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face configs. Only this module and families/ know their field names.

transformers' config classes fill in defaults and translate old fields (`rope_scaling`, `sliding_window_pattern`) to new
ones, so that a config means the same here as there. They are data classes: no model code, no torch, and never code from
a checkpoint.
"""

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jaxserve.errors import CheckpointError, one_line
from jaxserve.models.spec import (
    Activation,
    Attention,
    Dynamic,
    Layer,
    LinearScaling,
    Llama3,
    LongRope,
    Mlp,
    ModelSpec,
    Norm,
    Rope,
    Yarn,
)

MAX_CONFIG = 10_000_000


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from an untrusted file."""
    name = one_line(str(path), limit=1000)
    try:
        # Reading a pipe could block, and reading a device could never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{name} is not a regular file", "name a model folder with a config.json")
        if path.stat().st_size > MAX_CONFIG:
            raise CheckpointError(f"{name} is larger than {MAX_CONFIG} bytes", "check the file")
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise CheckpointError(f"{name} cannot be read ({reason})", "name a model folder with a config.json") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{name} is not valid JSON", "download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} is not a JSON object", "download it again")
    return cast(dict[str, Any], content)


class Config:
    """A config's values. Records which fields are read; tests compare them with all fields."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.asked.add(name)
        return getattr(self._hf, name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return getattr(self._hf, name, default)

    def refuse(self, reason: str = "", **supported: Any) -> None:
        """Raise unless fields have the given, supported values: refuse(clip_qkv=None)."""
        for name, value in supported.items():
            found = self.get(name, value)
            off = found is None and value is False
            if found != value and not off:
                problem = f"config.json sets {name} = {one_line(repr(found))}, which is not supported"
                raise CheckpointError(f"{problem} ({reason})" if reason else problem, f"only {value!r} is supported")


ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
}


def activation(name: Any) -> Activation:
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json has the unsupported activation {one_line(repr(name))}", f"supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def rms(config: Config, **options: Any) -> Norm:
    return Norm(kind="rms", eps=config.rms_norm_eps, **options)


def layer_norm(eps: float, **options: Any) -> Norm:
    return Norm(kind="layer", eps=eps, **{"bias": True} | options)


def model(config: Config, **options: Any) -> ModelSpec:
    """A ModelSpec from the fields that most families share; `options` add to or override them."""
    given: dict[str, Any] = dict(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden=config.hidden_size,
        max_positions=_longest(config, options["layers"]),
        tied=config.tie_word_embeddings,
    )
    return ModelSpec(**given | options)


def _longest(config: Config, layers: tuple[Layer, ...]) -> int:
    """`max_position_embeddings`, extended by RoPE scaling; the minimum over all layers."""
    longest: list[int] = []
    for layer in layers:
        scaling = layer.attention.rope.scaling if layer.attention.rope else None
        match scaling:
            case LinearScaling():
                longest.append(int(config.max_position_embeddings * scaling.factor))
            case Dynamic():
                longest.append(int(scaling.original * scaling.factor))
            case Yarn():
                longest.append(int(scaling.original * scaling.factor))
            case _:
                longest.append(config.max_position_embeddings)
    return min(longest, default=1)


def mlp(config: Config, **options: Any) -> Mlp:
    """An Mlp from the fields that most families share; `options` add to or override them."""
    if "width" not in options:
        options["width"] = config.intermediate_size
    if "activation" not in options:
        options["activation"] = activation(config.hidden_act)
    return Mlp(**options)


def attention(config: Config, *, partial_rotary: bool = False, interleaved: bool = False, **options: Any) -> Attention:
    """An Attention from the fields that most families share; `options` add to or override them."""
    heads = config.num_attention_heads
    head_dim = options.pop("head_dim", None) or config.get("head_dim") or config.hidden_size // heads
    if "rope" not in options:
        options["rope"] = rope(config, head_dim, partial=partial_rotary, interleaved=interleaved)
    return Attention(
        heads=heads,
        kv_heads=options.pop("kv_heads", None) or config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        scale=options.pop("scale", head_dim**-0.5),
        **options,
    )


def windows(config: Config) -> list[int | None]:
    """The sliding window of each layer, for the families that read `layer_types`."""
    count, kinds = config.num_hidden_layers, config.layer_types
    known = {"full_attention": None, "sliding_attention": config.get("sliding_window") or None}
    for kind in kinds:
        if kind not in known:
            raise CheckpointError(
                f"config.json has a layer of unsupported type {kind!r}", f"supported: {', '.join(known)}"
            )
    if "sliding_attention" in kinds and known["sliding_attention"] is None:
        raise CheckpointError("config.json has sliding_attention layers, but sliding_window is off", "check the file")
    if len(kinds) != count:
        raise CheckpointError(f"config.json lists {len(kinds)} layer_types for {count} layers", "check the file")
    return [known[kind] for kind in kinds]


def rope(
    config: Config, head_dim: int, *, kind: str | None = None, interleaved: bool = False, partial: bool = False
) -> Rope:
    """A Rope from `rope_parameters`, flat or (with a layer type as `kind`) nested by layer type.

    `partial`: the family uses partial_rotary_factor. For other families transformers rotates whole heads.
    """
    given: Mapping[str, Any] = config.rope_parameters or {}
    if kind is not None and kind in given:
        given = given[kind] or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise CheckpointError(
            "config.json has RoPE parameters per layer type", "use one set for all layers, as this family requires"
        )
    name = str(given.get("rope_type", "default"))
    part = float(given.get("partial_rotary_factor") or 1.0)
    if part != 1 and not partial:
        raise CheckpointError(
            f"config.json sets partial_rotary_factor = {part}, which is not supported", "only 1 is supported"
        )
    dim = int(head_dim * part)
    base = float(given.get("rope_theta") or 10_000.0)
    longest = config.max_position_embeddings
    original = given.get("original_max_position_embeddings") or longest
    factor = given.get("factor")
    magnitude = 1.0
    match name:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(factor=float(_given(given, "factor")))
        case "dynamic":
            scaling = Dynamic(factor=float(_given(given, "factor")), original=longest)
        case "llama3":
            low, high = float(_given(given, "low_freq_factor")), float(_given(given, "high_freq_factor"))
            factor = float(_given(given, "factor"))
            scaling = Llama3(factor=factor, original=original, low_freq=low, high_freq=high)
        case "yarn":
            factor = float(factor or longest / original)
            magnitude = _yarn_magnitude(given, factor)
            scaling = Yarn(
                factor=factor,
                original=original,
                beta_fast=float(given.get("beta_fast") or 32),
                beta_slow=float(given.get("beta_slow") or 1),
                truncate=bool(given.get("truncate", True)),
            )
        case "longrope" | "su":
            factor = float(factor or longest / original)
            default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            magnitude = float(given.get("attention_factor") or default)
            short, long = (_divisors(given, key, dim // 2) for key in ("short_factor", "long_factor"))
            scaling = LongRope(short=short, long=long, original=original)
        case _:
            supported = "default, linear, dynamic, llama3, yarn, longrope"
            raise CheckpointError(
                f"config.json has the unsupported RoPE type {one_line(repr(name))}", f"supported: {supported}"
            )
    return Rope(dim=dim, base=base, scaling=scaling, magnitude=magnitude, interleaved=interleaved)


def _given(parameters: Mapping[str, Any], key: str) -> Any:
    if parameters.get(key) is None:
        raise CheckpointError(f"config.json's RoPE parameters have no {key!r}", "check the file")
    return parameters[key]


def _divisors(parameters: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    values = tuple(float(value) for value in _given(parameters, key))
    if len(values) != count or not all(value > 0 for value in values):
        raise CheckpointError(f"config.json's RoPE {key} has {len(values)} values, expected {count}", "check the file")
    return values


def yarn_mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_magnitude(given: Mapping[str, Any], factor: float) -> float:
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    one, all_dims = given.get("mscale"), given.get("mscale_all_dim")
    if one and all_dims:
        return yarn_mscale(factor, one) / yarn_mscale(factor, all_dims)
    return yarn_mscale(factor, 1.0)
