# SPDX-License-Identifier: Apache-2.0
"""The description of an architecture as frozen data. A family builds it from a Hugging Face config, which is not read
after that. Specs are hashable: jit takes them as static arguments, and equal specs share an executable.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cache, cached_property
from itertools import islice
from types import UnionType
from typing import Any, Literal, TypeAliasType, Union, cast, get_args, get_origin, get_type_hints

from jaxserve.errors import CheckpointError, one_line
from jaxserve.quant.scheme import Quantized, Rounding, Scheme
from jaxserve.quant.scheme import problems as scheme_problems


@dataclass(frozen=True, kw_only=True)
class ClampedSwiglu:
    """gate * sigmoid(alpha * gate) * (up + 1), both clamped to `limit` first."""

    alpha: float
    limit: float


type Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2"] | ClampedSwiglu


type Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES = ("bfloat16", "float16", "float32")
MAX_LAYERS = 1000  # the largest models have fewer than 200


@dataclass(frozen=True, kw_only=True)
class Norm:
    kind: Literal["rms", "layer"] = "rms"
    eps: float
    bias: bool = False
    weight: bool = True
    offset: float = 0.0  # added to the weight: Gemma stores w - 1


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Dynamic NTK: the base grows with the sequence length beyond `original`."""

    factor: float
    original: int


@dataclass(frozen=True, kw_only=True)
class Yarn:
    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class Llama3:
    factor: float
    original: int
    low_freq: float
    high_freq: float


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """One set of divisors for sequences up to `original`, another for longer ones."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int


@dataclass(frozen=True, kw_only=True)
class Rope:
    dim: int  # the first `dim` dims of a head are rotated, the rest pass through
    base: float
    scaling: LinearScaling | Dynamic | Yarn | Llama3 | LongRope | None = None
    magnitude: float = 1.0  # scales cos and sin (yarn, longrope)
    interleaved: bool = False  # pairs (0, 1), (2, 3), ... instead of (0, dim/2), ...

    @property
    def needs_length(self) -> bool:
        """Whether the angles depend on the sequence's current or final length."""
        return isinstance(self.scaling, Dynamic | LongRope)


@dataclass(frozen=True, kw_only=True)
class Attention:
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None  # a token attends to the last `window` tokens, including itself
    soft_cap: float | None = None
    sinks: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    # Scope of the QK norm: each head with shared weights, each head with its own, or all heads as one vector.
    qk_norm_over: Literal["head", "own_head", "all_heads"] = "head"
    norm_after_rope: bool = False

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """DeepSeek's MLA: keys and values are projections of one small latent vector per token."""

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    scale: float
    rope: Rope
    norm: Norm
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class StateArray:
    """A part of a recurrent layer's state."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype = "float32"


@dataclass(frozen=True, kw_only=True)
class Recurrent:
    """The base of mixers that keep a state of fixed size for each sequence instead of the KV of each token:
    convolutions, state-space models, linear attention. `decoder.MIXERS` has their modules."""

    state: tuple[StateArray, ...]

    @property
    def rope(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Mlp:
    width: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    down_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Router:
    experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid", "softmax_of_chosen"]
    normalize: bool = False  # divide the chosen weights by their sum
    norm_eps: float = 0.0
    groups: int = 1  # choose `top_groups` groups first, then experts within them
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    correction: bool = False  # a learned bias used for choosing experts, not for their weights
    scale: float = 1.0
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Moe:
    router: Router
    width: int
    activation: Activation
    bias: bool = False
    shared: Mlp | None = None
    shared_gate: bool = False


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block. None means no norm, but in a parallel block `mlp_in=None` means that the MLP shares `attention_in`."""

    attention: Attention | LatentAttention | Recurrent
    mlp: Mlp | Moe
    attention_in: Norm | None = None
    attention_out: Norm | None = None
    mlp_in: Norm | None = None
    mlp_out: Norm | None = None
    parallel: bool = False  # x + attention(x) + mlp(x)
    norm_the_sum: bool = False  # *_out norms act on the residual stream after the addition
    residual_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    family: str
    vocab_size: int
    hidden: int
    max_positions: int  # maximum sequence length
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    tied: bool
    # Of parameters and activations. A config does not determine it: whoever opens a model sets it.
    dtype: Dtype = "float32"
    quantized: tuple[Quantized, ...] = ()  # weights that are stored in several arrays
    embed_scale: float = 1.0
    embed_dim: int | None = None  # if it differs from `hidden`: projected in and out
    learned_positions: int | None = None  # rows of the position table
    position_offset: int = 0  # the row of position 0
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    generates: bool = True  # whether it has a language model's head; if not, it is `tied`, to need no other weights

    def __post_init__(self) -> None:
        _check(self)

    def without_head(self) -> "ModelSpec":
        """The same layers in a model whose hidden states are its output."""
        return replace(self, tied=True, head_bias=False, generates=False)

    def scheme_of(self, path: Sequence[str | int]) -> Scheme | None:
        """How the public tensor at this path is stored; None: as one array."""
        found = self._quantized(path)
        return found.scheme if found else None

    def rounding_of(self, path: Sequence[str | int]) -> Rounding | None:
        """How a plain weight is rounded to the scheme of this path; None if it is not."""
        found = self._quantized(path)
        return found.rounding if found else None

    def _quantized(self, path: Sequence[str | int]) -> Quantized | None:
        exact, general = list(path), list(path)
        if len(path) > 1 and path[0] == "layers":
            general[1] = "{layer}"
        keys = (".".join(map(str, each)) for each in (exact, general))
        return next((self._by_path[key] for key in keys if key in self._by_path), None)

    @cached_property
    def _by_path(self) -> dict[str, Quantized]:
        return {each.path: each for each in self.quantized}

    @property
    def unit(self) -> int:
        """The columns of a weight come in multiples of this number, because groups of them share values."""
        schemes = [each.scheme for each in self.quantized if each.scheme]
        return math.lcm(*(component.columns or 1 for scheme in schemes for component in scheme.components))

    @property
    def needs_rope_length(self) -> bool:
        return any(layer.attention.rope is not None and layer.attention.rope.needs_length for layer in self.layers)


def _check(spec: ModelSpec) -> None:
    """Configs are untrusted: reject absurd sizes before anything is allocated."""
    problems = list(islice(_problems(spec, ModelSpec, "model"), 1)) or list(_contradictions(spec))
    if problems:
        raise CheckpointError(f"the config is invalid: {problems[0]}", "check the file")


def _contradictions(spec: ModelSpec) -> Iterator[str]:
    if not spec.layers:
        yield "model has no layers"
    elif all(isinstance(layer.attention, Recurrent) for layer in spec.layers):
        yield "model has no layer with attention"
    for scheme in {each.scheme for each in spec.quantized if each.scheme}:
        yield from scheme_problems(scheme)
    if len(spec.layers) > MAX_LAYERS:
        yield f"model has {len(spec.layers):,} layers, expected at most {MAX_LAYERS}"
    for i, layer in enumerate(spec.layers):
        attention, mlp = layer.attention, layer.mlp
        if isinstance(attention, Attention):
            if attention.kv_heads > 0 and attention.heads % attention.kv_heads:
                yield f"layer {i}: {attention.heads} heads are not a multiple of {attention.kv_heads} KV heads"
            if attention.rope and not 0 < attention.rope.dim <= attention.head_dim:
                yield f"layer {i}: RoPE rotates {attention.rope.dim} of {attention.head_dim} head dims"
        for problem in _rope_contradictions(attention.rope) if attention.rope else ():
            yield f"layer {i}: RoPE {problem}"
        if attention.rope and attention.rope.dim % 2:
            yield f"layer {i}: RoPE rotates {attention.rope.dim} dims, expected an even number"
        if isinstance(mlp, Moe):
            router = mlp.router
            if router.experts % router.groups:
                yield f"layer {i}: {router.experts} experts are not a multiple of {router.groups} groups"
            chosen_from = router.experts // router.groups * router.top_groups
            if not (router.top_k <= chosen_from <= router.experts):
                yield f"layer {i}: top_k {router.top_k}, {chosen_from} of {router.experts} experts eligible"
            if router.groups > 1 and router.group_score == "top2_sum" and router.experts < 2 * router.groups:
                yield f"layer {i}: {router.groups} groups of {router.experts} experts have fewer than 2 experts each"


def _rope_contradictions(rope: Rope) -> Iterator[str]:
    """RoPE parameters that would give meaningless angles, which no later check would find."""
    scaling, positive = rope.scaling, {"magnitude": rope.magnitude}
    if rope.base <= 1:
        yield f"has base {rope.base}, expected above 1"
    if scaling is not None and not isinstance(scaling, LongRope):
        positive["factor"] = scaling.factor
    match scaling:
        case Yarn():
            positive |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        case Llama3():
            if not 0 < scaling.low_freq < scaling.high_freq:
                yield f"blends from {scaling.low_freq} to {scaling.high_freq}, expected increasing values"
        case LongRope():
            positive["smallest divisor"] = min((*scaling.short, *scaling.long), default=1.0)
        case Dynamic():
            if scaling.factor < 1 or rope.dim <= 2:
                yield f"has factor {scaling.factor} and {rope.dim} dims, expected at least 1 and more than 2"
        case _:
            pass
    for name, value in positive.items():
        if value < 1e-6:
            yield f"has {name} {value}, expected above zero"


def _problems(node: object, hint: Any, where: str) -> Iterator[str]:
    """Values of the wrong type, and numbers that are not finite or out of range."""
    if not _fits(node, hint):
        yield f"{where} is {one_line(repr(node))}"
    elif isinstance(node, tuple):
        for i, item in enumerate(cast(tuple[object, ...], node)):
            yield from _problems(item, get_args(hint)[0] if get_origin(hint) is tuple else object, f"{where}[{i}]")
    elif is_dataclass(node):
        for name, wanted in _hints(type(node)).items():
            yield from _problems(getattr(node, name), wanted, f"{where}.{name}")
    elif isinstance(node, float) and not math.isfinite(node):
        yield f"{where} is {node}"
    elif isinstance(node, int) and not isinstance(node, bool) and hint is not float and float not in get_args(hint):
        # Only an offset may be zero, and no real value reaches 2^31.
        low = 0 if where.endswith("position_offset") else 1
        if not low <= node < 2**31:
            yield f"{where} is {node}, expected {low} to {2**31 - 1}"


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, TypeAliasType):
        return _fits(value, hint.__value__)
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is None else isinstance(value, hint)


_hints = cache(get_type_hints)
