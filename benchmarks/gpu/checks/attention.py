# SPDX-License-Identifier: Apache-2.0
"""Sections `check_paged` and `check_mla`: attention against the oracle, with outputs prefilled with garbage."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.checks import inputs, poison
from benchmarks.gpu.checks.inputs import AttentionInputs, Lengths, MlaCase, PagedCase
from pallas_kernels import dispatch, reference
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.tuning import DecodeTiles

# Limits of ||out - ref|| / ||ref||. float32 runs as three TF32 products; the others round weights and output once each.
TOLERANCE = {"float32": 5e-5, "float16": 1.5e-3, "bfloat16": 8e-3}
COLUMNS = ("rel_error", "worst", "tolerance", "written", "aliased", "ok")


def compare(out: np.ndarray, expected: np.ndarray, tolerance: float) -> Row:
    """The relative error over all tokens and of the worst token, so that a single wrong token is noticed."""
    out = out.astype(np.float32).astype(np.float64).reshape(out.shape[0], -1)
    expected = expected.reshape(out.shape)
    size = np.linalg.norm(expected, axis=1)
    error = np.linalg.norm(out - expected, axis=1)
    live = size > 0
    total = float(np.linalg.norm(error) / max(np.linalg.norm(size), 1e-30))
    worst = float((error[live] / size[live]).max(initial=0.0))
    silent = bool((out[~live] == 0).all())  # padding tokens and rows without KV give zeros
    finite = bool(np.isfinite(out).all())
    right = finite and silent and total <= tolerance and worst <= 3 * tolerance
    return {"rel_error": total, "worst": worst, "tolerance": tolerance, "finite": finite, "zeros": silent, "ok": right}


def check(function: Callable[..., Any], given: AttentionInputs, expected: np.ndarray) -> Row:
    def call(arrays: dict[str, jax.Array]) -> jax.Array:
        return function(**arrays, **given.options, **given.tiles)

    outcome = poison.run(call, jax.tree.map(jnp.asarray, given.arrays))
    row = compare(outcome.first, expected, TOLERANCE[given.arrays["q"].dtype.name])
    row |= {"written": outcome.repeatable, "aliased": outcome.aliased}
    row["ok"] = row["ok"] and outcome.repeatable
    return row


def _lengths(block_size: int) -> tuple[int, ...]:
    return (0, 1, block_size - 1, block_size, block_size + 1, 333, 2049, 1024)


DECODE = Lengths(decode=_lengths(16))
MIXED = Lengths(decode=(1, 17, 700), chunks=((1, 1), (16, 16), (150, 150), (129, 513), (3, 1000), (64, 65)))
SHORT = Lengths(decode=(5, 130), chunks=((40, 40), (20, 100)))


def paged_cases(rng: np.random.Generator) -> list[PagedCase]:
    """Every property at least once in a decode batch and once in a mixed batch, then random combinations."""
    cases = []
    for label, lengths in (("decode", DECODE), ("mixed", MIXED)):
        for dtype in TOLERANCE:
            cases.append(PagedCase(f"{label} {dtype}", lengths, dtype=dtype))
        for kv, scales in (
            ("int8", "head"),
            ("int8", "slot"),
            ("float8_e4m3fn", None),
            ("float8_e4m3fn", "head"),
            ("float8_e4m3fn", "slot"),
            ("float8_e5m2", "head"),
        ):
            cases.append(PagedCase(f"{label} bfloat16 kv={kv} scales={scales}", lengths, kv=kv, scales=scales))
        for heads, kv_heads in ((8, 8), (12, 4), (28, 4), (32, 4), (48, 4), (16, 1)):
            cases.append(PagedCase(f"{label} {heads}/{kv_heads} heads", lengths, heads=heads, kv_heads=kv_heads))
        for dim in (64, 80, 96, 112, 192, 256):
            cases.append(PagedCase(f"{label} dim {dim}", lengths, heads=16, kv_heads=4, dim=dim))
        cases += [
            PagedCase(f"{label} dims 192 and 128", lengths, heads=16, kv_heads=16, dim=192, v_dim=128),
            PagedCase(f"{label} window 128", lengths, window=128),
            PagedCase(f"{label} window 5 block 8", lengths, window=5, block_size=8),
            PagedCase(f"{label} soft cap 256", lengths, heads=16, kv_heads=8, dim=256, soft_cap=50.0, window=512),
            PagedCase(f"{label} sinks", lengths, heads=64, kv_heads=8, dim=64, sinks=True, window=128),
            PagedCase(f"{label} block 64", lengths, block_size=64),
            PagedCase(f"{label} block 256", lengths, block_size=256),
        ]
    cases += [
        PagedCase(f"decode {n} splits", DECODE, sinks=True, options={"decode_tiles": DecodeTiles(splits=n)})
        for n in (1, 7, 32)
    ]
    return cases + [random_case(rng, i) for i in range(12)]


def random_case(rng: np.random.Generator, number: int) -> PagedCase:
    kv_heads, group = int(rng.choice([1, 2, 3, 8])), int(rng.choice([1, 2, 3, 4, 5, 7, 8, 16]))
    kv = str(rng.choice(["", "", "int8", "float8_e4m3fn", "float8_e5m2"]))
    chunks = [(int(q), int(q + rng.integers(0, 300))) for q in rng.integers(1, 120, rng.integers(0, 4))]
    return PagedCase(
        f"random {number}",
        Lengths(tuple(int(n) for n in rng.integers(0, 900, rng.integers(1, 6))), tuple(chunks)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=int(rng.integers(8, 33) * 8),
        block_size=int(2 ** rng.integers(3, 8)),
        dtype=str(rng.choice(list(TOLERANCE))),
        kv=kv or None,
        scales=str(rng.choice(["head", "slot"])) if kv else None,
        window=int(rng.integers(1, 400)) if rng.random() < 0.3 else None,
        soft_cap=float(rng.uniform(5, 50)) if rng.random() < 0.3 else None,
        sinks=bool(rng.random() < 0.3),
    )


def tiny_paged_cases() -> list[PagedCase]:
    decode, mixed = Lengths(decode=(0, 1, 8, 19)), Lengths(decode=(9,), chunks=((5, 12), (8, 8)))
    small = inputs.TINY_PAGED
    return [
        PagedCase("decode bfloat16", decode, **small),
        PagedCase("mixed float32", replace(mixed, padding_rows=2), dtype="float32", sinks=True, window=6, **small),
        PagedCase("mixed int8 slot", mixed, kv="int8", scales="slot", soft_cap=30.0, **small),
        PagedCase("decode float8", decode, kv="float8_e4m3fn", scales="head", **small),
    ]


def run_paged(page: Page) -> None:
    def measure(case: PagedCase) -> Row:
        given = inputs.paged(page.rng, case)
        expected = reference.paged_attention(**given.arrays, **given.options)
        return check(paged_attention, given, expected) | {"shape": describe(case)}

    cases = tiny_paged_cases() if page.settings.tiny else paged_cases(page.rng)
    with implementation(page):
        page.each(cases, measure, name=lambda case: case.name)


def describe(case: PagedCase | MlaCase) -> dict[str, Any]:
    """All fields of a case except its name and tiles, for the file."""
    return {k: str(v) for k, v in vars(case).items() if k not in ("name", "options") and v is not None}


def mla_cases() -> list[MlaCase]:
    cases = []
    for label, lengths in (("decode", DECODE), ("mixed", SHORT)):
        cases += [MlaCase(f"{label} {dtype}", lengths, heads=16, dtype=dtype) for dtype in TOLERANCE]
        cases += [MlaCase(f"{label} {heads} heads", lengths, heads=heads) for heads in (1, 20, 64, 128)]
        cases += [
            MlaCase(f"{label} kv=float8_e4m3fn", lengths, heads=16, kv="float8_e4m3fn", scaled=True),
            MlaCase(f"{label} kv=int8", lengths, heads=16, kv="int8", scaled=True),
            MlaCase(f"{label} 256+32 block 64", lengths, heads=16, latent=256, rope=32, block_size=64),
        ]
    return cases


def tiny_mla_cases() -> list[MlaCase]:
    small = inputs.TINY_MLA
    return [
        MlaCase("decode bfloat16", Lengths(decode=(0, 1, 8, 19)), **small),
        MlaCase("mixed float8", Lengths((9,), ((5, 12),)), dtype="float32", kv="float8_e4m3fn", scaled=True, **small),
    ]


def run_mla(page: Page) -> None:
    def measure(case: MlaCase) -> Row:
        given = inputs.mla(page.rng, case)
        expected = reference.mla_attention(**given.arrays, **given.options)
        return check(mla_attention, given, expected) | {"shape": describe(case)}

    with implementation(page):
        page.each(tiny_mla_cases() if page.settings.tiny else mla_cases(), measure, name=lambda case: case.name)


def implementation(page: Page) -> Any:
    """Forces the kernels; in a tiny run without a GPU, the interpreted kernels."""
    on_gpu = jax.default_backend() == "gpu"
    return dispatch.use("kernel" if on_gpu or not page.settings.tiny else "interpret")
