# SPDX-License-Identifier: Apache-2.0
"""Wrong kernels fail the checks, and right ones pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu.checks import attention as check_attention
from benchmarks.gpu.checks import matmul as check_matmul
from benchmarks.gpu.checks import poison
from benchmarks.gpu.checks import quant as check_quant
from benchmarks.gpu.checks import sampling as check_sampling
from benchmarks.gpu.checks import writes as check_writes
from pallas_kernels import reference
from tests.benchmarks.gpu.pages import read, tiny


def a_little_off(op: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *args, **options: op(*args, **options) * jnp.bfloat16(1.02).astype(options["q"].dtype)


def wrong_tokens(op: Callable[..., Any]) -> Callable[..., Any]:
    def sample(*args: Any, **options: Any) -> Any:
        out = op(*args, **options)
        return out._replace(tokens=(out.tokens + 1) % 200)

    return sample


def next_group(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda lhs, rhs, offsets, **options: op(lhs, jnp.roll(rhs, 1, axis=0), offsets, **options)


def swapped_codes(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, codes, *rest, **options: op(x, codes << 4 | codes >> 4, *rest, **options)


def next_slot(op: Callable[..., Any]) -> Callable[..., Any]:
    def write(k_pool: Any, v_pool: Any, k: Any, v: Any, slots: Any, **scales: Any) -> Any:
        return op(k_pool, v_pool, k, v, jnp.where(slots >= 0, slots ^ 1, slots), **scales)

    return write


@pytest.mark.parametrize(
    ("module", "op", "wrong", "cases", "section"),
    [
        (check_attention, "paged_attention", a_little_off, "tiny_paged_cases", "check_paged"),
        (check_attention, "mla_attention", a_little_off, "tiny_mla_cases", "check_mla"),
        (check_matmul, "grouped_matmul", next_group, "cases", "check_grouped"),
        (check_quant, "quant_matmul", swapped_codes, "cases", "check_quant"),
        (check_sampling, "sample", wrong_tokens, "cases", "check_sampling"),
        (check_writes, "kv_write", next_slot, "write_cases", "check_kv_write"),
    ],
    ids=["paged", "mla", "grouped", "quant", "sampling", "kv_write"],
)
def test_wrong_kernel_fails(
    module: Any, op: str, wrong: Any, cases: str, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_cases = getattr(module, cases)
    monkeypatch.setattr(module, cases, lambda *args: all_cases(*args)[:1])
    monkeypatch.setattr(module, op, wrong(getattr(module, op)))
    assert tiny(tmp_path, "--section", section) == 1
    assert [(row["ok"], "error" in row) for row in read(tmp_path, section)["rows"]] == [(False, False)]


def test_one_wrong_token_does_not_drown() -> None:
    expected = np.random.default_rng(0).standard_normal((5000, 64))
    out = expected.copy()
    out[4000] *= 1.1
    row = check_attention.compare(out, expected, 8e-3)
    assert row["rel_error"] < 8e-3 and not row["ok"]
    out[4000] = expected[4000]
    assert check_attention.compare(out, expected, 8e-3)["ok"]
    out[7, 3] = np.nan
    assert not check_attention.compare(out, expected, 8e-3)["ok"]


def test_outputs_take_the_place_of_garbage() -> None:
    outcome = poison.run(lambda x: (x + 1, x > 0), jnp.arange(64, dtype=jnp.float32))
    assert outcome.repeatable and outcome.aliased
    assert (outcome.first[0] == np.arange(1, 65)).all()
    assert not poison.same_bits(np.zeros(2, np.float32), np.array([0.0, -0.0], np.float32))


def test_judge_accepts_only_what_rounding_explains() -> None:
    x = np.random.default_rng(0).standard_normal(1000)
    asked: dict[str, Any] = dict(seed=5, position=7, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    best = check_sampling.judge(x, 0, **asked).token
    assert check_sampling.judge(x, best, **asked).exact
    scores = x - x.max() + reference.gumbel(5, 7, 1000)
    second = int(np.argsort(scores)[-2])
    assert not check_sampling.judge(x, second, **asked).accepted
    x[second] += scores[best] - scores[second] - 1e-5  # now a tie, within rounding
    verdict = check_sampling.judge(x, second, **asked)
    assert verdict.accepted and not verdict.exact
    not_largest = best if x.argmax() == second else second
    assert not check_sampling.judge(x, not_largest, **asked | {"top_k": 1}).accepted
