# SPDX-License-Identifier: Apache-2.0
"""All programs that an engine runs on the devices, as pure functions. compiler.py makes executables of them.

    model     (body, cache, tables, last, vector) -> hidden, entries, cache, tables       decode[B], mixed[T]
              in model_programs.py; also in pieces that equal layers share
    head      (head, last, controls, hidden, entries) -> last, controls, result           head[S, variant]
    embed     (head, hidden) -> embeddings                                                embed[S]
    fresh     () -> cache, tables, last, controls            zeros
    edit      (cache, tables, vector) -> cache, tables       block table edits and block copies before a step
    copy_states   (cache, vectors) -> cache                  when a sequence is forked whose layers keep a state
    set_rows, add_counts   (controls, vector) -> controls    when requests with sampling controls take rows
    set_masks              (controls, vector) -> controls    before the head, for masks that depend on the last token

A step is `model`, then `head` if logits are needed and `embed` if hidden states are. They are separate programs because
the head's variants would otherwise multiply the compile time of `model`; the hidden states and entries passed between
them have one shape for all buckets. Parameters come as `body` and `head`: each program gets the part that it reads
(decoder.names). State is donated: cache, tables [groups, rows, width], last [rows, 2], controls. `last` has each row's
last sampled token, which is the next step's input, and its position, which is the row's length: how many of its tokens
have KV. So both stay on the device; only the device knows them while the host does not know how many drafts were right.
They are one array because both change together: one scatter writes them and one gather reads them. For the vector's
layout see packing.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxserve.engine.execute.model_programs import Cache, begin, edited, finish, layer, model
from jaxserve.engine.schedule import drafts, packing
from jaxserve.engine.schedule.need import Variant
from jaxserve.engine.schedule.packing import FIXED, GIVEN, POSITION, ROW, SAMPLES
from jaxserve.models import decoder, kv_cache
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.parallel import mesh
from jaxserve.sampling import controls as sampling_controls
from jaxserve.sampling.columns import COLUMNS, OF_PARAMS
from jaxserve.sampling.controls import Controls
from pallas_kernels import sampling


def fresh(tree: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[Cache, jax.Array, jax.Array, Controls]:
    """The initial state: zeros of these shapes."""
    return jax.tree.unflatten(tree, map(mesh.zeros, shapes))


def edit(cache: Cache, tables: jax.Array, vector: jax.Array) -> tuple[Cache, jax.Array]:
    cells, blocks = vector[: packing.EDITS_AT_ONCE], vector[packing.EDITS_AT_ONCE : 2 * packing.EDITS_AT_ONCE]
    sources, destinations = jnp.split(vector[2 * packing.EDITS_AT_ONCE :], 2)
    tables = mesh.island(edited, P(), P())(tables, cells, blocks)
    return kv_cache.move_blocks(cache, sources, destinations), tables


def copy_states(cache: Cache, vectors: jax.Array) -> Cache:
    """`vectors` [2, n]: rows to read, rows to write."""
    sources, destinations = vectors
    return kv_cache.copy_states(cache, sources, destinations)


def head(
    spec: ModelSpec,
    rows: int,
    variant: Variant,
    processed: bool,
    params: Params,
    last: jax.Array,
    controls: Controls | None,
    hidden: jax.Array,
    entries: jax.Array,
) -> tuple[jax.Array, Controls | None, jax.Array]:
    """The result is int32 [rows, 2]: token, valid; with log probabilities [rows, 4 + 2 * n]: also the token's, its
    rank, the n most likely tokens and theirs. Log probabilities are those of the model's raw distribution, or with
    `processed` of the distribution that is sampled from. `controls` are None for variants that do not read them.
    """
    logits = decoder.logits(spec, params, hidden[:rows])
    pick = partial(_pick, variant, processed)
    return mesh.island(pick, P(), P())(logits, entries[:rows], last, controls)


def embed(spec: ModelSpec, rows: int, params: Params, hidden: jax.Array) -> jax.Array:
    """Float32 [rows, hidden]: the head's input."""
    return decoder.final(spec, params, hidden[:rows]).astype(jnp.float32)


def _pick(
    variant: Variant,
    processed: bool,
    logits: jax.Array,
    entries: jax.Array,
    last: jax.Array,
    controls: Controls | None,
) -> tuple[jax.Array, Controls | None, jax.Array]:
    rows, positions, given = entries[:, ROW], entries[:, POSITION], entries[:, GIVEN]
    samples = entries[:, SAMPLES] > 0
    columns: dict[str, jax.Array] = dict(zip(COLUMNS, entries[:, FIXED:].T, strict=True))
    edited = logits
    if controls is not None:
        active = samples & (columns["controlled"] > 0)
        edited = sampling_controls.apply(
            controls,
            logits,
            rows=rows,
            active=active,
            positions=positions,
            edits=variant.controls,
            masks=variant.mask,
        )
    top_n = variant.top_n or 0
    processed &= variant.top_n is not None
    out = sampling.sample(
        edited,
        _sampled_by(columns, samples, positions),
        mode=variant.mode,
        logprobs="processed" if processed else None,
        top_n=top_n if processed else 0,
    )
    tokens = jnp.where(samples | (given < 0), out.tokens, given)
    # A row's tokens count up to the first that is not the draft in its place. Without a draft that is its only one.
    ends = samples & (tokens != given)
    ends &= ~_any_before(rows, ends)
    last = last.at[jnp.where(ends, rows, last.shape[0])].set(jnp.stack([tokens, positions], axis=1), mode="drop")
    if controls is not None and variant.controls:
        controls = sampling_controls.update(controls, rows=rows, active=active, tokens=tokens)
    result = [tokens, out.valid.astype(jnp.int32)]
    if variant.top_n is not None:
        likely = sampling.token_logprobs(logits, tokens, top_n=top_n)
        if out.logprobs is not None:  # prompts are always scored by the model's raw distribution
            likely = jax.tree.map(
                lambda raw, own: jnp.where(samples.reshape(-1, *(1,) * (raw.ndim - 1)), own, raw), likely, out.logprobs
            )
        result += [_bits(likely.logprobs), likely.ranks, *likely.top_tokens.T, *_bits(likely.top_logprobs).T]
    # State comes first: a donated array takes the place of the first output of its shape, which a result may have too.
    return last, controls, jnp.stack(result, axis=1)


def _any_before(rows: jax.Array, marked: jax.Array) -> jax.Array:
    """Whether an earlier entry of the same row is marked. A row's entries lie together, so this looks back as far as a
    row can have drafts: elementwise, since a scan or a reduction would be another launch on a GPU."""
    count = rows.shape[0]
    most = min(drafts.MOST, count - 1)
    earlier = jnp.pad(jnp.where(marked, rows, -2), (most, 0), constant_values=-2)  # -2: no entry has it as its row
    found = jnp.zeros_like(marked)
    for at in range(most):
        found |= earlier[at : at + count] == rows
    return found


def _sampled_by(columns: dict[str, jax.Array], samples: jax.Array, positions: jax.Array) -> sampling.RowParams:
    """Sampling parameters of the entries. Those that sample nothing get neutral values, since some parameters cannot be
    the zeros of the padding."""

    def column(name: str, dtype: str) -> jax.Array:
        return jax.lax.bitcast_convert_type(columns[name], jnp.dtype(dtype))

    given = {each.name: jnp.where(samples, column(each.name, each.dtype), each.off) for each in OF_PARAMS}
    return sampling.RowParams(**given, seed=column("seed", "uint32"), position=positions)


def _bits(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, jnp.int32)


# --- executables ----------------------------------------------------------------------------------------------------

DONATED: dict[Callable[..., Any], tuple[str, ...]] = {
    fresh: (),
    model: ("cache", "tables"),
    begin: ("tables",),
    layer: ("cache",),
    finish: (),
    head: ("last", "controls"),
    embed: (),
    edit: ("cache", "tables"),
    copy_states: ("cache",),
    sampling_controls.set_rows: ("controls",),
    sampling_controls.add_counts: ("controls",),
    sampling_controls.set_masks: ("controls",),
}
STATIC: dict[Callable[..., Any], tuple[str, ...]] = {
    fresh: ("tree", "shapes"),
    model: ("step",),
    begin: ("step",),
    layer: ("kind",),
    head: ("spec", "rows", "variant", "processed"),
    embed: ("spec", "rows"),
}


@dataclass(frozen=True)
class Program:
    """A function with its static arguments and the shapes of the others."""

    function: Callable[..., Any]
    static: tuple[Any, ...]
    shapes: tuple[Any, ...]
