# SPDX-License-Identifier: Apache-2.0
"""Argument checks that the ops share: shapes, dtypes, and the limits of index arithmetic.

Every message names both what was passed and what was expected, and is the same on every platform. Shapes and dtypes
are checked at every call. Values, such as block ids, can be checked only outside `jax.jit`, where they are known.
"""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

MAX_HEAD_DIM = 256
ONE_BYTE_KV = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
INT32_MAX = 2**31 - 1


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_rank(name: str, array: jax.Array | np.ndarray, axes: str) -> None:
    """`axes` names the expected axes, separated by spaces: "tokens heads dim"."""
    expected = len(axes.split())
    require(
        array.ndim == expected,
        f"{name} must have {expected} axes [{axes}], got {array.ndim}: shape {tuple(array.shape)}",
    )


def check_shape(name: str, array: jax.Array | np.ndarray, expected: tuple[int, ...], why: str) -> None:
    require(
        tuple(array.shape) == expected,
        f"{name} has shape {tuple(array.shape)}, expected {expected} ({why})",
    )


def check_int32(name: str, array: jax.Array | np.ndarray) -> None:
    require(array.dtype == jnp.int32, f"{name} must be int32, got {array.dtype}")


def check_float(name: str, array: jax.Array) -> None:
    names = ", ".join(jnp.dtype(d).name for d in FLOATS)
    require(array.dtype in FLOATS, f"{name} must be one of {names}, got {array.dtype}")


def is_one_byte(dtype: jnp.dtype) -> bool:
    return dtype in ONE_BYTE_KV


def check_kv_dtype(q_dtype: jnp.dtype, kv_dtype: jnp.dtype) -> None:
    """KV has the query's dtype, or a one-byte dtype with scales."""
    one_byte = ", ".join(jnp.dtype(d).name for d in ONE_BYTE_KV)
    require(
        kv_dtype == q_dtype or is_one_byte(kv_dtype),
        f"no kernel for queries of {jnp.dtype(q_dtype).name} with KV of {jnp.dtype(kv_dtype).name}: "
        f"KV must be {jnp.dtype(q_dtype).name} or one of {one_byte}",
    )


def check_kv_pools(k_pool: jax.Array, v_pool: jax.Array) -> None:
    """Both pools must have the same blocks, heads and dtype; their head dims may differ."""
    check_rank("k_pool", k_pool, "blocks block_size kv_heads dim")
    check_rank("v_pool", v_pool, "blocks block_size kv_heads dim")
    require(
        k_pool.shape[:3] == v_pool.shape[:3] and k_pool.dtype == v_pool.dtype,
        f"k_pool is {k_pool.dtype} {tuple(k_pool.shape)} and v_pool {v_pool.dtype} {tuple(v_pool.shape)}: "
        "expected the same blocks, block_size, kv_heads and dtype",
    )
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        check_head_dim(f"head dim of {name}", pool.shape[3])
        check_pool(name, pool.shape, pool.dtype)


def check_number(name: str, value: float | None, *, positive: bool = False) -> None:
    """The number is compiled into the kernel, so it must be a Python number and not an array."""
    require(
        value is None or (isinstance(value, numbers.Real) and math.isfinite(value) and (value > 0 or not positive)),
        f"{name} is {value!r}, expected a {'positive' if positive else 'finite'} number, not an array",
    )


def check_head_dim(name: str, dim: int, *, limit: int = MAX_HEAD_DIM) -> None:
    require(0 < dim <= limit, f"{name} is {dim}, the kernels take 1 to {limit}")


def check_block_size(block_size: int) -> None:
    require(
        8 <= block_size <= 256 and block_size & (block_size - 1) == 0,
        f"block_size is {block_size}, expected a power of two from 8 to 256",
    )


def check_pool(name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    """Check the size of a pool array `[blocks, block_size, ...]`. Call it when you allocate; every op calls it too.

    Slot ids are int32, so blocks * block_size must be below 2^31. Kernels use 64-bit element offsets only for arrays
    above 4 GiB, and signed 32-bit offsets below. These reach every element of 2 bytes or more, but would wrap for
    one-byte elements in arrays between 2 and 4 GiB.
    """
    check_block_size(shape[1])
    require(math.prod(shape) > 0, f"{name} has shape {tuple(shape)}, expected at least 1 along every axis")
    slots = shape[0] * shape[1]
    require(
        slots <= INT32_MAX,
        f"{name} has {shape[0]} blocks of {shape[1]} slots = {slots} slots, slot ids are int32: at most {INT32_MAX}",
    )
    check_offsets(name, shape, dtype)


def check_offsets(name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    """Check that kernels can address every element of an array `[blocks, ...]`; see `check_pool`."""
    itemsize = jnp.dtype(dtype).itemsize
    size = math.prod(shape) * itemsize
    if itemsize == 1 and INT32_MAX < size <= 2**32:
        per_block = math.prod(shape[1:])
        raise ValueError(
            f"{name} of {jnp.dtype(dtype).name} with {shape[0]} blocks takes {size} bytes; a one-byte pool between "
            f"{INT32_MAX} and {2**32} bytes cannot be addressed: use at most {INT32_MAX // per_block} blocks "
            f"or at least {2**32 // per_block + 1}"
        )


def check_kv_scale(name: str, scale: jax.Array | None, pool: jax.Array, kv_heads: int) -> None:
    """A scale is None, [kv_heads] (per head) or [blocks, block_size, kv_heads] (per slot and head)."""
    if scale is None:
        return
    one_byte = ", ".join(jnp.dtype(d).name for d in ONE_BYTE_KV)
    require(is_one_byte(pool.dtype), f"{name} is given but the KV is {pool.dtype}; only {one_byte} take scales")
    require(scale.dtype == jnp.float32, f"{name} must be float32, got {scale.dtype}")
    allowed = ((kv_heads,), (*pool.shape[:2], kv_heads))
    require(
        tuple(scale.shape) in allowed,
        f"{name} has shape {tuple(scale.shape)}, expected {allowed[0]} (per head) or {allowed[1]} (per slot)",
    )


def is_concrete(*arrays: jax.Array | np.ndarray) -> bool:
    """Whether the values are known, that is, none of the arrays is being traced."""
    return not any(isinstance(a, Tracer) for a in arrays)
