# SPDX-License-Identifier: Apache-2.0
"""Sections `check_kv_write` and `check_blocks`: written values are exact, and all other bits stay unchanged.

Pools start as random bits, including NaNs, so that stray writes and arithmetic on copied values are noticed.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.checks.attention import implementation
from pallas_kernels import block_copy, reference
from pallas_kernels.kv_write import kv_write, latent_write
from pallas_kernels.reference import LARGEST, Array, wide

WRITE_COLUMNS = ("tokens", "rounded", "worst_step", "untouched", "in_place", "ok")
BLOCK_COLUMNS = ("moved", "wrong", "untouched", "in_place", "ok")


@dataclass(frozen=True)
class WriteCase:
    name: str
    dtype: str = "bfloat16"
    pool: str | None = None  # None: the tokens' dtype
    scales: str | None = None  # "head" or "slot"
    tokens: int = 300
    blocks: int = 64
    block_size: int = 16
    heads: int = 8
    dim: int = 128
    latent: bool = False


def bits(x: Array) -> Array:
    return x.view(f"u{x.dtype.itemsize}")


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    kind = jnp.dtype(dtype)
    return rng.integers(0, 256, (*shape[:-1], shape[-1] * kind.itemsize), np.uint8).view(kind)


def random_slots(rng: np.random.Generator, tokens: int, slots: int) -> Array:
    """Distinct slots in random order. Of more than 7 tokens, every seventh and the last are padding."""
    chosen = rng.permutation(slots)[:tokens].astype(np.int32)
    if tokens > 7:
        chosen[::7] = -1
        chosen[-1] = -(2**31)
    return chosen


def quantised(x: Array, scale: Array | None, dtype: np.dtype) -> Array:
    """The exact quotient, clipped to the dtype's range: the stored code should be the nearest one."""
    limit = LARGEST[dtype.name]
    quotient = wide(x) if scale is None else wide(x) / wide(scale)[..., None]
    return np.clip(quotient, -limit, limit)


def steps_off(codes: Array, exact: Array) -> Array:
    """The distance of each stored code from the exact value, in the dtype's steps there; perfect rounding gives 0.5."""
    if codes.dtype == np.int8:
        return np.abs(codes - exact)
    limits = jnp.finfo(codes.dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(exact), float(limits.tiny))))
    return np.abs(wide(codes) - exact) / 2.0 ** (exponent - limits.nmant)


def judge_pool(written: Array, before: Array, new: Array, slots: Array, scale: Array | None) -> Row:
    """Compares one pool [slots, heads, dim] with what should have been written; `scale` is [tokens, heads] or None."""
    live = slots >= 0
    target = slots[live]
    others = np.ones(len(before), bool)
    others[target] = False
    untouched = bool((bits(written)[others] == bits(before)[others]).all())
    if written.dtype == new.dtype:
        wrong = int((bits(written[target]) != bits(new[live])).sum())
        return {"rounded": 0.0, "worst_step": float(wrong), "untouched": untouched, "ok": untouched and wrong == 0}
    off = steps_off(written[target], quantised(new[live], None if scale is None else scale[live], written.dtype))
    # A GPU may divide by multiplying with a reciprocal: then a quotient near a tie may, rarely, round the other way.
    worst, rounded = float(np.nan_to_num(off, nan=1e9).max(initial=0.0)), float((off > 0.5001).mean())
    return {
        "rounded": rounded,
        "worst_step": worst,
        "untouched": untouched,
        "ok": untouched and worst <= 1.01 and rounded < 5e-3,
    }


def check_write(rng: np.random.Generator, case: WriteCase) -> Row:
    pool_dtype = case.pool or case.dtype
    shape = (case.blocks, case.block_size, case.heads, case.dim)
    names = ("k", "v")
    before = {n: random_bits(rng, shape, pool_dtype) for n in names}
    new = {n: rng.standard_normal((case.tokens, *shape[2:]), np.float32).astype(jnp.dtype(case.dtype)) for n in names}
    new["k"][3:4] = 0  # a token of zeros, which gives no scale
    new["v"][4:5] *= 1000  # beyond float8's range
    slots = random_slots(rng, case.tokens, case.blocks * case.block_size)
    scale: dict[str, Array | None] = {n: None for n in names}
    if case.scales:
        form = (case.heads,) if case.scales == "head" else shape[:3]
        scale = {n: rng.uniform(0.01, 0.05, form).astype(np.float32) for n in names}
    pools = {n: jnp.asarray(before[n]) for n in names}
    device_scale = {n: None if scale[n] is None else jnp.asarray(scale[n]) for n in names}
    where = {n: pools[n].unsafe_buffer_pointer() for n in names}

    def write(pools: dict, scale: dict, new: dict, slots: jax.Array) -> tuple:
        return kv_write(pools["k"], pools["v"], new["k"], new["v"], slots, k_scale=scale["k"], v_scale=scale["v"])

    k_pool, v_pool, k_scale, v_scale = jax.jit(write, donate_argnums=0)(pools, device_scale, new, slots)
    row: Row = {"tokens": case.tokens, "ok": True}
    for name, pool, after in (("k", k_pool, k_scale), ("v", v_pool, v_scale)):
        used = judge_scales(scale[name], after, new[name], slots, jnp.dtype(pool_dtype), row)
        flat = (-1, *shape[2:])
        found = judge_pool(np.asarray(pool).reshape(flat), before[name].reshape(flat), new[name], slots, used)
        found["in_place"] = pool.unsafe_buffer_pointer() == where[name]
        found["ok"] = found["ok"] and found["in_place"] and row["ok"]
        row |= {k: max(row.get(k, 0), v) if isinstance(v, float) else row.get(k, True) and v for k, v in found.items()}
    return row


def judge_scales(
    before: Array | None, after: jax.Array | None, new: Array, slots: Array, dtype: np.dtype, row: Row
) -> Array | None:
    """The scale of each token and head [tokens, heads]; per-slot scales, which the op computes, are checked here."""
    if before is None:
        return None
    if before.ndim == 1:
        return np.broadcast_to(before, new.shape[:2])
    expected = reference.slot_scale(new, dtype)
    found = np.asarray(after).reshape(-1, new.shape[1])
    live = slots >= 0
    others = np.ones(len(found), bool)
    others[slots[live]] = False
    right = np.allclose(found[slots[live]], expected[live], rtol=1e-6, atol=0)
    kept = bool((bits(found)[others] == bits(before.reshape(found.shape))[others]).all())
    row["scales"] = bool(right and kept)
    row["ok"] = row["ok"] and row["scales"]
    per_token = np.ones(new.shape[:2], np.float32)
    per_token[live] = found[slots[live]]
    return per_token


def check_latent(rng: np.random.Generator, case: WriteCase) -> Row:
    dtype = jnp.dtype(case.pool or case.dtype)
    before = random_bits(rng, (case.blocks, case.block_size, case.dim), dtype.name)
    new = rng.standard_normal((case.tokens, case.dim), np.float32).astype(jnp.dtype(case.dtype))
    slots = random_slots(rng, case.tokens, case.blocks * case.block_size)
    scale = np.array([0.03], np.float32) if case.scales else None
    pool = jnp.asarray(before)
    where = pool.unsafe_buffer_pointer()
    write = jax.jit(lambda p, n, s, c: latent_write(p, n, s, pool_scale=c), donate_argnums=0)
    after = write(pool, new, slots, scale)
    per_token = None if scale is None else np.broadcast_to(scale, (case.tokens, 1))
    flat = (-1, 1, case.dim)
    row = judge_pool(np.asarray(after).reshape(flat), before.reshape(flat), new[:, None], slots, per_token)
    row |= {"tokens": case.tokens, "in_place": after.unsafe_buffer_pointer() == where}
    row["ok"] = row["ok"] and row["in_place"]
    return row


def write_cases(tiny: bool) -> list[WriteCase]:
    small: dict[str, Any] = dict(tokens=9, blocks=3, block_size=8, heads=2, dim=16) if tiny else {}
    kinds = [("bfloat16", None, None), ("bfloat16", "int8", "slot"), ("bfloat16", "float8_e4m3fn", None)]
    if not tiny:
        kinds += [("float32", None, None), ("float16", None, None), ("float32", "float8_e5m2", None)]
        kinds += [("bfloat16", pool, "head") for pool in ("int8", "float8_e4m3fn", "float8_e5m2")]
        kinds += [("bfloat16", "float8_e4m3fn", "slot"), ("float16", "float8_e4m3fn", "slot")]
    cases = [WriteCase(f"{d} into {p or d} scales={s}", d, p, s, **small) for d, p, s in kinds]
    latent: dict[str, Any] = dict(small, dim=48) if tiny else dict(dim=576)
    cases.append(WriteCase("latent bfloat16", latent=True, **latent))
    if not tiny:
        cases.append(WriteCase("latent float8_e4m3fn", pool="float8_e4m3fn", scales="head", latent=True, **latent))
        cases += [WriteCase(f"{h} heads of {d}", heads=h, dim=d) for h, d in ((1, 256), (3, 80), (5, 112), (16, 64))]
        cases += [WriteCase(f"{n} tokens", tokens=n, blocks=600) for n in (1, 2, 8192)]
    return cases


def run_kv_write(page: Page) -> None:
    def measure(case: WriteCase) -> Row:
        return (check_latent if case.latent else check_write)(page.rng, case)

    with implementation(page):
        page.each(write_cases(page.settings.tiny), measure, name=lambda case: case.name)


# --- blocks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockCase:
    name: str
    block: tuple[int, ...]  # shape of one block
    dtype: str
    blocks: int = 200
    moved: int = 60


def _pairs(rng: np.random.Generator, case: BlockCase) -> tuple[Array, Array]:
    """Disjoint sources and destinations; some entries of each are padding."""
    ids = rng.permutation(case.blocks)[: 2 * case.moved].astype(np.int32)
    sources, targets = ids[: case.moved].copy(), ids[case.moved :].copy()
    sources[::5], targets[3::5] = -1, -7
    return sources, targets


def _verdict(after: Array, expected: Array, touched: Array) -> Row:
    different = (bits(after) != bits(expected)).reshape(len(after), -1).any(axis=1)
    wrong, untouched = int(different[touched].sum()), not different[~touched].any()
    return {"wrong": wrong, "untouched": bool(untouched), "ok": wrong == 0 and bool(untouched)}


def check_blocks(rng: np.random.Generator, case: BlockCase) -> Row:
    """One copy, one gather and one scatter; the row is the sum of the three."""
    before = random_bits(rng, (case.blocks, *case.block), case.dtype)
    staged = random_bits(rng, (case.moved, *case.block), case.dtype)
    sources, targets = _pairs(rng, case)

    both = (sources >= 0) & (targets >= 0)
    copied = reference.copy_blocks(before, sources, targets)
    scattered = reference.scatter_blocks(before, staged, targets)
    gathered = reference.gather_blocks(before, sources)

    found = []
    for operation, arguments, expected, which in (
        (block_copy.copy_blocks, (sources, targets), copied, targets[both]),
        (block_copy.scatter_blocks, (staged, targets), scattered, targets[targets >= 0]),
    ):
        pool = jnp.asarray(before)
        where = pool.unsafe_buffer_pointer()
        after = jax.jit(operation, donate_argnums=0)(pool, *arguments)
        touched = np.zeros(case.blocks, bool)
        touched[which] = True
        found.append(_verdict(np.asarray(after), expected, touched))
        found[-1]["in_place"] = after.unsafe_buffer_pointer() == where
    out = np.asarray(jax.jit(block_copy.gather_blocks)(jnp.asarray(before), sources))
    found.append(_verdict(out, gathered, np.ones(case.moved, bool)))
    in_place = all(row.get("in_place", True) for row in found)
    return {
        "moved": case.moved,
        "wrong": sum(row["wrong"] for row in found),
        "untouched": all(row["untouched"] for row in found),
        "in_place": in_place,
        "ok": in_place and all(row["ok"] for row in found),
    }


def run_blocks(page: Page) -> None:
    if page.settings.tiny:
        cases = [BlockCase("bfloat16 8x2x16", (8, 2, 16), "bfloat16", 12, 5)]
    else:
        cases = [
            BlockCase("bfloat16 16x8x128", (16, 8, 128), "bfloat16"),
            BlockCase("float32 16x3x80", (16, 3, 80), "float32"),
            BlockCase("float16 256x8x128", (256, 8, 128), "float16", 40, 12),
            BlockCase("float8_e4m3fn 16x8x128", (16, 8, 128), "float8_e4m3fn"),
            BlockCase("int8 8x1x64", (8, 1, 64), "int8"),
            BlockCase("latents bfloat16 16x576", (16, 576), "bfloat16"),
            BlockCase("scales float32 16x8", (16, 8), "float32"),
        ]
    with implementation(page):
        page.each(cases, lambda case: check_blocks(page.rng, case), name=lambda case: case.name)
