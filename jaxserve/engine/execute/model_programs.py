# SPDX-License-Identifier: Apache-2.0
"""A step's first program, from the packed vector to hidden states: whole, or in pieces that equal layers share.

    model     (body, cache, tables, last, vector) -> hidden, entries, cache, tables

    begin     (body, tables, last, vector) -> Begun               all before the first layer
    layer     (params, cache, x, turn, paged, rows) -> x, cache   one for each kind of layers
    finish    (x, sampled) -> hidden

For its arguments see programs.py, for the pieces' use layerwise.py.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxserve.engine.schedule import packing
from jaxserve.engine.schedule.packing import POSITION, TOKEN, Layout
from jaxserve.models import decoder
from jaxserve.models.attention import Paged
from jaxserve.models.cache_groups import Groups
from jaxserve.models.decoder import Params
from jaxserve.models.inputs import ModelInputs, PagedTokens
from jaxserve.models.kv_cache import LayerCache
from jaxserve.models.recurrent import Stateful
from jaxserve.models.rope import Angles
from jaxserve.models.spec import ModelSpec
from jaxserve.parallel import mesh
from pallas_kernels.ragged import Ragged

type Cache = list[LayerCache]


@dataclass(frozen=True)
class StepSpec:
    """What is static in a step's first program."""

    spec: ModelSpec
    groups: Groups
    layout: Layout
    most: int  # entries are padded to so many: they have the same shape in all layouts
    # The length that length-dependent RoPE assumes: one for all sequences, so that it does not depend on max_tokens and
    # cached keys stay valid.
    rope_length: int
    block_size: int


def model(
    step: StepSpec, params: Params, cache: Cache, tables: jax.Array, last: jax.Array, vector: jax.Array
) -> tuple[jax.Array, jax.Array, Cache, jax.Array]:
    tables, entries, inputs = _prepared(step, tables, last, vector)
    hidden, cache = decoder.hidden(step.spec, params, cache, inputs)
    return hidden, entries, cache, tables


# --- in pieces ------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(kw_only=True)
class Begun:
    """What the layers and the rest of a step read."""

    tables: jax.Array
    entries: jax.Array
    sampled: jax.Array
    x: jax.Array  # hidden states, which each layer replaces
    turns: tuple[Angles, ...]  # in the order of decoder.ropes
    paged: tuple[PagedTokens, ...]
    rows: jax.Array | None


def begin(step: StepSpec, params: Params, tables: jax.Array, last: jax.Array, vector: jax.Array) -> Begun:
    tables, entries, inputs = _prepared(step, tables, last, vector)
    body = decoder.bind(decoder.Body, step.spec, params)
    x, turns = body.enter(inputs.tokens, inputs.positions, inputs.rope_lengths)
    return Begun(
        tables=tables,
        entries=entries,
        sampled=inputs.sampled,
        x=x,
        turns=tuple(turns[rope] for rope in decoder.ropes(step.spec)),
        paged=inputs.paged,
        rows=inputs.rows,
    )


def layer(
    kind: Any,
    params: Params,
    cache: LayerCache,
    x: jax.Array,
    turn: Angles | None,
    paged: PagedTokens,
    rows: jax.Array | None,
) -> tuple[jax.Array, LayerCache | None]:
    """`rows` are None for layers that keep KV."""
    core = Paged(paged, cache) if rows is None else Stateful(rows, paged.ragged, cache)
    return decoder.layer(kind, params, x, turn, core)


def finish(x: jax.Array, sampled: jax.Array) -> jax.Array:
    return decoder.rows_at(x, sampled)


# --- inputs ---------------------------------------------------------------------------------------------------------


def _prepared(
    step: StepSpec, tables: jax.Array, last: jax.Array, vector: jax.Array
) -> tuple[jax.Array, jax.Array, ModelInputs]:
    """The block tables, the entries with their positions, and the decoder's inputs."""
    layout = step.layout

    def prepare(tables: jax.Array, last: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array, ModelInputs]:
        parts = {name: vector[at] for name, at in packing.places(layout).items()}
        tables = edited(tables, parts["cells"], parts["blocks"])
        entries = parts["entries"].reshape(layout.entries, len(packing.ENTRY))
        padding = step.most - layout.entries
        entries = jnp.pad(entries, ((0, padding), (0, 0)), constant_values=-1)
        inputs = _inputs(step.groups, layout, step.block_size, parts, tables, last, entries)
        # What an entry samples or scores is the token after its own.
        positions = inputs.positions.at[inputs.sampled].get(mode="promise_in_bounds") + 1
        columns = jax.lax.broadcasted_iota(jnp.int32, entries.shape, 1)
        entries = jnp.where(columns == POSITION, positions[:, None], entries)
        if step.spec.needs_rope_length:
            inputs = replace(inputs, rope_lengths=jnp.full(layout.tokens, step.rope_length, jnp.int32))
        return tables, entries, inputs

    return mesh.island(prepare, P(), P())(tables, last, vector)


def _inputs(
    groups: Groups,
    layout: Layout,
    block_size: int,
    parts: dict[str, jax.Array],
    tables: jax.Array,
    last: jax.Array,
    entries: jax.Array,
) -> ModelInputs:
    rows, kv_lens, starts = parts["rows"], parts["kv_lens"], parts["starts"]
    last = last.at[rows].get(mode="clip")
    kv_lens = jnp.where(kv_lens < 0, last[:, 1] - kv_lens, kv_lens)
    place = jnp.arange(layout.tokens, dtype=jnp.int32)
    if layout.decode:
        line, real = place, kv_lens > 0
        positions = jnp.maximum(kv_lens - 1, 0)
    else:
        # Not a binary search, which would be a loop on the device.
        line = jnp.searchsorted(starts[1:], place, side="right", method="compare_all").astype(jnp.int32)
        real = line < layout.rows
        line = jnp.minimum(line, layout.rows - 1)
        positions = jnp.where(real, kv_lens[line] - (starts[line + 1] - place), 0)

    def paged(tables: jax.Array) -> PagedTokens:
        block_tables = tables.at[rows].get(mode="clip")
        blocks = block_tables[line, positions // block_size]
        return PagedTokens(
            slots=jnp.where(real, blocks * block_size + positions % block_size, -1),
            ragged=Ragged(
                block_tables=block_tables,
                kv_lens=kv_lens,
                cu_q_lens=starts,
                distribution=parts["distribution"],
                decode_only=layout.decode,
            ),
        )

    fed = last[:, 0] if layout.decode else last[line, 0]
    return ModelInputs(
        tokens=jnp.where(parts["tokens"] < 0, fed, parts["tokens"]),
        positions=positions,
        paged=tuple(map(paged, tables)),
        groups=groups,
        rows=rows if groups.states else None,
        sampled=jnp.maximum(entries[:, TOKEN], 0),
    )


def edited(tables: jax.Array, cells: jax.Array, blocks: jax.Array) -> jax.Array:
    """Apply block table edits. A cell is an index of the flattened tables; negative ones are skipped."""
    _, count, width = tables.shape
    rows = cells // width
    groups = jnp.where(cells < 0, tables.shape[0], rows // count)
    return tables.at[groups, rows % count, cells % width].set(blocks, mode="drop")
