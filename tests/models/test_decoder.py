# SPDX-License-Identifier: Apache-2.0
"""What holds for every model: dense and paged agree, gradients are correct, equal specs share executables."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import JaxserveError
from jaxserve.models import decoder, param_layout, spec_json
from jaxserve.models import spec as specs
from jaxserve.parallel import mesh
from tests.conftest import ForbidCompiles
from tests.models import tiny
from tests.models.paged import Paged, Row, run_forward


@pytest.mark.parametrize("name", tiny.SPECS)
def test_layouts_round_trip_exactly(name: str) -> None:
    spec = tiny.SPECS[name]
    public = tiny.public_params(spec)
    engine = param_layout.to_engine_layout(spec, public)
    back = param_layout.to_public_layout(spec, engine)
    assert jax.tree.structure(back) == jax.tree.structure(public)
    jax.tree.map(np.testing.assert_array_equal, back, public)


@pytest.mark.parametrize("name", tiny.SPECS)
def test_spec_survives_json(name: str) -> None:
    spec = tiny.SPECS[name]
    assert spec_json.from_json(json.loads(json.dumps(spec_json.to_json(spec)))) == spec


def loss(spec: specs.ModelSpec, public: decoder.Params, tokens: jax.Array, *, remat: bool = False) -> jax.Array:
    """A training loss: mean negative log-likelihood of the next token, from public parameters."""
    logits = decoder.forward(spec, param_layout.to_engine_layout(spec, public), tokens, remat=remat)
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))


@pytest.mark.parametrize("name", ["dense", "moe", "mla"])
def test_gradients_match_finite_differences(name: str) -> None:
    spec, tokens = tiny.SPECS[name], tiny.tokens(batch=1, length=9)
    public = tiny.public_params(spec)
    grads = jax.jit(jax.grad(partial(loss, spec)))(public, tokens)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    remat = jax.jit(jax.grad(partial(loss, spec, remat=True)))(public, tokens)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), remat, grads)

    # Along the gradient of each kind of parameter, so that none can hide behind another: there the loss must change by
    # the gradient's length. A router's choice jumps somewhere; steps this small cross no jump here.
    value, step = jax.jit(partial(loss, spec)), 1e-2
    public, grads = jax.tree.map(np.asarray, (public, grads))  # jax would compile each little sum
    for kind in {path[-2:] for path, _ in param_layout.leaves(public)}:
        own = {path: leaf for path, leaf in param_layout.leaves(grads) if path[-2:] == kind}
        length = float(np.sqrt(sum(np.sum(leaf**2) for leaf in own.values())))
        assert length > 1e-2, param_layout.dotted(kind)
        direction: decoder.Params = {}
        for path, leaf in param_layout.leaves(public):
            param_layout.put(direction, path, own[path] / np.float32(length) if path in own else np.zeros_like(leaf))
        ahead, behind = (
            float(value(jax.tree.map(lambda p, d, s=by: p + s * d, public, direction), tokens))
            for by in (np.float32(step), np.float32(-step))
        )
        assert abs((ahead - behind) / (2 * step) - length) < 1e-3 * length + 2e-4, param_layout.dotted(kind)


def test_right_padding_and_the_batch_change_nothing() -> None:
    spec = tiny.SPECS["moe"]
    params = tiny.engine_params(spec, tiny.public_params(spec))
    tokens = tiny.tokens(batch=2, length=20)
    whole = np.asarray(run_forward(spec, params, tokens))
    short = np.asarray(run_forward(spec, params, tokens[1:, :13]))
    np.testing.assert_allclose(whole[1, :13], short[0], atol=2e-5 * float(whole.std()))


def test_long_sequences_are_taken_in_chunks() -> None:
    """Above 512 tokens, dense attention splits the queries; the result is that of a prefix computed whole."""
    spec = dataclasses.replace(tiny.SPECS["dense"], max_positions=1024)
    params = tiny.engine_params(spec, tiny.public_params(spec))
    tokens = tiny.tokens(batch=1, length=530)
    long, short = (np.asarray(run_forward(spec, params, tokens[:, :end])) for end in (530, 512))
    np.testing.assert_allclose(long[:, :512], short, atol=2e-5 * float(short.std()))
    paged = Paged(spec, params, rows=1, tokens=530, max_length=530)
    [logits] = paged.step((Row(530), [int(token) for token in tokens[0]]))
    np.testing.assert_allclose(logits, long[0], atol=2e-5 * float(long.std()))


def test_a_windowed_layer_reads_only_its_window() -> None:
    """Blocks wholly before the window may hold anything: here NaN, written after they were used."""
    spec = tiny.model(tiny.block(tiny.grouped(window=6), tiny.MLP), tiny.block(tiny.grouped(window=6), tiny.MLP))
    params = tiny.engine_params(spec, tiny.public_params(spec))
    tokens = tiny.tokens(batch=1, length=30)
    dense = np.asarray(run_forward(spec, params, tokens))[0]
    paged, row, text = Paged(spec, params), Row(30), [int(token) for token in tokens[0]]
    paged.step((row, text[:22]))
    # Token 22 sees 17 to 22; blocks of 8: the first two are behind every later token's window.
    paged.cache = jax.tree.map(lambda pool: pool.at[jnp.asarray(row.blocks[:2])].set(jnp.nan), paged.cache)
    [one] = paged.step((row, text[22:23]), decode_only=True)
    [rest] = paged.step((row, text[23:]))
    np.testing.assert_allclose(np.concatenate((one, rest)), dense[22:], atol=2e-5 * float(dense.std()))


def test_decode_only_steps_agree_with_mixed_ones() -> None:
    for name in ("dense", "moe", "mla"):
        spec = tiny.SPECS[name]
        params = tiny.engine_params(spec, tiny.public_params(spec))
        text = [int(token) for token in tiny.tokens(batch=1, length=12)[0]]
        outs: list[np.ndarray] = []
        for decode_only in (False, True):
            paged, row = Paged(spec, params), Row(12)
            paged.step((row, text[:11]))
            outs += paged.step((row, text[11:]), decode_only=decode_only)
        np.testing.assert_allclose(outs[0], outs[1], atol=2e-5 * float(outs[0].std()))


def variants() -> dict[str, specs.ModelSpec]:
    """Every order in which a block adds and normalizes."""
    layer = tiny.block(tiny.grouped(), tiny.MLP)
    blocks = {
        "parallel, one norm": dataclasses.replace(layer, parallel=True, mlp_in=None),
        "parallel, two norms": dataclasses.replace(layer, parallel=True),
        "out norms": dataclasses.replace(layer, attention_out=tiny.NORM, mlp_out=tiny.NORM, residual_scale=0.5),
        "norms of the sum": dataclasses.replace(
            layer, attention_in=None, mlp_in=None, attention_out=tiny.NORM, mlp_out=tiny.NORM, norm_the_sum=True
        ),
    }
    return tiny.SPECS | {name: tiny.model(block) for name, block in blocks.items()}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [*((name, None) for name in variants()), *((name, {"tensor": 2}) for name in ("dense", "moe", "mla"))],
    ids=lambda value: "mesh" if isinstance(value, dict) else value,
)
def test_only_wanted_tokens_pass_the_last_mlp(name: str, sizes: dict[str, Any] | None) -> None:
    """After the last block's attention only the wanted tokens continue, in any order, some of them twice; the KV of all
    tokens is written."""
    spec = variants()[name]
    with nullcontext() if sizes is None else jax.set_mesh(mesh.make_mesh(**sizes)):
        params = tiny.engine_params(spec, tiny.public_params(spec))
        text = [int(token) for token in tiny.tokens(batch=1, length=20)[0]]
        wanted = [19, 3, 7, 19]
        whole, few = (Paged(spec, params, rows=1, tokens=20) for _ in range(2))
        [expected] = whole.step((Row(20), text))
        inputs = dataclasses.replace(few.inputs((Row(20), text)), sampled=jnp.asarray(wanted, jnp.int32))
        logits, cache = few.run(params, few.cache, inputs)
        np.testing.assert_allclose(np.asarray(logits), expected[wanted], atol=2e-5 * float(expected.std()))
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), cache, whole.cache)
    if sizes is None and spec.layers[-1].mlp == tiny.MLP:
        shapes = str(jax.make_jaxpr(partial(decoder.step, spec))(params, cache, inputs))
        activated = re.findall(rf"f32\[(\d+),{tiny.MLP.width}\] = logistic", shapes)
        assert activated[-1] == str(len(wanted)), activated


def test_models_of_equal_specs_share_an_executable(forbid_compiles: ForbidCompiles) -> None:
    """Another model object with other weights, its spec built anew: no trace, no compile."""
    first = tiny.SPECS["mla"]
    again = spec_json.from_json(spec_json.to_json(first))
    assert again is not first
    tokens = tiny.tokens()
    ours, theirs = (tiny.engine_params(first, tiny.public_params(first, seed)) for seed in (0, 1))
    run_forward(first, ours, tokens).block_until_ready()
    with forbid_compiles():
        run_forward(again, theirs, tokens).block_until_ready()


def test_equal_layers_are_traced_once() -> None:
    layer = tiny.block(tiny.grouped(), tiny.MLP)
    spec = tiny.model(*[layer] * 6)
    abstract = param_layout.abstract_params(spec, jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    text = jax.jit(decoder.forward, static_argnums=0).lower(spec, abstract, tokens).as_text()
    assert text.count("func.func private @_run_block") == 1


def test_an_id_out_of_range_affects_only_its_sequence() -> None:
    spec = tiny.SPECS["moe"]
    params = tiny.engine_params(spec, tiny.public_params(spec))
    tokens = tiny.tokens()
    with pytest.raises(ValueError, match="token ids range from -1 to"):
        decoder.forward(spec, params, tokens.at[0, 3].set(-1))
    with pytest.raises(ValueError, match="to 98, expected 0 to 97"):
        decoder.forward(spec, params, tokens.at[0, 3].set(98))
    with pytest.raises(ValueError, match="length 129, above the model's limit of 128"):
        decoder.forward(spec, params, tiny.tokens(length=129))
    with pytest.raises(ValueError, match=r"int32\[20\], expected int32\[batch, length\]"):
        decoder.forward(spec, params, tokens[0])
    whole = np.asarray(run_forward(spec, params, tokens))
    for bad in (-1, -98, 98, 2**31 - 1):
        hurt = np.asarray(run_forward(spec, params, tokens.at[0, 3].set(bad)))
        np.testing.assert_array_equal(hurt[1], whole[1])
        assert np.isnan(hurt[0]).all()


LOWER = """
import dataclasses, hashlib, jax, jax.numpy as jnp
from jaxserve.models import decoder, param_layout
from jaxserve.models.spec import Rope
from tests.models import tiny
bases = [tiny.block(dataclasses.replace(tiny.grouped(), rope=Rope(dim=8, base=10.0**n)), tiny.MLP) for n in range(2, 8)]
spec = tiny.model(*bases)
tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
params = param_layout.abstract_params(spec, jnp.float32)
lowered = jax.jit(decoder.forward, static_argnums=0).lower(spec, params, tokens)
print(hashlib.sha256(lowered.as_text().encode()).hexdigest())
"""


def test_every_process_makes_the_same_program(capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise one process could not use another's compilation cache. This one has another seed of hashes."""
    root = Path(__file__).parents[2]
    other = subprocess.run(
        [sys.executable, "-c", LOWER],
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    exec(LOWER, {})
    mine = capsys.readouterr().out
    assert mine == other.stdout and len(mine) == 65


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda public: public["layers"][0]["attention"].pop("q"), "have no layers.0.attention.q.kernel"),
        (lambda public: public.update(extra={"weight": jnp.ones(3)}), "no parameter extra.weight"),
        (lambda public: public.update(head=jnp.ones((98, 31))), r"head has shape \(98, 31\), expected \(98, 32\)"),
        (lambda public: public.update(head=[1.0]), "have no head"),
        (lambda public: public.clear(), "have no embed.weight"),
        (
            lambda public: public["embed"].update(weight=jnp.ones((98, 32), jnp.bfloat16)),
            "is float32, but the tree is bfloat16",
        ),
    ],
)
def test_a_foreign_tree_is_rejected_by_name(change: Callable[[decoder.Params], object], problem: str) -> None:
    spec = tiny.SPECS["one-kv-head"]
    public = tiny.public_params(spec)
    change(public)
    with pytest.raises(Exception, match=problem):
        param_layout.to_engine_layout(spec, public)


def test_trees_of_the_wrong_layout_are_rejected() -> None:
    spec, tokens = tiny.SPECS["dense"], tiny.tokens()
    public = tiny.public_params(spec)
    with pytest.raises(JaxserveError, match="not in this model's engine layout; load them with load_model"):
        decoder.forward(spec, public, tokens)
    with pytest.raises(JaxserveError, match="not in this model's engine layout"):
        param_layout.to_public_layout(spec, public)


def test_layers_may_be_numbered_by_strings_or_a_list() -> None:
    spec = tiny.SPECS["dense"]
    public = tiny.public_params(spec)
    want = param_layout.to_engine_layout(spec, public)
    named = {str(i): layer for i, layer in public["layers"].items()}
    for layers in (named, list(public["layers"].values())):
        found = param_layout.to_engine_layout(spec, public | {"layers": layers})
        jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize(
    ("lengths", "shown"), [(jnp.ones(1, jnp.int32), "2"), (jnp.ones(2), "2"), ([20, 20], "2")], ids=repr
)
def test_lengths_of_the_wrong_shape_are_rejected(lengths: Any, shown: str) -> None:
    spec = tiny.SPECS["dense"]
    params = tiny.engine_params(spec, tiny.public_params(spec))
    with pytest.raises(ValueError, match=rf"rope_lengths must be int32\[{shown}\]"):
        decoder.forward(spec, params, tiny.tokens(), rope_lengths=lengths)


@pytest.mark.parametrize(
    ("rope", "problem"),
    [
        (dict(base=-5.0), "base -5.0, expected above 1"),
        (dict(base=1.0), "base 1.0"),
        (dict(magnitude=0.0), "magnitude 0.0"),
        (dict(scaling=specs.LinearScaling(factor=0.0)), "factor 0.0"),
        (dict(scaling=specs.Yarn(factor=4.0, original=8, beta_slow=-1.0)), "beta_slow -1.0"),
        (dict(scaling=specs.Llama3(factor=4.0, original=8, low_freq=1.0, high_freq=1.0)), "increasing values"),
        (dict(scaling=specs.LongRope(short=(1.0,), long=(1e-40,), original=8)), "smallest divisor 1e-40"),
        (dict(scaling=specs.Dynamic(factor=0.5, original=8)), "has factor 0.5"),
    ],
)
def test_bad_rope_parameters_are_rejected(rope: dict[str, Any], problem: str) -> None:
    attention = tiny.grouped()
    assert attention.rope is not None
    turned = dataclasses.replace(attention, rope=dataclasses.replace(attention.rope, **rope))
    with pytest.raises(specs.CheckpointError, match=problem):
        tiny.model(tiny.block(turned, tiny.MLP))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(vocab_size=0), "vocab_size is 0"),
        (dict(hidden=2**40), "hidden is"),
        (dict(layers=()), "no layers"),
        (dict(layers=tiny.SPECS["mla"].layers * 501), "1,002 layers, expected at most 1000"),
        (dict(hidden="32"), "hidden is '32'"),
        (dict(tied=1), "tied is 1"),
        (dict(embed_dim=-4), "embed_dim is -4"),
        (dict(logit_scale=True), "logit_scale is True"),
        (dict(layers=[tiny.block(tiny.MLA, tiny.MLP)]), r"layers is \[Layer"),
        (dict(layers=(tiny.block(tiny.MLA, dataclasses.replace(tiny.MLP, activation="sin")),)), "activation is 'sin'"),
        (dict(layers=(tiny.block(dataclasses.replace(tiny.grouped(), sinks=2.5), tiny.MLP),)), "sinks is 2.5"),
        (dict(logit_scale=float("nan")), "logit_scale is nan"),
        (dict(layers=(tiny.block(tiny.grouped(kv_heads=3), tiny.MLP),)), "8 heads are not a multiple of 3 KV heads"),
    ],
)
def test_absurd_sizes_are_rejected(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(specs.CheckpointError, match=problem):
        dataclasses.replace(tiny.SPECS["dense"], **change)
