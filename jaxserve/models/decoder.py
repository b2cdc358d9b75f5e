# SPDX-License-Identifier: Apache-2.0
"""The decoder that runs every architecture. Its modules declare the parameters, which are passed as a nested dict.

    logits, cache = step(spec, params, cache, inputs)         serving, over paged KV
    logits = forward(spec, params, tokens)                    scoring and training, dense, differentiable

Both run the same blocks. `spec` is static: equal specs share an executable. Layers are unrolled, each as an inner jit,
so that equal layers are traced once and every layer has separate weights and cache.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.errors import JaxserveError
from jaxserve.models.attention import CachedLayers, Core, Cores, Dense, GroupedAttention
from jaxserve.models.inputs import ModelInputs
from jaxserve.models.kv_cache import LayerCache
from jaxserve.models.latent_attention import MultiHeadLatentAttention
from jaxserve.models.layers import Embedding, Linear, Normalize, lift
from jaxserve.models.linear import matmul
from jaxserve.models.mesh_fit import Fit
from jaxserve.models.mlp import FeedForward
from jaxserve.models.moe import MixtureOfExperts
from jaxserve.models.recurrent import Stateful
from jaxserve.models.rope import Angles, angles
from jaxserve.models.spec import Attention, LatentAttention, Layer, Mlp, ModelSpec, Norm, Recurrent, Rope
from jaxserve.models.weight import AxisSizes, param, store, weight
from jaxserve.parallel import mesh
from pallas_kernels.checks import is_concrete

Params = dict[str, Any]  # nested; leaves are arrays

# The module of each kind of recurrent layer: made of (spec, hidden, dtype=...), called like the modules of attention,
# with a Stateful or Dense core.
MIXERS: dict[type[Recurrent], Callable[..., Any]] = {}


class Block(nnx.Module):
    def __init__(self, spec: Layer, hidden: int, fitted: Fit, *, dtype: jnp.dtype) -> None:
        self.spec = spec
        if isinstance(spec.attention, Attention):
            self.attention = GroupedAttention(spec.attention, hidden, kv_repeat=fitted.kv_repeat, dtype=dtype)
        elif isinstance(spec.attention, LatentAttention):
            self.attention = MultiHeadLatentAttention(spec.attention, hidden, dtype=dtype)
        else:
            self.attention = MIXERS[type(spec.attention)](spec.attention, hidden, dtype=dtype)
        kind = FeedForward if isinstance(spec.mlp, Mlp) else MixtureOfExperts
        self.mlp = kind(spec.mlp, hidden, fitted, dtype=dtype)  # pyright: ignore[reportArgumentType]

        def norm(of: Norm | None) -> Normalize | None:
            return None if of is None else Normalize(of, {"hidden": hidden}, dtype=dtype)

        self.attention_in, self.attention_out = norm(spec.attention_in), norm(spec.attention_out)
        self.mlp_in, self.mlp_out = norm(spec.mlp_in), norm(spec.mlp_out)

    def __call__(
        self, x: jax.Array, turn: Angles | None, core: Core | Stateful, wanted: jax.Array | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """The hidden states of the `wanted` tokens, or of all; and the layer's cache."""

        def through(norm: Normalize | None, value: jax.Array) -> jax.Array:
            return value if norm is None else norm(value)

        spec = self.spec
        normed = through(self.attention_in, x)
        with jax.named_scope("attention"):
            attended, cache = self.attention(normed, turn, core)  # pyright: ignore[reportArgumentType]
        if wanted is not None:
            x, normed, attended = (rows_at(value, wanted) for value in (x, normed, attended))
        if spec.parallel:
            source = normed if self.mlp_in is None else self.mlp_in(x)
            with jax.named_scope("mlp"):
                return x + attended + self.mlp(source), cache
        if not spec.norm_the_sum:
            attended = through(self.attention_out, attended)
        x = x + attended * spec.residual_scale
        if spec.norm_the_sum:
            x = through(self.attention_out, x)
        with jax.named_scope("mlp"):
            out = self.mlp(through(self.mlp_in, x))
        if not spec.norm_the_sum:
            out = through(self.mlp_out, out)
        x = x + out * spec.residual_scale
        return through(self.mlp_out, x) if spec.norm_the_sum else x, cache


class Body(nnx.Module):
    """From tokens to the hidden states after the last block."""

    def __init__(self, spec: ModelSpec, fitted: Fit) -> None:
        self.spec, dtype = spec, jnp.dtype(spec.dtype)
        model, narrow, rows = _sizes(spec, fitted)
        self.embed = Embedding(rows, narrow, dtype=dtype)
        learned = None if spec.learned_positions is None else {"positions": spec.learned_positions}
        self.positions = Embedding(learned, model, dtype=dtype) if learned else None
        self.embed_in = Linear(model, narrow, dtype=dtype) if spec.embed_dim else None
        self.layers = nnx.List([Block(layer, spec.hidden, fitted, dtype=dtype) for layer in spec.layers])

    def enter(
        self, tokens: jax.Array, positions: jax.Array, rope_lengths: jax.Array | None
    ) -> tuple[jax.Array, dict[Rope | None, Angles]]:
        """The first block's input, and the angles of each kind of RoPE."""
        spec = self.spec
        x = self.embed(tokens)
        if spec.embed_scale != 1.0:
            x = x * jnp.asarray(spec.embed_scale, x.dtype)
        if self.embed_in is not None:
            x = self.embed_in(x)
        if self.positions is not None:
            x = x + self.positions(positions + spec.position_offset)
        return x, {rope: angles(rope, positions, rope_lengths) for rope in ropes(spec)}

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cores: Cores,
        *,
        wanted: jax.Array | None = None,
        rope_lengths: jax.Array | None = None,
        remat: bool = False,
    ) -> jax.Array:
        """Tokens and positions of equal shape -> hidden states after the last block.

        `wanted` [n]: indices of the tokens [T] to return hidden states of; default: all. The last block computes KV for
        every token, but what follows its attention only for these.
        """
        x, turns = self.enter(tokens, positions, rope_lengths)
        run = partial(_run_block, remat=remat)
        for place, block in enumerate(self.layers):
            declared, state = nnx.split(block)
            with jax.named_scope(f"layer{place}"):  # shown in traces
                turn = turns.get(block.spec.attention.rope)
                only = wanted if place == len(self.layers) - 1 else None
                x, updated = run(declared, nnx.to_pure_dict(state), x, turn, cores.of(place), only)
            cores.keep(place, updated)
        return x


class Head(nnx.Module):
    """From those to logits."""

    def __init__(self, spec: ModelSpec, fitted: Fit) -> None:
        self.spec, dtype = spec, jnp.dtype(spec.dtype)
        model, narrow, rows = _sizes(spec, fitted)
        self.final_norm = Normalize(spec.final_norm, model, dtype=dtype) if spec.final_norm else None
        self.embed_out = Linear(narrow, model, dtype=dtype) if spec.embed_dim else None
        self.embed = Embedding(rows, narrow, dtype=dtype) if spec.tied else None
        self.head = None if spec.tied else weight(rows, narrow, dtype)
        self.head_bias = param(rows, dtype) if spec.head_bias else None

    def final(self, x: jax.Array) -> jax.Array:
        """Hidden states after the last block -> the head's input."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x if self.embed_out is None else self.embed_out(x)

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states [..., hidden] -> float32 [..., vocab_size], replicated on every device."""
        spec, x = self.spec, self.final(x)
        output = self.head if self.embed is None else self.embed.weight
        assert output is not None
        logits = matmul(x, output, outs=("vocab",), dtype=jnp.dtype(jnp.float32))
        if self.head_bias is not None:
            logits = logits + lift(self.head_bias[...].astype(jnp.float32), logits)
        logits = mesh.replicated(logits)[..., : spec.vocab_size]
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        if spec.logit_soft_cap is not None:
            logits = spec.logit_soft_cap * jnp.tanh(logits / spec.logit_soft_cap)
        return logits


@partial(jax.jit, static_argnums=(0,), static_argnames=("remat",), inline=False)
def _run_block(
    declared: Any,
    params: Params,
    x: jax.Array,
    turn: Angles | None,
    core: Core | Stateful,
    wanted: jax.Array | None,
    *,
    remat: bool,
) -> tuple[jax.Array, LayerCache | None]:
    def run(params: Params, *inputs: Any) -> tuple[jax.Array, LayerCache | None]:
        return nnx.merge(declared, params)(*inputs)

    return (jax.checkpoint(run) if remat else run)(params, x, turn, core, wanted)


def rows_at(x: jax.Array, places: jax.Array) -> jax.Array:
    """The rows at `places`, which must be in bounds."""
    return x.at[places].get(mode="promise_in_bounds")


def _sizes(spec: ModelSpec, fitted: Fit) -> tuple[AxisSizes, AxisSizes, AxisSizes]:
    """Axes of hidden states, of embeddings, and of the vocabulary."""
    model = {"hidden": spec.hidden}
    return model, {"latent": spec.embed_dim} if spec.embed_dim else model, {"vocab": fitted.rows(spec.vocab_size)}


@cache
def _declare(part: type[Body | Head], spec: ModelSpec, fitted: Fit) -> tuple[Any, Any]:
    """A part of the decoder without arrays: flax's graph, which is independent of sizes, and the abstract state."""

    def declared() -> Body | Head:
        module = part(spec, replace(fitted, unit=spec.unit))
        if spec.quantized:
            store(module, spec, fitted)
        return module

    return nnx.split(nnx.eval_shape(declared))


def declare(spec: ModelSpec, fitted: Fit) -> Params:
    """The engine layout's tree with flax's abstract variables as leaves, which have the names of their axes."""
    return {
        name: node
        for part in (Body, Head)
        for name, node in nnx.to_pure_dict(_declare(part, spec, fitted)[1], extract_fn=_itself).items()
    }


def _itself(variable: Any) -> Any:
    return variable


def names(part: type[Body | Head], spec: ModelSpec) -> tuple[str, ...]:
    """Which entries of the parameters this part of the decoder reads."""
    return tuple(nnx.to_pure_dict(_declare(part, spec, Fit())[1]))


def bind[Part: Body | Head](part: type[Part], spec: ModelSpec, params: Params) -> Part:
    """A part of the decoder with these parameters, or with its part of all (engine layout); call it inside a trace."""
    graph, state = _declare(part, spec, Fit())
    mine = {name: params[name] for name in names(part, spec) if name in params}
    _check_structure(nnx.to_pure_dict(state), mine)
    return nnx.merge(graph, mine)


@cache
def kinds(spec: ModelSpec) -> tuple[Any, ...]:
    """Of each layer what `layer` needs to know of it. Equal layers have equal kinds."""
    body = nnx.merge(*_declare(Body, spec, Fit()))
    return tuple(nnx.split(block)[0] for block in body.layers)


def ropes(spec: ModelSpec) -> tuple[Rope, ...]:
    """The kinds of RoPE that the layers use."""
    used = dict.fromkeys(layer.attention.rope for layer in spec.layers)
    return tuple(rope for rope in used if rope is not None)


def layer(
    kind: Any, params: Params, x: jax.Array, turn: Angles | None, core: Core | Stateful
) -> tuple[jax.Array, LayerCache | None]:
    """One layer of `hidden`, with its part of the parameters: all tokens' hidden states, and the layer's cache."""
    return _run_block(kind, params, x, turn, core, None, remat=False)


def check_engine(spec: ModelSpec, params: Params) -> None:
    """Check by its names that the tree is in engine layout for this spec."""
    _check_structure(declare(spec, Fit()), params)


def _check_structure(declared: Params, params: Params) -> None:
    wanted = jax.tree.structure(declared, is_leaf=lambda node: isinstance(node, nnx.Variable))
    if wanted != jax.tree.structure(params):
        problem = "the parameters are not in this model's engine layout"
        raise JaxserveError(
            problem, "load them with load_model, or convert the public tree with layout.to_engine_layout"
        )


def step(
    spec: ModelSpec, params: Params, cache: list[LayerCache], inputs: ModelInputs
) -> tuple[jax.Array, list[LayerCache]]:
    """Run one ragged batch: float32 logits [sampled, vocab], and the cache, which the caller's jit should donate."""
    rows, cache = hidden(spec, params, cache, inputs)
    return logits(spec, params, rows), cache


def hidden(
    spec: ModelSpec, params: Params, cache: list[LayerCache], inputs: ModelInputs
) -> tuple[jax.Array, list[LayerCache]]:
    """The first part of `step`: the last block's output for the sampled tokens, [sampled, hidden]. `params` may be the
    body's alone."""
    body = bind(Body, spec, params)
    cores = CachedLayers(spec, inputs, cache)
    wanted = inputs.sampled
    early = len(wanted) < len(inputs.tokens)
    x = body(inputs.tokens, inputs.positions, cores, wanted=wanted if early else None, rope_lengths=inputs.rope_lengths)
    return x if early else rows_at(x, wanted), cores.pools


def logits(spec: ModelSpec, params: Params, rows: jax.Array) -> jax.Array:
    """The second part of `step`: float32 logits of these rows. `params` may be the head's alone."""
    return bind(Head, spec, params).logits(rows)


def final(spec: ModelSpec, params: Params, rows: jax.Array) -> jax.Array:
    """These rows as the head receives them, which embedding models call the last hidden state. `params` may be the
    head's alone."""
    return bind(Head, spec, params).final(rows)


def forward(
    spec: ModelSpec,
    params: Params,
    tokens: jax.Array,
    *,
    rope_lengths: jax.Array | None = None,
    remat: bool = False,
) -> jax.Array:
    """Float32 logits [batch, length, vocab] of int32 tokens [batch, length], optionally padded on the right.

    Pure and differentiable in `params` (engine layout; param_layout.to_engine_layout is differentiable too). `remat`
    recomputes each block in the backward pass. `rope_lengths` [batch]: the sequence lengths for length-dependent RoPE
    (dynamic, longrope); default: `length`.
    """
    _check_tokens(spec, tokens)
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape, out_sharding=_as(tokens))
    if rope_lengths is None:
        rope_lengths = jnp.full((batch,), length, jnp.int32)
    elif getattr(rope_lengths, "shape", None) != (batch,) or rope_lengths.dtype != jnp.int32:
        raise ValueError(f"rope_lengths must be int32[{batch}], one length for each sequence")
    lengths = jnp.broadcast_to(rope_lengths[:, None], tokens.shape) if spec.needs_rope_length else None
    check_engine(spec, params)
    x = bind(Body, spec, params)(tokens, positions, Dense(), rope_lengths=lengths, remat=remat)
    return bind(Head, spec, params).logits(x)


def _check_tokens(spec: ModelSpec, tokens: jax.Array) -> None:
    """Check what is known at trace time; under jit an id out of range turns its sequence's logits into NaN."""
    if not isinstance(tokens, jax.Array | np.ndarray):
        raise ValueError(f"tokens are a {type(tokens).__name__}, expected an array int32[batch, length]")
    if tokens.ndim != 2 or tokens.dtype != jnp.int32 or tokens.shape[1] == 0:
        raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}, expected int32[batch, length]")
    if tokens.shape[1] > spec.max_positions:
        raise ValueError(f"tokens have length {tokens.shape[1]}, above the model's limit of {spec.max_positions}")
    if is_concrete(tokens) and tokens.size:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= spec.vocab_size:
            raise ValueError(f"token ids range from {low} to {high}, expected 0 to {spec.vocab_size - 1}")


def _as(array: jax.Array) -> Any:
    return mesh.out_sharding(array, array.ndim, ())
