# SPDX-License-Identifier: Apache-2.0
"""Weights of several arrays in every place where a model has weights: fused, repeated, padded, cut over any mesh."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import CheckpointError, JaxserveError
from jaxserve.models import param_layout, spec_json
from jaxserve.models.decoder import Params
from jaxserve.models.mesh_fit import Fit
from jaxserve.models.spec import ModelSpec
from jaxserve.models.weight import component_at
from jaxserve.parallel import mesh
from jaxserve.quant.scheme import Quantized, Scheme
from tests.models import tiny
from tests.models.paged import Paged, Row, run_forward
from tests.quant import toy

TOLERANCE = 2e-5  # of the logits' spread
WEIGHTS = ("kernel", "k_up", "v_up", "head")


@cache
def quantized(spec: ModelSpec, scheme: Scheme = toy.SCHEME) -> ModelSpec:
    """Every weight but the routers', the embedding too."""
    paths = {"embed.weight"}
    for path, _ in param_layout.leaves(param_layout.abstract_public(spec)):
        if path[-1] in WEIGHTS and "router" not in path:
            paths.add(param_layout.dotted(("layers", "{layer}", *path[2:]) if path[0] == "layers" else path))
    return replace(spec, quantized=tuple(Quantized(path=path, scheme=scheme) for path in sorted(paths)))


def trees(spec: ModelSpec) -> tuple[Params, Params]:
    """Public parameters of the quantized model, and of the same model in plain arrays. Each caller may change them."""
    packed, plain = jax.tree.map(lambda leaf: leaf, _trees(spec))
    return packed, plain


@cache
def _trees(spec: ModelSpec) -> tuple[Params, Params]:
    random, whole = np.random.default_rng(0), quantized(spec)
    plain, packed = tiny.public_params(spec), {}
    shapes = dict(param_layout.leaves(plain))
    codes: dict[param_layout.Path, dict[str, np.ndarray]] = {}
    for path, leaf in param_layout.leaves(param_layout.abstract_public(whole)):
        if component_at(whole, path) is None:
            param_layout.put(packed, path, shapes[path])
            continue
        name = str(path[-1])
        made = {
            "codes": lambda shape: random.integers(-99, 100, shape, np.int8),
            "zeros": lambda shape: random.integers(-9, 10, shape, np.int8),
            "scales": lambda shape: random.uniform(0.5, 1.5, shape).astype(np.float32) / 500,
            "tilt": lambda shape: np.broadcast_to(1 + np.arange(shape[-1], dtype=np.float32) % 5 / 8, shape),
        }[name](leaf.shape)
        codes.setdefault(path[:-1], {})[name] = made
        param_layout.put(packed, path, jnp.asarray(made))
    for path, each in codes.items():
        spread = np.repeat(each["zeros"].astype(np.float64), toy.GROUP, axis=-1)
        tilt = each["tilt"].astype(np.float64)
        tilt = tilt.reshape(*tilt.shape[:-1], *(1,) * (spread.ndim - tilt.ndim), tilt.shape[-1])
        dense = (each["codes"] - spread) * each["scales"].astype(np.float64)[..., None] * tilt
        param_layout.put(plain, path, jnp.asarray(dense.reshape(shapes[path].shape), jnp.float32))
    return packed, plain


SIZES = [
    *((name, {}) for name in tiny.SPECS),
    *(("dense", dict(tensor=shards)) for shards in (2, 8)),  # 60 columns are padded to 64
    ("one-kv-head", dict(tensor=8)),  # and the one head repeated
    ("mla", dict(tensor=2)),
    ("moe", dict(tensor=2, expert=2)),
    ("mla", dict(expert=4)),
    ("moe", dict(data=2, tensor=2)),
]
# Paged steps multiply by the same weights in the same way, except in latent attention.
PAGED = [
    ("dense", {}),
    ("mla", {}),
    ("dense", dict(tensor=8)),
    ("mla", dict(tensor=2)),
    ("moe", dict(tensor=2, expert=2)),
]


@pytest.mark.parametrize(("name", "sizes"), SIZES, ids=lambda value: str(value))
def test_a_quantized_model_agrees_with_its_plain_weights(name: str, sizes: dict[str, Any]) -> None:
    spec, tokens = tiny.SPECS[name], tiny.tokens()
    packed, plain = trees(spec)
    wanted = np.asarray(run_forward(spec, tiny.engine_params(spec, plain), tokens))
    with jax.set_mesh(mesh.make_mesh(**sizes) if sizes else None):
        whole = quantized(spec)
        params = tiny.engine_params(whole, packed)
        lies_as_declared(whole, params)
        spread = jax.device_put(tokens, mesh.here(("batch", None))) if sizes else tokens
        agrees(np.asarray(run_forward(whole, params, spread)), wanted)
        if (name, sizes) not in PAGED:
            return
        paged = Paged(whole, params, rows=1, tokens=24, max_length=32)
        row, text = Row(20), list(map(int, tokens[0]))
        [first] = paged.step((row, text[:9]))
        [then] = paged.step((row, text[9:]))
        agrees(np.concatenate((first, then)), wanted[0])


@pytest.mark.parametrize("name", tiny.SPECS)
def test_a_quantized_model_has_as_many_parameters(name: str) -> None:
    spec = tiny.SPECS[name]
    leaves: list[Any] = jax.tree.leaves(tiny.public_params(spec))
    assert param_layout.count(quantized(spec)) == param_layout.count(spec) == sum(leaf.size for leaf in leaves)


def agrees(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(found - wanted).max() < TOLERANCE * wanted.std()


def lies_as_declared(spec: ModelSpec, params: Params) -> None:
    declared = dict(param_layout.leaves(param_layout.abstract_params(spec)))
    found = dict(param_layout.leaves(params))
    assert found.keys() == declared.keys()
    for path, value in found.items():
        name, wanted = param_layout.dotted(path), declared[path]
        assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype), name
        if wanted.sharding is not None:
            assert value.sharding.is_equivalent_to(wanted.sharding, value.ndim), name


def test_components_are_cut_as_their_weight_is() -> None:
    spec = quantized(tiny.SPECS["dense"])
    with jax.set_mesh(mesh.make_mesh(tensor=2)):
        layer: Any = param_layout.abstract_params(spec)["layers"][0]
    shards = {
        name: {part: leaf.sharding.shard_shape(leaf.shape) for part, leaf in weight["kernel"].items()}
        for name, weight in (
            ("qkv", layer["attention"]["qkv"]),
            ("out", layer["attention"]["out"]),
            *layer["mlp"].items(),
        )
    }
    assert shards["qkv"] == dict(codes=(1, 6, 8, 32), scales=(1, 6, 8), zeros=(8, 1, 6, 8), tilt=(32,))
    assert shards["out"] == dict(codes=(32, 32), scales=(32,), zeros=(8, 32), tilt=(32,))
    assert shards["gate_up"] == dict(codes=(2, 32, 32), scales=(2, 32), zeros=(8, 2, 32), tilt=(32,))
    assert shards["down"] == dict(codes=(32, 32), scales=(32,), zeros=(8, 32), tilt=(32,))


@pytest.mark.parametrize("name", tiny.SPECS)
@pytest.mark.parametrize("sizes", [{}, dict(tensor=2)], ids=str)
def test_public_and_engine_layout_hold_the_same(name: str, sizes: dict[str, Any]) -> None:
    spec = quantized(tiny.SPECS[name])
    packed, _ = trees(tiny.SPECS[name])
    with jax.set_mesh(mesh.make_mesh(**sizes) if sizes else None):
        again = tiny.public_again(spec, tiny.engine_params(spec, packed))
    jax.tree.map(np.testing.assert_array_equal, packed, again)


def test_a_component_of_all_columns_is_on_every_shard() -> None:
    """As for groups whose columns are not neighbours: each shard looks its scales up."""
    spec, random = tiny.SPECS["dense"], np.random.default_rng(3)
    whole, plain = quantized(spec, toy.ORDERED), tiny.public_params(spec)
    made: Params = {}
    for path, leaf in param_layout.leaves(param_layout.abstract_public(whole)):
        values: dict[str, Any] = {
            "codes": lambda shape: random.integers(-99, 100, shape, np.int8),
            "scales": lambda shape: random.uniform(0.5, 1.5, shape).astype(np.float32) / 500,
            "order": lambda shape: np.random.default_rng(shape).permutation(shape[0]).astype(np.int32) // toy.GROUP,
        }
        known = dict(param_layout.leaves(plain)).get(path)
        param_layout.put(made, path, values[str(path[-1])](leaf.shape) if known is None else known)
    for path, shape in [(path, leaf.shape) for path, leaf in param_layout.leaves(plain)]:
        node: Any = made
        for key in path:
            node = node[key]
        if isinstance(node, dict):
            parts: dict[str, Any] = node
            dense = parts["codes"] * parts["scales"].astype(np.float64)[..., parts["order"]]
            param_layout.put(plain, path, jnp.asarray(dense.reshape(shape), jnp.float32))
    wanted = np.asarray(run_forward(spec, tiny.engine_params(spec, plain), tiny.tokens()))
    with jax.set_mesh(mesh.make_mesh(tensor=2)):
        params: Any = tiny.engine_params(whole, made)
        down = params["layers"][0]["mlp"]["down"]["kernel"]
        shards = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in down.items()}
        assert shards == dict(codes=(32, 32), scales=(32, 16), order=(32,))  # 60 columns, padded to 64
        agrees(np.asarray(run_forward(whole, params, tiny.tokens())), wanted)


def test_gradients_pass_through_scales() -> None:
    """A trainer may hold some components and learn others."""
    spec = tiny.SPECS["dense"]
    packed, _ = trees(spec)
    whole, tokens = quantized(spec), tiny.tokens()

    def loss(scales: jax.Array) -> jax.Array:
        layers = packed["layers"] | {0: packed["layers"][0] | {"mlp": dict(packed["layers"][0]["mlp"])}}
        down = layers[0]["mlp"]["down"]
        layers[0]["mlp"]["down"] = down | {"kernel": down["kernel"] | {"scales": scales}}
        engine = param_layout.to_engine_layout(whole, packed | {"layers": layers})
        return jnp.mean(run_forward(whole, engine, tokens) ** 2)

    start = packed["layers"][0]["mlp"]["down"]["kernel"]["scales"]
    slope = jax.grad(loss)(start)
    step = 1e-2 * start * jnp.sign(slope)
    rise = (loss(start + step) - loss(start - step)) / 2
    np.testing.assert_allclose(rise, jnp.sum(slope * step), rtol=0.02)


# --- what is refused ------------------------------------------------------------------------------------------------


def in_groups(size: int) -> Scheme:
    return replace(toy.SCHEME, components=(*toy.SCHEME.components[:2], replace(toy.SCHEME.components[2], columns=size)))


def test_groups_that_do_not_divide_are_refused_with_the_tensor_and_the_mesh() -> None:
    spec = quantized(tiny.SPECS["dense"], in_groups(64))
    kept = tuple(each for each in spec.quantized if "out" in each.path)
    one = replace(spec, quantized=kept)
    param_layout.abstract_params(one)  # 64 columns: one group
    message = (
        r"layers\.0\.attention\.out\.kernel has 32 columns on each of 2 tensor shards, which groups of 64 \(zeros\)"
    )
    with pytest.raises(JaxserveError, match=message), jax.set_mesh(mesh.make_mesh(tensor=2)):
        param_layout.abstract_params(one)
    with pytest.raises(
        JaxserveError, match=r"embed\.weight has 32 columns, which groups of 64 \(zeros\) do not divide"
    ):
        param_layout.abstract_params(spec)
    with pytest.raises(JaxserveError, match=r"mlp\.down\.kernel has 60 columns, which groups of 8 \(zeros\) do not"):
        param_layout.abstract_public(quantized(tiny.SPECS["dense"], in_groups(8)))


def test_fused_weights_of_different_schemes_are_refused() -> None:
    spec = quantized(tiny.SPECS["dense"])
    other = Quantized(path="layers.1.attention.k.kernel", scheme=None)
    with pytest.raises(JaxserveError, match=r"layers\.1\.attention\.q\.kernel, .* are quantized in different ways"):
        param_layout.abstract_params(replace(spec, quantized=(*spec.quantized, other)))
    whole = (Quantized(path=f"layers.1.attention.{part}.kernel", scheme=None) for part in "qkv")
    params: Any = param_layout.abstract_params(replace(spec, quantized=(*spec.quantized, *whole)))
    assert not isinstance(params["layers"][1]["attention"]["qkv"]["kernel"], dict)
    assert isinstance(params["layers"][0]["attention"]["qkv"]["kernel"], dict)


def test_an_unknown_kind_and_a_scheme_without_codes_are_refused() -> None:
    with pytest.raises(JaxserveError, match="quantized as 'tea', which is not supported"):
        param_layout.abstract_params(quantized(tiny.SPECS["dense"], replace(toy.SCHEME, kind="tea")))
    with pytest.raises(CheckpointError, match="has no value for each row and group of columns"):
        quantized(tiny.SPECS["dense"], replace(toy.SCHEME, components=toy.SCHEME.components[1:]))


def test_a_spec_with_schemes_survives_json() -> None:
    spec = quantized(tiny.SPECS["mla"])
    assert spec_json.from_json(spec_json.to_json(spec)) == spec
    assert spec.unit == toy.GROUP and Fit(shards=2, unit=toy.GROUP).columns(60) == 64


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("codes", jnp.zeros((60, 32), jnp.int16), "gate.kernel.codes is int16, expected int8"),
        ("zeros", jnp.zeros((60, 4), jnp.int8), r"gate.kernel.zeros has shape \(60, 4\), expected \(60, 8\)"),
        ("scales", None, "have no layers.0.mlp.gate.kernel.scales"),
    ],
)
def test_a_wrong_component_is_refused_by_its_name(part: str, value: Any, problem: str) -> None:
    spec = tiny.SPECS["dense"]
    packed, _ = trees(spec)
    kernel = packed["layers"][0]["mlp"]["gate"]["kernel"]
    if value is None:
        del kernel[part]
    else:
        kernel[part] = value
    with pytest.raises(JaxserveError, match=problem):
        param_layout.to_engine_layout(quantized(spec), packed)
