# SPDX-License-Identifier: Apache-2.0
"""Floors, targets and request lengths of the engine's sections."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu.engine import rig as rigs
from benchmarks.gpu.engine import roofline
from benchmarks.gpu.engine.rig import model
from benchmarks.gpu.engine.roofline import Roofline
from benchmarks.gpu.engine.throughput import PEER_MIX, decode_cases, decode_target, judged, mixes, sharegpt
from jaxserve.models import param_layout


@pytest.fixture(scope="module")
def llama() -> Roofline:
    spec = model(tiny=False)
    return Roofline(spec, param_layout.abstract_params(spec, jnp.bfloat16))


@pytest.mark.parametrize(
    ("rows", "context", "ms"),
    [(1, 1024, 3.52), (64, 1024, 5.59), (256, 1024, 11.88), (1, 4096, 3.62), (128, 4096, 19.67)],
)
def test_floor_of_a_decode_step(llama: Roofline, rows: int, context: int, ms: float) -> None:
    """As computed by hand for Llama-3.1-8B on an H200 with 4.3 TB/s; the hand count includes the logits' traffic."""
    found = roofline.bytes_ms(llama.step_bytes(rows, context), roofline.TABLE) or 0.0
    assert 0.96 * ms < found < 1.001 * ms


def test_operations_of_a_prefill(llama: Roofline) -> None:
    assert llama.prefill_flops(8192) == pytest.approx(131.9e12, rel=0.002)
    assert llama.prefill_flops(8192) > 4 * llama.prefill_flops(2048)


def test_floor_of_a_mix(llama: Roofline) -> None:
    """An answer of one token is only a prefill; everything else takes at least as long as reading the weights."""
    alone = llama.offline_ms([(8192, 1)], rows=1, ceilings=roofline.TABLE)
    assert alone == pytest.approx(llama.prefill_flops(8192) / 790e9)
    batch = llama.offline_ms([(1000, 1000)] * 256, rows=256, ceilings=roofline.TABLE)
    steps = 999 * (llama.weight_bytes(256) + 256 * 1500 * 131072) / 4.3e9
    assert batch == pytest.approx(steps + 256 * llama.prefill_flops(1000) / 790e9, rel=0.001)
    assert llama.offline_ms([(8, 8)], rows=1, ceilings=roofline.Ceilings(None, None)) is None


def test_targets() -> None:
    assert str(decode_target(1)) == ">=80 floor_pct" and str(decode_target(64)) == ">=85 floor_pct"
    assert decode_target(8) is None
    assert judged({"ms": 5.0, "floor_pct": 86.0}, decode_target(128))["met"] is True
    assert judged({"ms": 5.0, "floor_pct": None}, decode_target(128))["met"] is None


def test_lengths_like_those_of_chats() -> None:
    found = sharegpt(1000, longest=1024)
    assert found == sharegpt(1000, longest=1024)
    assert 100 < np.median([prompt for prompt, _ in found]) < 160
    assert max(max(pair) for pair in found) <= 1024 and min(min(pair) for pair in found) >= 2
    assert len(set(mixes(False)[PEER_MIX])) == 1, "a peer takes a single length"


def test_most_of_the_memory_goes_to_the_cache(llama: Roofline) -> None:
    """On an H200, as in the product: every timed size fits except the one that is too large."""
    taken = llama.weight_bytes(1) + 2 * llama.spec.vocab_size * llama.spec.hidden
    card = SimpleNamespace(memory_stats=lambda: {"bytes_limit": int(0.9 * 143771 * 2**20), "bytes_in_use": int(taken)})
    params = {"embed": {"weight": SimpleNamespace(devices=lambda: [card])}}
    tokens = 16 * rigs.settings(llama.spec, params, tiny=False)["num_blocks"]
    assert 850_000 < tokens < 880_000
    room = [rows * context < tokens for rows, context in decode_cases(False)]
    assert room == [case != (256, 4096) for case in decode_cases(False)]
