# SPDX-License-Identifier: Apache-2.0
"""Every kernel lowers for CUDA at the shapes that servers run, on a machine without CUDA.

Lowering applies Pallas' Triton rules and stops before Triton's compiler, so it finds what the dialect does not
support. `tests/cuda` compiles the kernels.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.kv_write import kv_write, latent_write
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged import Ragged
from pallas_kernels.sampling import RowParams, sample, token_logprobs
from tests.pallas_kernels.shapes import BF16, F32, I32, S, batch, paged_call

H200 = jax.sharding.AbstractMesh(
    (), (), (), abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
)


@contextlib.contextmanager
def targeting_h200() -> Iterator[None]:
    with dispatch.use("kernel"), jax.sharding.use_abstract_mesh(H200):
        yield


def lower(function: Callable[..., Any], *arguments: Any) -> str:
    with targeting_h200():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def paged(*sizes: int, **options: Any) -> str:
    call, shapes = paged_call(*sizes, **options)
    return lower(call, *shapes)


LLAMA_8B, QWEN3_8B, QWEN3_MOE, GEMMA_3, PHI_2 = (32, 8, 128), (32, 8, 128), (64, 4, 128), (16, 8, 256), (32, 32, 80)


@pytest.mark.parametrize("rows", [1, 8, 64, 256])
@pytest.mark.parametrize("heads", [LLAMA_8B, QWEN3_MOE, GEMMA_3, PHI_2], ids=str)
def test_decode(rows: int, heads: tuple[int, int, int]) -> None:
    text = paged(rows, rows, *heads, decode_only=True)
    assert text.count("__gpu$xla.gpu.triton") == (1 if rows * heads[1] >= 1056 else 2)  # with or without the combine


@pytest.mark.parametrize("tokens", [64, 2048, 8192])
@pytest.mark.parametrize("heads", [LLAMA_8B, GEMMA_3], ids=str)
def test_mixed(tokens: int, heads: tuple[int, int, int]) -> None:
    assert paged(tokens, 256, *heads).count("__gpu$xla.gpu.triton") == 2  # ragged and decode, unsplit at 256 rows


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 12, 16])
def test_groups(group: int) -> None:
    paged(512, 16, 4 * group, 4, 128)


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
def test_head_dims(dim: int) -> None:
    paged(512, 16, 8, 4, dim)


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 256])
def test_block_sizes(block_size: int) -> None:
    paged(512, 16, 8, 4, 128, block_size=block_size)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, BF16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("kv", [None, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2], ids=str)
def test_dtypes(dtype: Any, kv: Any) -> None:
    scales = {} if kv is None else dict(k_scale=S((4,), F32), v_scale=S((4096, 16, 4), F32))
    paged(512, 16, 8, 4, 128, dtype=dtype, kv=kv, **scales)


def test_every_option_at_once() -> None:
    paged(512, 16, 8, 4, 128, window=128, soft_cap=30.0, scale=0.1, sinks=S((8,), F32))


@pytest.mark.parametrize("heads", [16, 32, 128])
@pytest.mark.parametrize("rows, decode_only", [(1, True), (256, True), (16, False)])
def test_mla(heads: int, rows: int, decode_only: bool) -> None:
    def call(q: Any, pool: Any, ragged: Ragged) -> jax.Array:
        return mla_attention(q, pool, ragged, latent_dim=512, scale=0.1)

    tokens = rows if decode_only else 4096
    lower(call, S((tokens, heads, 576), BF16), S((4096, 64, 576), BF16), batch(rows, decode_only=decode_only))


@pytest.mark.parametrize("kv", [BF16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda d: d.__name__)
@pytest.mark.parametrize("tokens", [1, 8192])
def test_kv_write(kv: Any, tokens: int) -> None:
    pool, new = S((4096, 16, 8, 128), kv), S((tokens, 8, 128), BF16)
    scale = None if kv == BF16 else S((4096, 16, 8), F32)

    def call(kp: Any, vp: Any, k: Any, v: Any, slots: Any, scale: Any) -> Any:
        return kv_write(kp, vp, k, v, slots, k_scale=scale, v_scale=scale)

    lower(call, pool, pool, new, new, S((tokens,), I32), scale)
    if kv == BF16:
        lower(latent_write, S((4096, 64, 576), kv), S((tokens, 576), BF16), S((tokens,), I32))


@pytest.mark.parametrize("dtype", [BF16, F32, jnp.int8, jnp.float8_e4m3fn], ids=lambda d: d.__name__)
def test_block_moves(dtype: Any) -> None:
    pool, blocks = S((4096, 16, 8, 128), dtype), S((256,), I32)
    lower(copy_blocks, pool, blocks, blocks)
    lower(gather_blocks, pool, blocks)
    lower(scatter_blocks, pool, S((256, 16, 8, 128), dtype), blocks)


@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("mode", ["greedy", "random", "filtered"])
@pytest.mark.parametrize("logprobs, top_n", [(None, 0), ("raw", 0), ("processed", 20)])
def test_sampling(rows: int, mode: Any, logprobs: Any, top_n: int) -> None:
    p = RowParams(*(S((rows,), d) for d in (F32, I32, F32, F32, jnp.uint32, I32)))
    lower(lambda x, p: sample(x, p, mode=mode, logprobs=logprobs, top_n=top_n), S((rows, 128256), F32), p)


def test_token_logprobs() -> None:
    lower(lambda x, t: token_logprobs(x, t, top_n=20), S((512, 151936), BF16), S((512,), I32))


def triton_ir(function: Callable[..., Any], *arguments: Any) -> str:
    """The kernels' Triton code, which Pallas prints with debug=True."""
    from jax.experimental import pallas as pl

    plain, printed = pl.pallas_call, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(pl, "pallas_call", lambda *a, **k: plain(*a, **k | {"debug": True}))
        lower(function, *arguments)
    return printed.getvalue()


@pytest.mark.parametrize(
    "blocks, dtype, wide",
    [
        (2**31 // 16384 - 1, BF16, False),  # just below 4 GiB: 2^31 - 16384 elements fit signed 32 bits
        (2**32 // 16384, BF16, True),  # 2^32 elements
        (2**31 // 16384 - 1, jnp.int8, False),  # just below 2 GiB
        (2**32 // 16384 + 1, jnp.int8, True),  # above 4 GiB
    ],
)
def test_offsets_are_wide_where_pools_are_large(blocks: int, dtype: Any, wide: bool) -> None:
    """The sizes in between (one byte, 2 to 4 GiB) are rejected: see test_bad_input."""
    pool, ragged = S((blocks, 16, 8, 128), dtype), batch(64, decode_only=True)

    def attend(q: Any, k: Any, v: Any, ragged: Ragged, scale: Any) -> jax.Array:
        return paged_attention(q, k, v, ragged, k_scale=scale, v_scale=scale)

    def write(kp: Any, vp: Any, k: Any, slots: Any, scale: Any) -> Any:
        return kv_write(kp, vp, k, k, slots, k_scale=scale, v_scale=scale)

    scale = S((8,), F32) if dtype == jnp.int8 else None
    element = {BF16: "bf16", jnp.int8: "i8"}[dtype]
    for ir in (
        triton_ir(attend, S((64, 32, 128), BF16), pool, pool, ragged, scale),
        triton_ir(copy_blocks, pool, S((4,), I32), S((4,), I32)),
        triton_ir(gather_blocks, pool, S((4,), I32)),
        triton_ir(scatter_blocks, pool, S((4, 16, 8, 128), dtype), S((4,), I32)),
        triton_ir(write, pool, pool, S((64, 8, 128), BF16), S((64,), I32), scale),
    ):
        # Pointer arithmetic on pool-typed pointers, in tensors of the pool's tiles.
        pointers = [line for line in ir.splitlines() if "tt.addptr" in line and f"tt.ptr<{element}>" in line]
        assert pointers
        assert any("xi64>" in line for line in pointers) == wide
