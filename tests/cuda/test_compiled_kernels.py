# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for an H200 at serving shapes: without spills, with tensor cores for its products, without a
copy as large as a cache, and in place where the contract says so.

`resources.json` records the registers and shared memory of each kernel. A change that alters them must record them
again, to make it visible: JAXSERVE_RECORD=1 .venv-cuda/bin/python -m pytest tests/cuda -n 0
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.kv_write import kv_write, latent_write
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.quant_matmul import default_tiles, quant_matmul
from pallas_kernels.ragged import Ragged
from pallas_kernels.sampling import RowParams, sample, token_logprobs
from tests.cuda.hopper import Compiled, compile_for_h200
from tests.pallas_kernels.shapes import BF16, F32, I32, S, batch, paged_call

RECORD = Path(__file__).with_name("resources.json")
SHARED_LIMIT = 232_448  # bytes one program may have on Hopper


def check_resources(case: str, compiled: Compiled, *, products: bool, spills: bool = False) -> None:
    """Check all kernels of a program, and compare with the record."""
    ours = {
        n: k
        for n, k in compiled.kernels.items()
        if n in compiled.launches and not n.startswith(("loop_", "input_", "wrapped"))
    }
    assert ours
    seen = {}
    for name, kernel in ours.items():
        launch = compiled.launches[name]
        assert spills or kernel.spill_bytes == 0, f"{name} spills {kernel.spill_bytes} bytes"
        assert launch.shared_bytes <= SHARED_LIMIT
        if products and not name.endswith("_combine"):
            assert kernel.tensor_cores > 0, f"{name} uses no matrix instructions"
        seen[name] = {
            "registers": kernel.registers,
            "shared_bytes": launch.shared_bytes,
            "threads": launch.threads,
            "wgmma": kernel.wgmma,
            "mma": kernel.mma,
        }
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("JAXSERVE_RECORD"):
        RECORD.write_text(json.dumps(recorded | {case: seen}, indent=1, sort_keys=True) + "\n")
    else:
        assert seen == recorded.get(case), "differs from resources.json; if that is meant, record it: see above"


def check_no_copies(compiled: Compiled, *shapes: tuple[int, ...]) -> None:
    """Check that no instruction except a kernel makes an array as large as one of these."""
    sizes = {math.prod(shape) for shape in shapes}
    for line in compiled.hlo.splitlines():
        made = re.search(r"= \w+\[([\d,]+)\]\S* (copy|copy-start|fusion|transpose|convert)\(", line)
        if made:
            assert math.prod(int(n) for n in made[1].split(",")) not in sizes, line.strip()[:200]


def paged(*sizes: int, **options: Any) -> Compiled:
    call, shapes = paged_call(*sizes, **options)
    compiled = compile_for_h200(call, *shapes)
    check_no_copies(compiled, shapes[1].shape)
    return compiled


HEADS = {
    "llama-8b": (32, 8, 128),
    "llama-70b/8": (8, 1, 128),
    "qwen3-30b-a3b": (32, 4, 128),
    "qwen3-235b": (64, 4, 128),
    "gemma-3-12b": (16, 8, 256),
    "phi-2": (32, 32, 80),
    "phi-3": (32, 32, 96),
    "stablelm": (32, 32, 112),
    "gpt-oss": (64, 8, 64),
    "deepseek unabsorbed": (16, 16, 192),
}


@pytest.mark.parametrize("rows", [1, 8, 64, 256])
@pytest.mark.parametrize("model", HEADS)
def test_decode(model: str, rows: int) -> None:
    check_resources(f"decode {model} rows={rows}", paged(rows, rows, *HEADS[model], decode_only=True), products=True)


@pytest.mark.parametrize("tokens", [64, 2048, 8192])
@pytest.mark.parametrize("model", HEADS)
def test_mixed(model: str, tokens: int) -> None:
    compiled = paged(tokens, 256, *HEADS[model])
    check_resources(f"mixed {model} tokens={tokens}", compiled, products=True)
    assert compiled.kernels["paged_ragged"].wgmma > 0  # prefill is bound by products: it needs Hopper's own


@pytest.mark.parametrize("block_size", [8, 256])
def test_block_sizes(block_size: int) -> None:
    check_resources(f"block_size={block_size}", paged(512, 64, 32, 8, 128, block_size=block_size), products=True)


@pytest.mark.parametrize("group", [1, 3, 7, 12, 16])
def test_groups(group: int) -> None:
    check_resources(f"group={group}", paged(512, 64, 8 * group, 8, 128), products=True)


@pytest.mark.parametrize("dim, dtype", [(64, BF16), (256, BF16), (64, F32), (128, F32)])
def test_many_query_heads_on_one_kv_head(dim: int, dtype: Any) -> None:
    """Falcon-7B has 71."""
    check_resources(f"group=71 dim={dim} {dtype.__name__}", paged(512, 64, 71, 1, dim, dtype=dtype), products=True)


@pytest.mark.parametrize("dtype", [jnp.float16, F32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_other_dtypes(dtype: Any, dim: int) -> None:
    check_resources(f"{dtype.__name__} dim={dim}", paged(512, 64, 32, 8, dim, dtype=dtype), products=True)


@pytest.mark.parametrize("kv", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda d: d.__name__)
@pytest.mark.parametrize("per_slot", [False, True])
def test_one_byte_kv(kv: Any, per_slot: bool) -> None:
    scale = S((4096, 16, 8) if per_slot else (8,), F32)
    compiled = paged(512, 64, 32, 8, 128, kv=kv, k_scale=scale, v_scale=scale)
    check_resources(f"{kv.__name__} {'per slot' if per_slot else 'per head'}", compiled, products=True)


def test_options() -> None:
    compiled = paged(2048, 64, 64, 8, 64, window=128, soft_cap=30.0, sinks=S((64,), F32))
    check_resources("window, soft cap and sinks", compiled, products=True)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("rows, decode_only", [(1, True), (64, True), (256, True), (64, False)])
@pytest.mark.parametrize("kv", [BF16, jnp.float8_e4m3fn], ids=lambda d: d.__name__)
def test_mla(heads: int, rows: int, decode_only: bool, kv: Any) -> None:
    def call(q: Any, pool: Any, ragged: Ragged) -> jax.Array:
        return mla_attention(q, pool, ragged, latent_dim=512, scale=0.1)

    pool, ragged = S((4096, 64, 576), kv), batch(rows, decode_only=decode_only)
    compiled = compile_for_h200(call, S((rows if decode_only else 4096, heads, 576), BF16), pool, ragged)
    check_no_copies(compiled, pool.shape)
    case = f"mla heads={heads} rows={rows} {'decode' if decode_only else 'mixed'} {kv.__name__}"
    check_resources(case, compiled, products=True)


def test_mla_float32() -> None:
    """Latents of 512 float32 columns do not fit the registers. It spills and is slow; it must compile."""

    def call(q: Any, pool: Any, ragged: Ragged) -> jax.Array:
        return mla_attention(q, pool, ragged, latent_dim=512, scale=0.1)

    compiled = compile_for_h200(call, S((512, 16, 576), F32), S((4096, 64, 576), F32), batch(64))
    check_resources("mla float32", compiled, products=True, spills=True)


@pytest.mark.parametrize("kv", [BF16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda d: d.__name__)
def test_kv_write_is_in_place(kv: Any) -> None:
    pool, new = S((4096, 16, 8, 128), kv), S((256, 8, 128), BF16)
    scale = None if kv == BF16 else S((4096, 16, 8), F32)

    def call(kp: Any, vp: Any, ks: Any, vs: Any, k: Any, v: Any, slots: Any) -> Any:
        return kv_write(kp, vp, k, v, slots, k_scale=ks, v_scale=vs)

    compiled = compile_for_h200(call, pool, pool, scale, scale, new, new, S((256,), I32), donate=(0, 1, 2, 3))
    check_no_copies(compiled, pool.shape)
    check_resources(f"kv_write {kv.__name__}", compiled, products=False)
    scales = 0 if scale is None else math.prod(scale.shape) * 4
    assert compiled.alias_bytes == 2 * (math.prod(pool.shape) * jnp.dtype(kv).itemsize + scales)


def test_latent_write_is_in_place() -> None:
    pool = S((4096, 64, 576), BF16)
    compiled = compile_for_h200(latent_write, pool, S((256, 576), BF16), S((256,), I32), donate=(0,))
    check_no_copies(compiled, pool.shape)
    check_resources("latent_write", compiled, products=False)
    assert compiled.alias_bytes == math.prod(pool.shape) * 2


@pytest.mark.parametrize("dtype", [BF16, jnp.int8, jnp.float8_e4m3fn], ids=lambda d: d.__name__)
def test_block_moves(dtype: Any) -> None:
    pool, blocks = S((4096, 16, 8, 128), dtype), S((64,), I32)
    staged = S((64, 16, 8, 128), dtype)
    size = math.prod(pool.shape) * jnp.dtype(dtype).itemsize
    for name, compiled, aliased in (
        ("copy", compile_for_h200(copy_blocks, pool, blocks, blocks, donate=(0,)), size),
        ("gather", compile_for_h200(gather_blocks, pool, blocks), 0),
        ("scatter", compile_for_h200(scatter_blocks, pool, staged, blocks, donate=(0,)), size),
    ):
        check_no_copies(compiled, pool.shape)
        check_resources(f"{name} {dtype.__name__}", compiled, products=False)
        assert compiled.alias_bytes == aliased


@pytest.mark.parametrize("mode", ["greedy", "random", "filtered"])
@pytest.mark.parametrize("logprobs, top_n", [(None, 0), ("raw", 5), ("processed", 20)])
def test_sampling(mode: Any, logprobs: Any, top_n: int) -> None:
    p = RowParams(*(S((256,), d) for d in (F32, I32, F32, F32, jnp.uint32, I32)))
    logits = S((256, 128256), F32)
    compiled = compile_for_h200(lambda x, p: sample(x, p, mode=mode, logprobs=logprobs, top_n=top_n), logits, p)
    check_no_copies(compiled, logits.shape)
    check_resources(f"sample {mode} {logprobs} {top_n}", compiled, products=False)
    assert compiled.temp_bytes < 2**20  # no sorted copy, no noise array


def test_token_logprobs() -> None:
    logits = S((512, 151936), BF16)
    compiled = compile_for_h200(lambda x, t: token_logprobs(x, t, top_n=20), logits, S((512,), I32))
    check_no_copies(compiled, logits.shape)
    check_resources("token_logprobs", compiled, products=False)
    assert compiled.temp_bytes < 2**20


EXPERTS = {  # groups, hidden, width, experts per token
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "deepseek-v2-lite": (64, 2048, 1408, 6),
    "mixtral-8x7b": (8, 4096, 14336, 2),
    "gpt-oss-20b": (32, 2880, 2880, 4),
}


@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 2048, 8192])
@pytest.mark.parametrize("model", EXPERTS)
def test_grouped_matmul(model: str, tokens: int) -> None:
    groups, hidden, width, used = EXPERTS[model]
    for name, n, k in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
        rhs = S((groups, n, k), BF16)
        compiled = compile_for_h200(grouped_matmul, S((tokens * used, k), BF16), rhs, S((groups + 1,), I32))
        check_no_copies(compiled, rhs.shape, (tokens * used, k), (tokens * used, n))
        check_resources(f"grouped {model} {name} tokens={tokens}", compiled, products=True)
        assert compiled.temp_bytes < 2**20
        if tokens >= 2048:
            assert compiled.kernels["grouped_matmul"].wgmma > 0


@pytest.mark.parametrize("dtype", [F32, BF16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("rows", [512, 16384])
def test_grouped_matmul_gradients(dtype: Any, rows: int) -> None:
    """The weights are read as they lie when the gradient contracts their other side."""

    def gradients(lhs: Any, rhs: Any, offsets: Any, d_out: Any) -> Any:
        out, back = jax.vjp(lambda x, w: grouped_matmul(x, w, offsets), lhs, rhs)
        return out, back(d_out)

    lhs, rhs, d_out = S((rows, 2048), dtype), S((128, 1536, 2048), dtype), S((rows, 1536), dtype)
    compiled = compile_for_h200(gradients, lhs, rhs, S((129,), I32), d_out)
    check_no_copies(compiled, lhs.shape, rhs.shape, d_out.shape)
    check_resources(f"grouped gradients {dtype.__name__} rows={rows}", compiled, products=True)
    assert compiled.kernels["grouped_outer"].wgmma > 0


def test_grouped_matmul_of_odd_sides() -> None:
    """No vector loads there, and masks everywhere: slow, but it must compile."""
    compiled = compile_for_h200(grouped_matmul, S((100, 77), BF16), S((5, 101, 77), BF16), S((6,), I32))
    check_resources("grouped odd sides", compiled, products=True)


QUANTIZED: dict[str, tuple[Any, int, bool]] = {  # codes, bits, zero points
    "int4": (jnp.int8, 4, False),
    "uint4": (jnp.uint8, 4, True),
    "int8": (jnp.int8, 8, False),
    "e4m3": (jnp.float8_e4m3fn, 8, False),
}
LLAMA_8B = [(4096, 4096), (4096, 14336), (14336, 4096), (6144, 4096)]
QUANT_CASES = [("uint4", 128, n, k, rows) for n, k in LLAMA_8B for rows in (1, 16, 32, 64)]
QUANT_CASES += [("int4", group, 14336, 4096, rows) for group in (None, 32, 64, 128) for rows in (1, 16, 32, 64)]
QUANT_CASES += [("uint4", group, 14336, 4096, rows) for group in (None, 32, 64) for rows in (1, 16, 32, 64)]
QUANT_CASES += [(kind, None, 14336, 4096, rows) for kind in ("int8", "e4m3") for rows in (1, 16, 32, 64)]
QUANT_CASES += [("e4m3", 128, 14336, 4096, rows) for rows in (1, 64)]


@pytest.mark.parametrize("kind, group, n, k, rows", QUANT_CASES)
def test_quant_matmul(kind: str, group: int | None, n: int, k: int, rows: int) -> None:
    """Codes are read as they are stored, without a copy, 8 or 16 bytes at a time; one row, too, is multiplied by matrix
    instructions, which cost less than unpacking does."""
    codes_dtype, bits, zeros = QUANTIZED[kind]
    x, codes, scales = S((rows, k), BF16), S((n, k * bits // 8), codes_dtype), S((n, k // (group or k)), jnp.float16)
    arrays = (x, codes, scales, S(scales.shape, jnp.uint8)) if zeros else (x, codes, scales)
    compiled = compile_for_h200(quant_matmul, *arrays)
    check_no_copies(compiled, codes.shape, (n, k), (n, k // 4))
    check_resources(f"quant {kind} group={group} {n} x {k} rows={rows}", compiled, products=True)
    kernel, launch, tiles = compiled.kernels["quant_matmul"], compiled.launches["quant_matmul"], default_tiles(x, codes)
    # All steps under way are copied asynchronously, and their codes by wide instructions.
    share = tiles.num_stages * tiles.block_inner / launch.threads
    codes_share, x_share = share * tiles.block_columns * bits / 8, share * tiles.block_rows * 2
    assert sum(kernel.cp_async) == codes_share + x_share
    widest = 16 if bits == 4 or rows <= 32 else 8
    assert sum(size for size in kernel.cp_async if size >= widest) >= codes_share
    assert launch.grid[0] * launch.grid[1] >= 132
    assert compiled.temp_bytes <= rows * (tiles.splits * n * 4 + k * 2) + 2**20


@pytest.mark.parametrize("decode_only", [True, False])
def test_layers_update_their_pools_in_place(decode_only: bool) -> None:
    """Write and read layer after layer, as a step does: XLA neither copies a pool nor allocates a second one."""
    tokens, layers = (64, 4) if decode_only else (512, 4)
    pool, ragged = S((4096, 16, 8, 128), BF16), batch(64, decode_only=decode_only)

    def step(pools: Any, x: Any, slots: Any, ragged: Ragged) -> Any:
        written = []
        for k_pool, v_pool in pools:
            result = kv_write(k_pool, v_pool, x[:, :8], x[:, 8:16], slots)
            x = x + paged_attention(x, result.k_pool, result.v_pool, ragged)
            written.append((result.k_pool, result.v_pool))
        return written, x

    compiled = compile_for_h200(
        step, [(pool, pool)] * layers, S((tokens, 32, 128), BF16), S((tokens,), I32), ragged, donate=(0,)
    )
    check_no_copies(compiled, pool.shape)
    assert compiled.alias_bytes >= 2 * layers * math.prod(pool.shape) * 2
    assert compiled.temp_bytes < 2**26
