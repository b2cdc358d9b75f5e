# SPDX-License-Identifier: Apache-2.0
"""Section `hazards`: what can go wrong only on a GPU.

races          repeated calls give the same bits
far offsets    pools of more than 2^31 elements, and one-byte pools of more than 4 GiB, used at their end
grid limits    1024 rows, 8192 tokens, and both
CUDA graphs    the kernels are captured, and the time that this saves per call
donation       a pool keeps its address through a chain of steps
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models
from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.checks import inputs
from benchmarks.gpu.checks.attention import TOLERANCE, compare, implementation
from benchmarks.gpu.checks.inputs import AttentionInputs, Lengths, MlaCase, PagedCase
from benchmarks.gpu.checks.poison import same_bits
from benchmarks.gpu.times import timing
from benchmarks.gpu.times import writes as time_writes
from pallas_kernels import reference
from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.kv_write import kv_write
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged import Ragged
from pallas_kernels.reference import Array
from pallas_kernels.sampling import RowParams, sample
from pallas_kernels.tuning import DecodeTiles

COLUMNS = ("value", "rel_error", "tolerance", "ok")

type Hazard = tuple[str, Callable[[], Row]]


# --- races ------------------------------------------------------------------------------------------------------


def repeated(function: Callable[[Any], Any], arguments: Any, *, times: int) -> Row:
    """Counts the calls whose result differs from the first in any bit."""
    call = jax.jit(function)
    first = jax.tree.map(np.asarray, call(arguments))
    # Launched without waiting: a race is most likely when the GPU is busy.
    others = [call(arguments) for _ in range(times - 1)]
    different = sum(not same_bits(jax.tree.map(np.asarray, other), first) for other in others)
    return {"value": different, "calls": times, "ok": different == 0}


def _attention(function: Callable[..., Any], given: AttentionInputs, *, times: int) -> Row:
    arrays = jax.tree.map(jnp.asarray, given.arrays)
    return repeated(lambda arrays: function(**arrays, **given.options, **given.tiles), arrays, times=times)


def _race_sampling(rng: np.random.Generator, *, tiny: bool, times: int) -> Row:
    vocabulary, rows = (300, 4) if tiny else (128256, 64)
    logits = jnp.asarray(3 * rng.standard_normal((rows, vocabulary), np.float32))
    numbers: list[Any] = [np.full(rows, 0.9, np.float32), np.full(rows, 50, np.int32)]
    numbers += [np.full(rows, 0.9, np.float32), np.full(rows, 0.01, np.float32)]
    numbers += [np.arange(rows, dtype=np.uint32), np.arange(rows, dtype=np.int32)]

    def draw(logits: jax.Array) -> Any:
        return sample(logits, RowParams(*numbers), mode="filtered", logprobs="raw", top_n=2)

    return repeated(draw, logits, times=times)


def _race_writes(rng: np.random.Generator, *, tiny: bool, times: int) -> Row:
    blocks, tokens, block = (4, 9, (8, 2, 16)) if tiny else (512, 4096, (16, 8, 128))
    pool = timing.random_pool(jax.ShapeDtypeStruct((blocks, *block), jnp.float8_e4m3fn))
    scale = jnp.ones((blocks, *block[:2]), jnp.float32)
    new = [inputs.normal(rng, (tokens, *block[1:]), "bfloat16") for _ in range(2)]
    slots = rng.permutation(blocks * block[0])[:tokens].astype(np.int32)

    def write(given: Any) -> Any:
        pool, scale, (k, v), slots = given
        return kv_write(pool, pool, k, v, slots, k_scale=scale, v_scale=scale)

    return repeated(write, (pool, scale, new, slots), times=times)


def race_cases(rng: np.random.Generator, *, tiny: bool) -> list[Hazard]:
    times = 3 if tiny else 50
    heads, latent = (inputs.TINY_PAGED, inputs.TINY_MLA) if tiny else ({}, {})
    kv_lens = (3, 20) if tiny else tuple(int(n) for n in rng.integers(1, 2000, 64))
    decode = Lengths(decode=kv_lens)
    mixed = Lengths(decode=kv_lens[:2], chunks=((700, 700), (300, 900), (17, 17)))
    splits: dict[str, Any] = {"decode_tiles": DecodeTiles(splits=2 if tiny else 8)}

    def paged(case: PagedCase) -> Callable[[], Row]:
        return lambda: _attention(paged_attention, inputs.paged(rng, case), times=times)

    def latents(lengths: Lengths) -> Row:
        return _attention(mla_attention, inputs.mla(rng, MlaCase("", lengths, **latent)), times=times)

    found = [
        ("race: decode in splits", paged(PagedCase("", decode, options=splits, **heads))),
        ("race: latent decode", lambda: latents(decode)),
        ("race: sampling", lambda: _race_sampling(rng, tiny=tiny, times=times)),
        ("race: kv_write", lambda: _race_writes(rng, tiny=tiny, times=times)),
    ]
    if not tiny:
        found += [
            ("race: decode", paged(PagedCase("", decode))),
            ("race: mixed", paged(PagedCase("", mixed))),
            ("race: latent mixed", lambda: latents(mixed)),
        ]
    return found


# --- far offsets ------------------------------------------------------------------------------------------------


def _blocks(pool: jax.Array, ids: Array) -> Array:
    """These blocks, read with XLA slices, which share no code with the kernels."""
    return np.asarray(jax.jit(lambda pool: jnp.stack([pool[int(at)] for at in ids]))(pool))


def far(rng: np.random.Generator, *, blocks: int, block: tuple[int, int, int], kv: str, heads: int) -> Row:
    """Blocks at both ends and in the middle of two pools, through every op that reads or writes them."""
    block_size, kv_heads, dim = block
    middle = blocks // 2
    ids = np.array([0, 1, middle - 1, middle, middle + 1, blocks - 3, blocks - 2, blocks - 1], np.int32)
    rng.shuffle(ids)
    kv_len = len(ids) * block_size
    new = {n: inputs.normal(rng, (kv_len, kv_heads, dim), "bfloat16") for n in ("k", "v")}
    slots = (ids[:, None] * block_size + np.arange(block_size, dtype=np.int32)).reshape(-1)
    order = rng.permutation(kv_len)

    fill = jax.jit(lambda: jnp.full((blocks, *block), jnp.nan, jnp.dtype(kv)))
    write = jax.jit(kv_write, donate_argnums=(0, 1))
    k_pool, v_pool, _, _ = write(fill(), fill(), new["k"][order], new["v"][order], slots[order])
    stored = {n: new[n].astype(jnp.dtype(kv)).reshape(len(ids), *block) for n in ("k", "v")}
    pools = {"k": k_pool, "v": v_pool}
    wrote = all(same_bits(_blocks(pools[n], ids), stored[n]) for n in pools)

    q = inputs.normal(rng, (2 + 5 + 3, heads, dim), "bfloat16")
    ragged = Ragged(
        block_tables=np.stack([ids] * 3),
        kv_lens=np.array([kv_len, kv_len - 1, kv_len], np.int32),
        cu_q_lens=np.array([0, 1, 2, 7], np.int32),
        distribution=np.array([2, 3], np.int32),
    )
    out = np.asarray(jax.jit(paged_attention)(q, k_pool, v_pool, ragged))
    near = replace(ragged, block_tables=np.stack([np.arange(len(ids), dtype=np.int32)] * 3))
    expected = reference.paged_attention(q, stored["k"], stored["v"], near)
    row = compare(out, expected, TOLERANCE["bfloat16"])
    del k_pool, pools
    moved = _move_far(v_pool, ids, stored["v"])
    row |= {"value": blocks * int(np.prod(block)), "written_right": wrote, "moved_right": moved}
    row["ok"] = bool(row["ok"] and wrote and moved)
    return row


def _move_far(pool: jax.Array, ids: Array, stored: Array) -> bool:
    """Gathers the blocks, copies some to free blocks nearby, and scatters them back in reverse order."""
    gathered = np.asarray(jax.jit(gather_blocks)(pool, ids))
    right = same_bits(gathered, stored)
    free = np.array([at for at in (2, 3, pool.shape[0] - 5, pool.shape[0] - 4) if at not in ids], np.int32)
    sources = ids[: len(free)]
    pool = jax.jit(copy_blocks, donate_argnums=0)(pool, sources, free)
    right &= same_bits(_blocks(pool, free), stored[: len(free)])
    pool = jax.jit(scatter_blocks, donate_argnums=0)(pool, stored[::-1].copy(), ids)
    right &= same_bits(_blocks(pool, ids), stored[::-1])
    pool.delete()
    return bool(right)


def far_cases(rng: np.random.Generator, *, tiny: bool) -> list[Hazard]:
    if tiny:
        return [("far: bfloat16", lambda: far(rng, blocks=32, block=(8, 2, 16), kv="bfloat16", heads=4))]
    block = (16, 8, 128)
    size = int(np.prod(block))
    return [
        (
            f"far: {kv} {name}",
            lambda kv=kv, total=total: far(rng, blocks=total // size + 64, block=block, kv=kv, heads=32),
        )
        for kv, name, total in (
            ("bfloat16", "beyond 2^31 elements", 2**31),
            ("bfloat16", "beyond 2^32 elements", 2**32),
            ("float8_e4m3fn", "just below 2 GiB", 2**31 - 65 * size),
            ("float8_e4m3fn", "beyond 4 GiB", 2**32),
            ("float8_e4m3fn", "beyond 8 GiB", 2**33),
        )
    ]


# --- grid limits ------------------------------------------------------------------------------------------------


def limit_cases(rng: np.random.Generator, *, tiny: bool) -> list[Hazard]:
    if tiny:
        shapes = {"limit: 20 rows": Lengths(decode=(5,) * 20)}
        heads = inputs.TINY_PAGED
    else:
        shapes = {
            "limit: 1024 decode rows": Lengths(decode=tuple(int(n) for n in rng.integers(0, 200, 1024))),
            "limit: 8192 tokens in one row": Lengths(chunks=((8192, 8192),)),
            "limit: 1024 rows of 8 tokens": Lengths(chunks=((8, 30),) * 1024, padding_tokens=0),
            "limit: 512 decode rows and 7680 tokens": Lengths(
                (77,) * 512, ((7000, 7000), (680, 700)), padding_tokens=0
            ),
            "limit: one row of 131072 tokens": Lengths(decode=(131072,)),
        }
        heads = dict(inputs.TINY_PAGED, dim=64, block_size=16)

    def measure(lengths: Lengths) -> Row:
        given = inputs.paged(rng, PagedCase("", lengths, **heads))
        call = jax.jit(lambda arrays: paged_attention(**arrays, **given.options))
        out = np.asarray(call(jax.tree.map(jnp.asarray, given.arrays)))
        expected = reference.paged_attention(**given.arrays, **given.options)
        return compare(out, expected, TOLERANCE["bfloat16"])

    return [(name, lambda lengths=lengths: measure(lengths)) for name, lengths in shapes.items()]


# --- CUDA graphs and donation -----------------------------------------------------------------------------------


def graphs(*, tiny: bool) -> Row:
    """Whether the kernels run in a CUDA graph by default, and the cost of a small call in a graph and outside.

    XLA dumps its launch plans; a captured kernel follows a command buffer there.
    """
    case = time_writes.write_case(models.TINY if tiny else models.LLAMA_8B, 4 if tiny else 64)
    few, many = (1, 2) if tiny else (8, 40)
    plain = {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        programs = {few: case.compile(few), many: case.compile(many, **dump)}
        plans = [path.read_text() for path in Path(folder).rglob("*thunk_sequence*")]
    without = {n: case.compile(n, **plain) for n in (few, many)} if plain else programs
    captured = any("kCommandBuffer" in plan for plan in plans)
    row: Row = {"captured": captured, "plans": len(plans)}
    for name, these in (("graph", programs), ("launches", without)):
        arrays = case.on_device(tuple(timing.random_pool(spec) for spec in case.pool))
        measured = timing.slope(these, arrays, donate=True)
        row |= {f"{name}_us": measured.us, f"{name}_spread": measured.spread, f"{name}_fixed_us": measured.fixed_us}
    row["value"] = row["launches_us"] - row["graph_us"]  # what the graph saves per call, in microseconds
    row["ok"] = captured or tiny
    return row


def donation(*, tiny: bool) -> Row:
    """The pools keep their addresses from step to step."""
    case = time_writes.write_case(models.TINY if tiny else models.LLAMA_8B, 4 if tiny else 64)
    arrays = case.on_device(tuple(timing.random_pool(spec) for spec in case.pool))
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(arrays.carry)]
    step = case.chain(1)
    carry = arrays.carry
    for _ in range(5):
        carry = step(carry, arrays.fixed, arrays.sets)
    after = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(carry)]
    moved = sum(a != b for a, b in zip(before, after, strict=True))
    return {"value": moved, "ok": moved == 0}


def run(page: Page) -> None:
    tiny = page.settings.tiny
    cases = [
        ("CUDA graphs", lambda: graphs(tiny=tiny)),
        ("donation", lambda: donation(tiny=tiny)),
        *race_cases(page.rng, tiny=tiny),
        *limit_cases(page.rng, tiny=tiny),
        *far_cases(page.rng, tiny=tiny),
    ]
    with implementation(page):
        page.each(cases, lambda case: case[1](), name=lambda case: case[0])
