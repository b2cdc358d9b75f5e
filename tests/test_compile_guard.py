# SPDX-License-Identifier: Apache-2.0
"""The guard against compilation after warm-up can itself fail."""

import threading

import jax
import jax.dtypes
import numpy as np
import pytest

from tests.conftest import ForbidCompiles


@jax.jit
def doubled(x: jax.Array) -> jax.Array:
    return x * 2


FOUR, FIVE = np.ones(4, np.float32), np.ones(5, np.float32)


@pytest.fixture(autouse=True)
def cold() -> None:
    jax.clear_caches()


def test_warm_call_passes(forbid_compiles: ForbidCompiles) -> None:
    doubled(FOUR)
    with forbid_compiles():
        doubled(FOUR)


def test_late_shape_fails_and_is_named(forbid_compiles: ForbidCompiles) -> None:
    doubled(FOUR)
    with (
        pytest.raises(pytest.fail.Exception, match=r"trace of doubled.*compile of jit\(doubled\)"),
        forbid_compiles(),
    ):
        doubled(FIVE)


def test_late_eager_operation_fails(forbid_compiles: ForbidCompiles) -> None:
    x = jax.device_put(FOUR)
    with pytest.raises(pytest.fail.Exception, match="after warm-up"), forbid_compiles():
        _ = x + x


def test_late_compile_in_another_thread_fails(forbid_compiles: ForbidCompiles) -> None:
    thread = threading.Thread(target=doubled, args=(FOUR,))
    with pytest.raises(pytest.fail.Exception, match="doubled"), forbid_compiles():
        thread.start()
        thread.join()


def test_guard_ends_with_its_block(forbid_compiles: ForbidCompiles) -> None:
    with forbid_compiles():
        pass
    doubled(FOUR)


def test_error_inside_is_not_hidden(forbid_compiles: ForbidCompiles) -> None:
    with pytest.raises(ZeroDivisionError), forbid_compiles():
        doubled(FOUR)
        raise ZeroDivisionError


def test_the_suite_runs_under_strict_promotion() -> None:
    assert jax.device_count() == 8
    assert jax.devices()[0].platform == "cpu"
    half, single = jax.numpy.ones(1, "bfloat16"), jax.numpy.ones(1, "float32")
    with pytest.raises(jax.dtypes.TypePromotionError, match="strict"):
        _ = half * single
    with pytest.raises(ValueError, match="rank"):
        _ = single + jax.numpy.ones((1, 1), "float32")
