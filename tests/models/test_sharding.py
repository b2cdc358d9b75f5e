# SPDX-License-Identifier: Apache-2.0
"""Any mesh gives what one device gives, with the collectives that the source shows and no others."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import JaxserveError
from jaxserve.models import param_layout
from jaxserve.models.decoder import Params
from jaxserve.models.mesh_fit import fit
from jaxserve.models.spec import ModelSpec
from jaxserve.parallel import mesh
from tests.models import tiny
from tests.models.paged import Paged, Row, run_forward, run_step

TOLERANCE = 1e-5  # of the logits' spread
# Every kind of attention and of MLP over 2, 4 and 8 shards. A block shards the two independently: "moe", with the
# attention of "dense" and the experts of "mla", need not repeat each size.
SIZES = [
    *((name, dict(tensor=shards)) for name in ("dense", "mla") for shards in (2, 4, 8)),
    ("moe", dict(tensor=8)),
    ("one-kv-head", dict(tensor=8)),
    *((name, dict(expert=4)) for name in ("moe", "mla")),
    ("moe", dict(tensor=2, expert=2)),
    ("moe", dict(data=2, tensor=2, expert=2)),
]
DENSE_ALONE = [dict(tensor=4), dict(expert=4)]  # paged attention is cut as over 8 shards there, or not at all


@pytest.mark.parametrize(("name", "sizes"), SIZES, ids=lambda value: str(value))
def test_mesh_agrees_with_one_device(name: str, sizes: dict[str, Any]) -> None:
    spec, tokens = tiny.SPECS[name], tiny.tokens()
    public = tiny.public_params(spec)
    alone = np.asarray(run_forward(spec, tiny.engine_params(spec, public), tokens))

    with jax.set_mesh(mesh.make_mesh(**sizes)):
        params = tiny.engine_params(spec, public)
        lies_as_declared(spec, params)
        spread = jax.device_put(tokens, mesh.here(("batch", None)))
        dense = run_forward(spec, params, spread)
        agrees(np.asarray(dense), alone)
        if sizes in DENSE_ALONE:
            return
        paged = Paged(spec, params, tokens=24, max_length=32)
        rows, texts = [Row(20), Row(20)], [list(map(int, text)) for text in tokens]
        first = paged.step((rows[0], texts[0][:9]), (rows[1], texts[1][:13]))
        then = paged.step((rows[1], texts[1][13:14]), (rows[0], texts[0][9:]))
        agrees(np.concatenate((first[0], then[1])), alone[0])
        agrees(np.concatenate((first[1], then[0])), alone[1, :14])


def lies_as_declared(spec: ModelSpec, params: Params) -> None:
    declared = dict(param_layout.leaves(param_layout.abstract_params(spec, jnp.float32)))
    for path, value in param_layout.leaves(params):
        assert value.shape == declared[path].shape, param_layout.dotted(path)
        assert value.sharding.is_equivalent_to(declared[path].sharding, value.ndim), param_layout.dotted(path)


def agrees(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(found - wanted).max() < TOLERANCE * wanted.std()


# Per block: one sum after attention and one after the MLP or the experts, into which XLA folds that of the shared
# experts. Beyond the blocks: one sum for the embedding, one gather of the logits.
EXPECTED = {
    "dense": {"all-reduce": 1 + 2 + 2, "all-gather": 1},
    "one-kv-head": {"all-reduce": 1 + 2, "all-gather": 1},
    "moe": {"all-reduce": 1 + 2 + 2, "all-gather": 1},
    "mla": {"all-reduce": 1 + 2 + 2, "all-gather": 1},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_decode_step_has_the_expected_collectives(name: str) -> None:
    spec = tiny.SPECS[name]
    with jax.set_mesh(mesh.make_mesh(tensor=4)):
        params = tiny.engine_params(spec, tiny.public_params(spec))
        paged = Paged(spec, params)
        inputs = paged.inputs((Row(8), [5]), decode_only=True)
        hlo = run_step.lower(spec, params, paged.cache, inputs).compile().as_text() or ""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    assert Counter(re.findall(rf" ({kinds})(?:-start)?\(", hlo)) == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "sizes", "problem"),
    [
        ("dense", dict(tensor=3), "8 attention heads do not divide among 3 tensor shards"),
        ("moe", dict(expert=3), "8 experts do not divide among 3 expert shards"),
        ("dense", dict(tensor=16), "needs 16 devices but only 8 exist"),
        ("dense", dict(tensor=0), "size 0"),
        ("dense", dict(tensor="2"), "size '2'"),
    ],
)
def test_dimensions_that_do_not_divide_are_rejected_with_the_numbers(
    name: str, sizes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(JaxserveError, match=problem), jax.set_mesh(mesh.make_mesh(**sizes)):
        fit(tiny.SPECS[name], *mesh.shards())


def test_an_auto_mesh_is_rejected() -> None:
    auto = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    with pytest.raises(JaxserveError, match="'tensor' is of type Auto; use make_mesh"), jax.set_mesh(auto):
        fit(tiny.SPECS["dense"], *mesh.shards())
