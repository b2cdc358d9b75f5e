# SPDX-License-Identifier: Apache-2.0
"""Products of rows with a weight on CPUs, in every form, against float64; and how forms are chosen."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.on_cpu import matmul
from pallas_kernels.on_cpu.matmul import Forms

FORMS = (Forms(), Forms(float32=1, bfloat16=16, int8=16), Forms(float32=256, bfloat16=1, int8=1))


@pytest.mark.parametrize("chosen", FORMS)
@pytest.mark.parametrize("rows", [1, 2, 5, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_forms_are_the_product(chosen: Forms, rows: int, dtype: str) -> None:
    random = np.random.default_rng(rows)
    x, weight = (jnp.asarray(random.standard_normal(shape), dtype) for shape in ((rows, 48), (24, 48)))
    wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    found = matmul.matmul(x, weight, chosen=chosen)
    assert found.shape == (rows, 24) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)  # of float32, also for narrower values


@pytest.mark.parametrize("chosen", FORMS)
@pytest.mark.parametrize("rows", [1, 2, 5, 130])
def test_whole_numbers_are_exact(chosen: Forms, rows: int) -> None:
    random = np.random.default_rng(rows)
    x, weight = (random.integers(-127, 128, shape, np.int8) for shape in ((rows, 2000), (24, 2000)))
    found = matmul.matmul(jnp.asarray(x), jnp.asarray(weight), chosen=chosen)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ weight.astype(np.int64).T)


@pytest.mark.parametrize(
    ("first", "last", "rule"),
    [
        ((1, 1, 1, 1), (2, 2, 2, 2), 512),
        ((1, 1, 9, 9), (2, 2, 2, 2), 32),
        ((2.1, 2.1, 2.1, 2.1), (2, 2, 2, 2), 128),  # no clear difference: the default
        ((9, 9, 9, 9), (2, 2, 2, 2), 1),
    ],
)
def test_the_limit_of_a_weight_on_the_left(
    monkeypatch: pytest.MonkeyPatch, first: tuple[float, ...], last: tuple[float, ...], rule: int
) -> None:
    times = {rows: [a, b] for rows, a, b in zip((4, 16, 64, 256), first, last, strict=True)}
    monkeypatch.setattr(matmul, "_times", lambda name, rows, choices: times[rows])
    assert matmul.measure("float32") == rule


@pytest.mark.parametrize(("times", "rule"), [((5, 5, 1, 3), 8), ((5, 4.8, 4.9, 4.7), 2), ((5, 6, 7, 8), 2)])
def test_the_least_rows(monkeypatch: pytest.MonkeyPatch, times: tuple[float, ...], rule: int) -> None:
    monkeypatch.setattr(matmul, "_times", lambda name, rows, choices: list(times))
    assert matmul.measure("bfloat16") == matmul.measure("int8") == rule


def test_measuring_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_SHAPE", (32, 16))
    assert {matmul.measure(name) in (1, 8, 32, 128, 512) for name in ("float32",)} == {True}
    assert {matmul.measure(name) for name in matmul.NARROW} <= {2, 4, 8, 16}
