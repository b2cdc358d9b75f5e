# SPDX-License-Identifier: Apache-2.0
"""The edits of logits that a request can specify, and their device state: a row of `Controls` per request.

    logit_bias, allowed_token_ids, min_tokens -> repetition, frequency, presence penalties -> bad_words

All are pure functions for the caller to jit: `set_rows` then `add_counts` when requests take rows (again after a
preemption), `apply` on a step's logits, `update` with the sampled tokens. Donated controls are updated in place. A row
is undefined until its first `set_rows`; a request without such edits needs no row.

Independent of requests, steps and sampling. control_row.py packs the vectors on the host.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.sampling.control_row import (
    ANY,
    MAX_MASKED_STOPS,
    PENALTIES_OFF,
    RECENT_TOKENS,
    mask_words,
    sections,
)
from jaxserve.types.sampling_params import BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASES


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Controls:
    """R rows over a vocabulary of V. Lists have a fixed size; unused entries hold an id outside the vocabulary."""

    counts: jax.Array  # int32 [R, V]: 2 * times generated + in the prompt; 0 if no penalty reads it
    bias_ids: jax.Array  # int32 [R, MAX_BIASES]
    bias_values: jax.Array  # float32 [R, MAX_BIASES]
    allowed: jax.Array  # uint32 [R, ceil(V / 32)]: a bit per token, the lowest first
    stop_ids: jax.Array  # int32 [R, MAX_MASKED_STOPS]
    min_end: jax.Array  # int32 [R, 1]: stop ids are masked at positions before it
    penalties: jax.Array  # float32 [R, 3]: repetition, frequency, presence
    bad_words: jax.Array  # int32 [R, MAX_BAD_WORDS, BAD_WORD_TOKENS]: right-aligned sequences
    recent: jax.Array  # int32 [R, RECENT_TOKENS]: the last generated tokens, right-aligned


def allocate(rows: int, vocab_size: int) -> Controls:
    """Zeros, created on the device when jitted with static sizes."""
    return Controls(
        counts=jnp.zeros((rows, vocab_size), jnp.int32),
        bias_ids=jnp.zeros((rows, MAX_BIASES), jnp.int32),
        bias_values=jnp.zeros((rows, MAX_BIASES), jnp.float32),
        allowed=jnp.zeros((rows, mask_words(vocab_size)), jnp.uint32),
        stop_ids=jnp.zeros((rows, MAX_MASKED_STOPS), jnp.int32),
        min_end=jnp.zeros((rows, 1), jnp.int32),
        penalties=jnp.zeros((rows, len(PENALTIES_OFF)), jnp.float32),
        bad_words=jnp.zeros((rows, MAX_BAD_WORDS, BAD_WORD_TOKENS), jnp.int32),
        recent=jnp.zeros((rows, RECENT_TOKENS), jnp.int32),
    )


def abstract(rows: int, vocab_size: int, sharding: jax.sharding.Sharding | None = None) -> Controls:
    """Shapes and dtypes, with the given sharding on every array."""
    shapes = jax.eval_shape(lambda: allocate(rows, vocab_size))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def nbytes(rows: int, vocab_size: int) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract(rows, vocab_size)))


def set_rows(controls: Controls, vectors: jax.Array) -> Controls:
    """Overwrite rows from row vectors [n, row_size], and set their counts to 0. Rows that do not exist are skipped."""
    vocab_size = controls.counts.shape[1]
    parts = {name: vectors[:, place] for name, place in sections(vocab_size).items()}
    rows = parts.pop("row")[:, 0]
    new = {name: _rows_of(getattr(controls, name), part) for name, part in parts.items()}
    new["counts"] = jnp.zeros((rows.shape[0], vocab_size), jnp.int32)
    return Controls(**{name: getattr(controls, name).at[rows].set(new[name], mode="drop") for name in new})


def _rows_of(array: jax.Array, part: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(part, array.dtype).reshape(part.shape[0], *array.shape[1:])


def set_masks(controls: Controls, vectors: jax.Array) -> Controls:
    """Overwrite the allowed tokens of rows, [n, 1 + words]: the row, its mask. Rows that do not exist are skipped."""
    words = lax.bitcast_convert_type(vectors[:, 1:], jnp.uint32)
    return _with(controls, allowed=controls.allowed.at[vectors[:, 0]].set(words, mode="drop"))


def add_counts(controls: Controls, vector: jax.Array) -> Controls:
    """Add the codes of one count vector. Rows that do not exist are skipped."""
    rows, tokens, codes = vector
    return _with(controls, counts=controls.counts.at[rows, tokens].add(codes, mode="drop"))


def apply(
    controls: Controls,
    logits: jax.Array,
    *,
    rows: jax.Array,
    active: jax.Array,
    positions: jax.Array,
    edits: bool = True,
    masks: bool = True,
) -> jax.Array:
    """Apply their rows' edits to logits float32 [S, V]; `positions` [S]: the number of preceding tokens.

    Logits that are not `active`, or not affected by an edit, keep every bit. Masked entries become -inf. Without
    `edits` only the masks of allowed tokens are applied; without `masks`, everything else.
    """
    vocab_size = logits.shape[1]
    rows = jnp.where(active, rows, 0)
    words = controls.allowed[rows] if masks else None
    mine = active[:, None]
    if not edits:
        return logits if words is None else jnp.where(mine, _allow(logits, _bits(words, vocab_size)), logits)
    penalties = controls.penalties[rows]
    edited = _penalize(logits, controls.counts[rows], penalties)
    if words is not None:
        edited = _allow(edited, _bits(words, vocab_size))
    edited = jnp.where(mine, edited, logits)

    # Biases are applied before penalties, but there are few: compute and set their entries separately, to avoid
    # another pass over all logits.
    ids = jnp.where(mine, controls.bias_ids[rows], vocab_size)
    inside = jnp.minimum(ids, vocab_size - 1)
    biased = jnp.take_along_axis(logits, inside, axis=1) + controls.bias_values[rows]
    biased = _penalize(biased, controls.counts[rows[:, None], inside], penalties)
    if words is not None:
        biased = _allow(biased, jnp.take_along_axis(words, inside // 32, axis=1) >> (inside % 32).astype(jnp.uint32))
    edited = _put(edited, ids, biased)

    early = positions[:, None] < controls.min_end[rows]
    stops = jnp.where(early, controls.stop_ids[rows], vocab_size)
    banned = jnp.concatenate([stops, _bad_ids(controls, rows)], axis=1)
    return _put(edited, jnp.where(mine, banned, vocab_size), -jnp.inf)


def _penalize(logits: jax.Array, codes: jax.Array, penalties: jax.Array) -> jax.Array:
    """Apply penalties [S, 3], elementwise over [S, n]."""
    repetition, frequency, presence = (penalties[:, i, None] for i in range(3))
    # No arithmetic on logits without a code: even a multiplication by 1 changes subnormals and negative zeros.
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(codes > 0, repeated, logits)
    generated = codes >> 1
    return jnp.where(generated > 0, logits - frequency * generated.astype(jnp.float32) - presence, logits)


def _bits(words: jax.Array, vocab_size: int) -> jax.Array:
    """uint32 [S, words] -> [S, vocab_size], each in its lowest bit."""
    shifted = words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    return shifted.reshape(words.shape[0], -1)[:, :vocab_size]


def _allow(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """-inf unless the lowest bit is set."""
    return jnp.where((allowed & jnp.uint32(1)) != 0, logits, -jnp.inf)


def _bad_ids(controls: Controls, rows: jax.Array) -> jax.Array:
    """[S, MAX_BAD_WORDS]: the last token of each sequence that the next token could complete."""
    words = controls.bad_words[rows]
    before, last = words[:, :, :-1], words[:, :, -1]
    here = jnp.all((before == ANY) | (before == controls.recent[rows][:, None, :]), axis=2)
    return jnp.where(here, last, controls.counts.shape[1])


def _put(logits: jax.Array, ids: jax.Array, values: jax.Array | float) -> jax.Array:
    """`values` at `ids` [S, n] of each row; ids outside the vocabulary are skipped."""
    lines = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[lines, ids].set(values, mode="drop")


def update(controls: Controls, *, rows: jax.Array, active: jax.Array, tokens: jax.Array) -> Controls:
    """Record the sampled `tokens` [S]. Active entries must have distinct rows."""
    outside = controls.counts.shape[0]
    safe = jnp.where(active, rows, 0)
    recent = jnp.concatenate([controls.recent[safe, 1:], tokens[:, None]], axis=1)
    penalized = jnp.any(controls.penalties[safe] != jnp.array([PENALTIES_OFF], jnp.float32), axis=1)
    counted = jnp.where(active & penalized, rows, outside)
    return _with(
        controls,
        counts=controls.counts.at[counted, tokens].add(2, mode="drop"),
        recent=controls.recent.at[jnp.where(active, rows, outside)].set(recent, mode="drop"),
    )


def _with(controls: Controls, **arrays: jax.Array) -> Controls:
    return Controls(**{**vars(controls), **arrays})
