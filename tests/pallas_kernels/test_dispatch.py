# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, and which tiles: both chosen in one place, both overridable."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch, mla_attention, paged_attention, sampling, tuning
from pallas_kernels.ragged import Ragged
from pallas_kernels.tuning import DecodeTiles, MatmulTiles, RaggedTiles, SamplingTiles
from tests.pallas_kernels.test_lowering import targeting_h200


def test_a_cpu_runs_the_cpu_code() -> None:
    assert dispatch.implementation() == "cpu"


def test_the_default_device_decides() -> None:
    with jax.default_device("gpu"):  # only named: nothing is placed there
        assert dispatch.implementation() == "kernel"
    with jax.default_device(jax.devices("cpu")[1]):
        assert dispatch.implementation() == "cpu"


def test_overrides_nest_and_end() -> None:
    with dispatch.use("interpret"):
        assert dispatch.implementation() == "interpret"
        with dispatch.use("kernel"):
            assert dispatch.implementation() == "kernel"
        assert dispatch.implementation() == "interpret"
    with pytest.raises(RuntimeError), dispatch.use("kernel"):
        raise RuntimeError
    assert dispatch.implementation() == "cpu"


def test_unknown_implementation() -> None:
    unknown: Any = "triton"
    with pytest.raises(ValueError, match=r"'triton'.*'kernel', 'interpret' or 'cpu'"), dispatch.use(unknown):
        pass


def test_grid_limits_are_reported() -> None:
    x = jnp.zeros((4,), jnp.float32)
    options: dict[str, Any] = dict(
        inputs={"x": x}, outputs=[jax.ShapeDtypeStruct((4,), jnp.float32)], num_warps=1, num_stages=1
    )
    with pytest.raises(ValueError, match=r"copy: grid \(1, 65536\) exceeds"):
        dispatch.kernel_call(lambda *_: None, grid=(1, 65536), name="copy", **options)
    with pytest.raises(ValueError, match=r"copy: grid \(0,\) is empty"):
        dispatch.kernel_call(lambda *_: None, grid=(0,), name="copy", **options)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a tile table that stands in for the shipped one."""

    def write(content: object) -> None:
        path = tmp_path / "tuning.json"
        path.write_text(json.dumps(content))
        monkeypatch.setattr(tuning, "TABLE", path)
        tuning._table.cache_clear()

    yield write
    tuning._table.cache_clear()


def test_measured_tiles_win_on_their_device_and_shape(table) -> None:
    shape = tuning.key(rows=64, dim=128)
    assert shape == "dim=128 rows=64"
    table({"NVIDIA H200": {"paged_decode": {shape: {"splits": 7, "num_warps": 8}}}})
    default = DecodeTiles(block_kv=32)
    with targeting_h200():
        assert tuning.choose("paged_decode", shape, default) == DecodeTiles(block_kv=32, splits=7, num_warps=8)
        assert tuning.choose("paged_ragged", shape, default) == default
        assert tuning.choose("paged_decode", tuning.key(rows=65, dim=128), default) == default
    assert tuning.choose("paged_decode", shape, default) == default  # another device


def test_a_table_with_an_unknown_knob_is_rejected(table) -> None:
    table({"NVIDIA H200": {"paged_decode": {"x": {"block_q": 3}}}})
    with targeting_h200(), pytest.raises(ValueError, match=r"\['block_q'\].*block_kv"):
        tuning.choose("paged_decode", "x", DecodeTiles())


def test_the_op_runs_the_tiles_of_the_table(table) -> None:
    """Down to the launch: one split fewer kernels."""
    S: Any = jax.ShapeDtypeStruct
    q, pool = S((8, 32, 128), jnp.bfloat16), S((64, 16, 8, 128), jnp.bfloat16)
    i = jnp.int32
    arrays: dict[str, Any] = dict(
        block_tables=S((8, 4), i), kv_lens=S((8,), i), cu_q_lens=S((9,), i), distribution=S((2,), i)
    )
    ragged = Ragged(**arrays, decode_only=True)

    def kernels() -> int:
        with targeting_h200():

            def call(q, pool, ragged):
                return paged_attention.paged_attention(q, pool, pool, ragged)

            text = jax.jit(call).trace(q, pool, ragged).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("__gpu$xla.gpu.triton")

    table({})
    assert kernels() == 2
    shape = paged_attention.tile_key(q, pool, rows=8)
    table({"NVIDIA H200": {"paged_decode": {shape: {"splits": 1}}}})
    assert kernels() == 1


def test_the_shipped_table_names_known_ops_and_knobs() -> None:
    knobs = {
        "paged_decode": DecodeTiles,
        "mla_decode": DecodeTiles,
        "paged_ragged": RaggedTiles,
        "mla_ragged": RaggedTiles,
        "grouped_matmul": MatmulTiles,
        "sampling": SamplingTiles,
    }
    for device, ops in tuning._table().items():
        for op, shapes in ops.items():
            for shape, tiles in shapes.items():
                assert knobs[op](**tiles), (device, op, shape)


def test_default_splits_fill_the_device_and_no_more() -> None:
    bf16 = jnp.dtype("bfloat16")
    shape: dict[str, Any] = dict(group=4, dtype=bf16, dim=128)
    paged = [paged_attention.default_decode_tiles(rows=r, head_groups=8, **shape).splits for r in (1, 8, 64, 256)]
    assert paged == [32, 17, 3, 1]
    dtypes: dict[str, Any] = dict(q_dtype=bf16, kv_dtype=bf16)
    mla = [mla_attention.default_decode_tiles(rows=r, heads=128, **dtypes).splits for r in (1, 256)]
    assert mla == [32, 1]


def test_small_vocabularies_get_small_chunks() -> None:
    """A chunk is never wider than the row; asking for more would only waste lanes."""
    small, large = jnp.zeros((1, 100), jnp.float32), jnp.zeros((1, 128256), jnp.float32)
    assert sampling.tiles_for(small, "greedy").block == 128
    assert sampling.tiles_for(large, "greedy").block == SamplingTiles().block
