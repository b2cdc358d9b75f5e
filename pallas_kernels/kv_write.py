# SPDX-License-Identifier: Apache-2.0
"""Write the keys and values of new tokens into their slots of the paged pools, in place.

    pool[slots[t] // block_size, slots[t] % block_size] = new[t]   for every t with 0 <= slots[t] < blocks * block_size

    k_pool, v_pool  [blocks, block_size, kv_heads, dim]
    k, v            [tokens, kv_heads, dim]                     float32 | bfloat16 | float16
    slots           int32 [tokens]    block * block_size + offset, each slot at most once; negative: not written
    k_scale, v_scale  float32, for one-byte pools: [kv_heads], which is read; or [blocks, block_size, kv_heads], one
                    scale per slot and head, which is computed from the token's largest magnitude and written

A pool of k's dtype stores the values as they are. A one-byte pool stores value / scale, clipped to the range of its
dtype and, for int8, rounded half up; without scales only float8 can be written. `latent_write` does the same for the
single pool of MLA. Donate the pools in your jit, or XLA copies them first; one array cannot be donated as both.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import checks, dispatch
from pallas_kernels.flash import next_power_of_two
from pallas_kernels.on_cpu import kv_write as on_cpu
from pallas_kernels.one_byte import encode, scale_of


class Written(NamedTuple):
    """The pools and scales after the write; a scale is None if none was passed."""

    k_pool: jax.Array
    v_pool: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None


class _PoolWrite(NamedTuple):
    """One pool [blocks, block_size, heads, dim] and what is written to it."""

    name: str
    pool: jax.Array
    new: jax.Array
    scale: jax.Array | None


def kv_write(
    k_pool: jax.Array,
    v_pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> Written:
    """Write both pools in one pass over the tokens."""
    k_pool, v_pool, k, v, slots = (jnp.asarray(array) for array in (k_pool, v_pool, k, v, slots))
    k_scale, v_scale = (None if scale is None else jnp.asarray(scale) for scale in (k_scale, v_scale))
    checks.check_kv_pools(k_pool, v_pool)
    checks.check_rank("k", k, "tokens kv_heads dim")
    checks.check_rank("v", v, "tokens kv_heads dim")
    writes = (_PoolWrite("k", k_pool, k, k_scale), _PoolWrite("v", v_pool, v, v_scale))
    (k_pool, k_scale), (v_pool, v_scale) = _write(writes, slots)
    return Written(k_pool, v_pool, k_scale, v_scale)


def latent_write(
    pool: jax.Array, new: jax.Array, slots: jax.Array, *, pool_scale: jax.Array | None = None
) -> jax.Array:
    """Write latents [tokens, dim] into a pool [blocks, block_size, dim]; `pool_scale` is float32 [1]."""
    pool, new, slots = (jnp.asarray(array) for array in (pool, new, slots))
    checks.check_rank("pool", pool, "blocks block_size dim")
    checks.check_rank("new", new, "tokens dim")
    if pool_scale is not None:
        checks.check_shape("pool_scale", pool_scale, (1,), "one number for the whole pool")
    write = _PoolWrite("latent", pool[:, :, None, :], new[:, None, :], pool_scale)
    [(written, _)] = _write((write,), slots)
    return written.reshape(pool.shape)


def _check(write: _PoolWrite, slots: jax.Array) -> None:
    name, pool, new, scale = write
    checks.check_float(name, new)
    checks.check_kv_dtype(new.dtype, pool.dtype)
    checks.check_pool(f"{name}_pool", pool.shape, pool.dtype)
    checks.check_kv_scale(f"{name}_scale", scale, pool, pool.shape[2])
    checks.check_shape("slots", slots, (new.shape[0],), f"{name} has {new.shape[0]} tokens")
    checks.require(
        new.shape[1:] == pool.shape[2:],
        f"{name} has heads and dim {tuple(new.shape[1:])}, its pool {tuple(pool.shape[2:])}",
    )
    checks.require(
        pool.dtype != jnp.int8 or scale is not None,
        f"{name}_pool is int8 and {name}_scale is None: int8 needs scales, per head or per slot",
    )


def _write(writes: tuple[_PoolWrite, ...], slots: jax.Array) -> list[tuple[jax.Array, jax.Array | None]]:
    checks.check_int32("slots", slots)
    for write in writes:
        _check(write, slots)
    if checks.is_concrete(slots):
        check_slots(np.asarray(slots), slots_in_pool=writes[0].pool.shape[0] * writes[0].pool.shape[1])
    if slots.shape[0] == 0:
        return [(write.pool, write.scale) for write in writes]
    if dispatch.implementation() == "cpu":
        return [on_cpu.kv_write(*write[1:], slots) for write in writes]
    return _kernel_call(writes, slots)


def check_slots(slots: np.ndarray, *, slots_in_pool: int) -> None:
    """Check that slot ids are within the pool and that none occurs twice."""
    used = slots[slots >= 0]
    checks.require(
        used.size == 0 or int(used.max()) < slots_in_pool,
        f"slot {int(used.max(initial=0))} is outside the pool of {slots_in_pool} slots",
    )
    ids, counts = np.unique(used, return_counts=True)
    checks.require(
        ids.size == used.size,
        f"slot {ids[counts > 1][:1]} is written {counts[counts > 1][:1]} times in one call, expected once",
    )


# --- kernel -----------------------------------------------------------------------------------------------------


def _kernel(refs: dict[str, Any], *out_refs: Any, outputs: dict[str, int], names: tuple[str, ...]) -> None:
    token = pl.program_id(0)
    slot = refs["slots"][token]
    blocks, block_size = out_refs[0].shape[:2]

    @pl.when((slot >= 0) & (slot < blocks * block_size))
    def _() -> None:
        block, offset = slot // block_size, slot % block_size
        for name in names:
            pool = out_refs[outputs[f"{name}_pool"]]
            heads, dim = pool.shape[2:]
            head = jnp.arange(next_power_of_two(heads), dtype=jnp.int32)
            column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)
            exists = (head < heads)[:, None] & (column < dim)[None, :]
            new = refs[name]
            x = plt.load(new.at[token, head[:, None], column[None, :]], mask=exists, other=jnp.zeros((), new.dtype))
            if checks.is_one_byte(pool.dtype):
                x = x.astype(jnp.float32)
                scale = None
                if f"{name}_scale" in outputs:
                    scale = scale_of(x, pool.dtype)
                    plt.store(out_refs[outputs[f"{name}_scale"]].at[block, offset, head], scale, mask=head < heads)
                elif f"{name}_scale" in refs:
                    scale = plt.load(refs[f"{name}_scale"].at[head], mask=head < heads, other=1.0)
                x = encode(x, None if scale is None else scale[:, None], pool.dtype)
            plt.store(pool.at[block, offset, head[:, None], column[None, :]], x, mask=exists)


def _kernel_call(writes: tuple[_PoolWrite, ...], slots: jax.Array) -> list[tuple[jax.Array, jax.Array | None]]:
    inputs: dict[str, jax.Array] = {"slots": slots}
    outputs: dict[str, int] = {}
    for name, pool, new, scale in writes:
        inputs[name] = new
        inputs[f"{name}_pool"] = pool
        outputs[f"{name}_pool"] = len(outputs)
        if scale is not None:
            inputs[f"{name}_scale"] = scale
            if scale.ndim == 3:
                outputs[f"{name}_scale"] = len(outputs)
    names = tuple(write.name for write in writes)

    def kernel(refs: dict[str, Any], *out_refs: Any) -> None:
        _kernel(refs, *out_refs, outputs=outputs, names=names)

    written = dispatch.kernel_call(
        kernel,
        grid=(slots.shape[0],),
        inputs=inputs,
        outputs=[jax.ShapeDtypeStruct(inputs[key].shape, inputs[key].dtype) for key in outputs],
        aliases=outputs,
        num_warps=4,
        num_stages=1,
        name="kv_write",
    )
    result = dict(zip(outputs, written, strict=True))
    return [(result[f"{s.name}_pool"], result.get(f"{s.name}_scale", s.scale)) for s in writes]
