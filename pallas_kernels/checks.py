# SPDX-License-Identifier: Apache-2.0
"""Argument checks that every op shares, on every platform alike.

Owns: the sentences users read when shapes, dtypes or ids are wrong, and the limits of index arithmetic.
Knows nothing about kernels. A message always holds both values: what came and what was expected.

Shapes and dtypes are checked at every call. Values (lengths, block ids) can only be checked when they are
concrete arrays; under `jax.jit` they are not, so a caller that jits checks its numpy arrays first with
`check_ragged_batch`. JAX clamps or wraps an index that is out of range, it never raises.
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


def check_rank(name: str, array: jax.Array, axes: str) -> None:
    """`axes` names the expected axes in one string, such as "tokens heads dim"."""
    expected = len(axes.split())
    require(
        array.ndim == expected,
        f"{name} must have {expected} axes [{axes}], got {array.ndim}: shape {tuple(array.shape)}",
    )


def check_shape(name: str, array: jax.Array, expected: tuple[int, ...], why: str) -> None:
    require(
        tuple(array.shape) == expected,
        f"{name} has shape {tuple(array.shape)}, expected {expected} ({why})",
    )


def check_int32(name: str, array: jax.Array) -> None:
    require(array.dtype == jnp.int32, f"{name} must be int32, got {array.dtype}")


def check_float(name: str, array: jax.Array) -> None:
    names = ", ".join(jnp.dtype(d).name for d in FLOATS)
    require(array.dtype in FLOATS, f"{name} must be one of {names}, got {array.dtype}")


def is_one_byte(dtype: jnp.dtype) -> bool:
    return dtype in ONE_BYTE_KV


def check_kv_dtype(q_dtype: jnp.dtype, kv_dtype: jnp.dtype) -> None:
    """KV is stored as the query's dtype, or in one byte (read back through scales)."""
    one_byte = ", ".join(jnp.dtype(d).name for d in ONE_BYTE_KV)
    require(
        kv_dtype == q_dtype or is_one_byte(kv_dtype),
        f"no kernel for queries of {jnp.dtype(q_dtype).name} with KV of {jnp.dtype(kv_dtype).name}: "
        f"KV must be {jnp.dtype(q_dtype).name} or one of {one_byte}",
    )


def check_kv_pools(k_pool: jax.Array, v_pool: jax.Array) -> None:
    """K and V go together, block by block; their head dims may differ."""
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
    """A number on the host: it is compiled into the kernel."""
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
    """Limits of one pool array `[blocks, block_size, ...]`. Call it when the pool is made; every op does too.

    Slots are int32, so blocks * block_size stays below 2^31. Element offsets in the kernels are 64 bits wide
    only for arrays above 4 GiB; below that they are signed 32 bits, which is enough for 2-byte elements and
    wider but not for one-byte elements between 2 and 4 GiB, where an offset would wrap.
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
    """That every element of an array `[blocks, ...]` can be addressed, see `check_pool`."""
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
    """A scale is None, one number per KV head, or one per slot and KV head `[blocks, block_size, kv_heads]`."""
    if scale is None:
        return
    one_byte = ", ".join(jnp.dtype(d).name for d in ONE_BYTE_KV)
    require(is_one_byte(pool.dtype), f"{name} is given but the KV is {pool.dtype}; scales go with {one_byte}")
    require(scale.dtype == jnp.float32, f"{name} must be float32, got {scale.dtype}")
    allowed = ((kv_heads,), (*pool.shape[:2], kv_heads))
    require(
        tuple(scale.shape) in allowed,
        f"{name} has shape {tuple(scale.shape)}, expected {allowed[0]} (per head) or {allowed[1]} (per slot)",
    )


def is_concrete(*arrays: jax.Array | np.ndarray) -> bool:
    return not any(isinstance(a, Tracer) for a in arrays)


def check_ragged_batch(
    *,
    tokens: int,
    blocks: int,
    block_size: int,
    block_tables: np.ndarray,
    kv_lens: np.ndarray,
    cu_q_lens: np.ndarray,
    distribution: np.ndarray,
    decode_only: bool = False,
) -> None:
    """Check the values of a ragged batch on the host, before they reach the device."""
    width = block_tables.shape[1]
    decode_rows, rows = (int(x) for x in distribution)
    require(
        0 <= decode_rows <= rows <= len(kv_lens),
        f"distribution is ({decode_rows}, {rows}), expected 0 <= decode rows <= rows <= {len(kv_lens)}",
    )
    if decode_only:
        require(
            decode_rows == rows,
            f"distribution is ({decode_rows}, {rows}) in a decode-only step, expected both equal",
        )
    lens, cu = np.asarray(kv_lens)[:rows].astype(np.int64), np.asarray(cu_q_lens).astype(np.int64)
    q_lens = np.diff(cu[: rows + 1])
    require(int(cu[0]) == 0, f"cu_q_lens starts at {int(cu[0])}, expected 0")
    bad = np.flatnonzero(q_lens < 0)
    require(bad.size == 0, f"cu_q_lens falls at row {bad[:1]}: {cu[bad[:1]]} then {cu[bad[:1] + 1]}, it must not fall")
    require(int(cu[rows]) <= tokens, f"cu_q_lens ends at {int(cu[rows])}, but q has {tokens} tokens")
    bad = np.flatnonzero((lens < q_lens) & (lens != 0))
    require(bad.size == 0, f"row {bad[:1]} has kv_len {lens[bad[:1]]} below its {q_lens[bad[:1]]} query tokens")
    bad = np.flatnonzero(q_lens[:decode_rows] != 1)
    require(bad.size == 0, f"decode row {bad[:1]} has {q_lens[bad[:1]]} query tokens, expected 1")
    bad = np.flatnonzero(lens > width * block_size)
    require(
        bad.size == 0,
        f"block_tables is too narrow: row {bad[:1]} has kv_len {lens[bad[:1]]}, "
        f"{width} blocks of {block_size} hold {width * block_size}",
    )
    used = np.arange(width)[None, :] * block_size < lens[:, None]
    ids = np.where(used, np.asarray(block_tables)[:rows], 0)
    bad = np.argwhere((ids < 0) | (ids >= blocks))
    if bad.size:
        row, column = bad[0]
        raise ValueError(
            f"block_tables[{row}, {column}] is {ids[row, column]}, "
            f"expected 0 to {blocks - 1}: the pool has {blocks} blocks"
        )


def check_ragged_call(
    *,
    q: jax.Array,
    pool: jax.Array,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    decode_only: bool,
) -> None:
    """Check the ragged description an attention op was called with: shapes, and values when they can be seen."""
    tokens = q.shape[0]
    check_rank("block_tables", block_tables, "rows width")
    rows, width = block_tables.shape
    require(rows > 0, f"block_tables has {rows} rows, expected at least 1; rows may be padding")
    require(width > 0, f"block_tables is too narrow: {width} blocks per row, expected at least 1")
    check_shape("kv_lens", kv_lens, (rows,), f"block_tables has {rows} rows")
    check_shape("cu_q_lens", cu_q_lens, (rows + 1,), f"rows + 1, block_tables has {rows} rows")
    check_shape("distribution", distribution, (2,), "decode rows, all rows")
    described = {"block_tables": block_tables, "kv_lens": kv_lens, "cu_q_lens": cu_q_lens, "distribution": distribution}
    for name, array in described.items():
        check_int32(name, array)
    require(tokens > 0, f"q has {tokens} tokens, expected at least 1")
    if decode_only:
        require(tokens == rows, f"q has {tokens} tokens in a decode-only step of {rows} rows, expected one each")
    if is_concrete(*described.values()):
        check_ragged_batch(
            tokens=tokens,
            blocks=pool.shape[0],
            block_size=pool.shape[1],
            decode_only=decode_only,
            **{name: np.asarray(array) for name, array in described.items()},
        )
