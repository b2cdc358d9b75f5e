# SPDX-License-Identifier: Apache-2.0
"""New weights for a running LLM, and its sleep: what is swapped, what is rejected, and the outputs afterwards."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ConfigError
from jaxserve.engine.execute import jax_start, weights
from jaxserve.engine.execute.weights import Conversion
from jaxserve.errors import EngineError, JaxserveError
from jaxserve.llm import LLM
from jaxserve.models import param_layout
from jaxserve.models.decoder import Params
from jaxserve.parallel.mesh import make_mesh
from jaxserve.types.sampling_params import SamplingParams
from tests import tiny_llm
from tests.conftest import ForbidCompiles
from tests.golden import load as golden
from tests.models import tiny
from tests.tiny_llm import SPEC, Reference

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPT = list(range(40, 70))
OLD, NEW = tiny_llm.params(0), tiny_llm.params(1)


@pytest.fixture(scope="module")
def shared() -> LLM:
    return tiny_llm.make()


@pytest.fixture
def llm(shared: LLM) -> Generator[LLM]:
    if shared._engine.asleep:
        shared.wake()
    shared.update_weights(OLD, version=0)
    yield shared


@pytest.fixture(scope="module")
def answers() -> dict[str, list[int]]:
    found = {name: Reference(params).greedy(PROMPT, 6) for name, params in (("old", OLD), ("new", NEW))}
    assert found["old"] != found["new"]
    return found


def answer(llm: LLM) -> list[int]:
    [output] = llm.generate(PROMPT, GREEDY)
    return output.outputs[0].token_ids


def engine_layout(public: Params) -> Params:
    return jax.jit(param_layout.to_engine_layout, static_argnums=0)(SPEC, public)


def pointers(params: Params) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]


def test_engine_layout_is_taken_without_a_copy(llm: LLM, answers: dict[str, list[int]]) -> None:
    assert answer(llm) == answers["old"]
    new = engine_layout(NEW)
    llm.update_weights(new)
    assert all(mine is given for mine, given in zip(*map(jax.tree.leaves, (llm.params, new)), strict=True))
    assert pointers(llm.params) == pointers(new)
    [output] = llm.generate(PROMPT, GREEDY)
    assert output.outputs[0].token_ids == answers["new"]
    assert output.num_cached_tokens == 0  # what the old weights computed is forgotten
    assert output.outputs[0].policy_version == llm.metrics().policy_version == 1


def test_the_public_layout_is_converted(llm: LLM, answers: dict[str, list[int]]) -> None:
    llm.update_weights(jax.tree.map(np.asarray, NEW), version=17)
    [output] = llm.generate(PROMPT, GREEDY)
    assert (output.outputs[0].token_ids, output.outputs[0].policy_version) == (answers["new"], 17)
    public = llm.public_params()
    assert jax.tree.structure(public) == jax.tree.structure(NEW)
    for mine, given in zip(*map(jax.tree.leaves, (public, NEW)), strict=True):
        np.testing.assert_array_equal(mine, given)


def test_other_forms_of_the_same_weights(llm: LLM, answers: dict[str, list[int]]) -> None:
    """From the host, from another device, from a mesh of one, in another dtype."""
    new = engine_layout(NEW)
    elsewhere = jax.device_put(new, jax.devices()[3])
    on_mesh = jax.device_put(new, jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec()))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), new)
    for given in (jax.tree.map(np.asarray, new), elsewhere, on_mesh, wide):
        llm.update_weights(OLD)
        llm.update_weights(given)
        assert answer(llm) == answers["new"]
        assert {leaf.dtype for leaf in jax.tree.leaves(llm.params)} == {jnp.dtype(jnp.float32)}


def test_public_params_are_copies(llm: LLM, answers: dict[str, list[int]]) -> None:
    """What a trainer donates or deletes is its own."""
    public = llm.public_params()
    assert not set(pointers(public)) & set(pointers(llm.params))
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)
    doubled = step(public)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(public))
    np.testing.assert_array_equal(doubled["embed"]["weight"], 2 * np.asarray(OLD["embed"]["weight"]))
    assert answer(llm) == answers["old"]


def test_public_params_without_a_copy_are_the_engines_where_they_can_be(llm: LLM) -> None:
    public, mine = llm.public_params(copy=False), llm.params
    assert public["final_norm"]["weight"] is mine["final_norm"]["weight"]
    for got, wanted in zip(*map(jax.tree.leaves, (public, OLD)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_tree_of_the_engine_is_not_changed_by_an_update(llm: LLM, answers: dict[str, list[int]]) -> None:
    kept = llm.params
    llm.update_weights(NEW)
    llm.update_weights(kept)
    assert answer(llm) == answers["old"]


def test_only_the_first_call_compiles(llm: LLM, forbid_compiles: ForbidCompiles) -> None:
    public = llm.public_params()
    llm.update_weights(public)
    other = jax.tree.map(jnp.array, NEW)
    late = llm.metrics().compiled_late
    with forbid_compiles():
        llm.public_params()
        llm.update_weights(other)
        llm.update_weights(public)
    assert llm.metrics().compiled_late == late


def live() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture
def frozen() -> Generator[None]:
    """What exists before the test is left out of its collections, each of which would take seconds otherwise."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
def test_an_update_needs_memory_for_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the old parameters and the given ones; the old ones are freed on the way."""
    spec = replace(SPEC, layers=SPEC.layers * 6)
    llm = tiny_llm.make(spec=spec, params=tiny.public_params(spec))
    given = tiny.public_params(spec, seed=1)
    fused = [leaf.nbytes for path, leaf in param_layout.leaves(llm.params) if {"qkv", "gate_up"} & {*path}]
    assert sum(fused) >= 6 * max(fused)
    peaks, run = list[int](), Conversion.run

    def measured(self: Conversion) -> jax.Array:
        tensor = run(self)
        peaks.append(live())
        return tensor

    monkeypatch.setattr(Conversion, "run", measured)
    before = live()
    llm.update_weights(given)
    assert len(peaks) == len(jax.tree.leaves(llm.params))
    assert before < max(peaks) <= before + max(fused)
    assert live() <= before


def failing(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The conversion of this tensor, counted from 0, finds no memory."""
    put, calls = weights._put, itertools.count()

    def short(array: Any, where: Any) -> jax.Array:
        if isinstance(array, jax.Array) and next(calls) == at:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")
        return put(array, where)

    monkeypatch.setattr(weights, "_put", short)


def test_without_memory_nothing_is_replaced(
    llm: LLM, answers: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = jax.tree.leaves(llm.params)
    new = engine_layout(NEW)
    with monkeypatch.context() as patch:
        failing(patch, 0)
        with pytest.raises(JaxserveError, match=r"needs [\d,]+ bytes per device beside .* RESOURCE_EXHAUSTED"):
            llm.update_weights(new)
    assert all(mine is old for mine, old in zip(jax.tree.leaves(llm.params), before, strict=True))
    assert answer(llm) == answers["old"] and llm.metrics().policy_version == 0
    llm.sleep(2)
    with monkeypatch.context() as patch:
        failing(patch, 3)
        with pytest.raises(JaxserveError, match="RESOURCE_EXHAUSTED"):
            llm.update_weights(new)
    assert llm.params == {}, "half of the parameters were kept"
    llm.update_weights(OLD)
    llm.wake()
    assert answer(llm) == answers["old"]


def test_the_largest_tensor_comes_first() -> None:
    found = weights.conversions(SPEC, NEW, None)
    assert [each.size for each in found] == sorted((each.size for each in found), reverse=True)
    assert found[0].path[-2:] in (("gate_up", "kernel"), ("qkv", "kernel"))


def test_an_engine_with_parameters_of_two_models_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm.make()
    failing(monkeypatch, 3)
    with pytest.raises(EngineError, match="only 3 of 13 parameters were replaced"):
        llm.update_weights(engine_layout(NEW))
    with pytest.raises(EngineError, match="only 3 of 13"):
        llm.generate(PROMPT, GREEDY)


def edited(params: Params, path: tuple[Any, ...], value: Any) -> Params:
    """The tree with this value at the path, or without the leaf if the value is None."""
    params = copy.deepcopy(jax.tree.map(np.asarray, params))
    node: Any = params
    for key in path[:-1]:
        node = node[key]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return params


ATTENTION = ("layers", 0, "attention")
QKV, Q = (*ATTENTION, "qkv", "kernel"), (*ATTENTION, "q", "kernel")
EMBED = ("embed", "weight")
# Built when a test runs: every process that collects tests imports this file.
WRONG: dict[str, tuple[Callable[[], Params], str]] = {
    "engine, a leaf missing": (lambda: edited(engine_layout(OLD), QKV, None), r"layers\.0\.attention\.qkv\.kernel"),
    "engine, a leaf too many": (
        lambda: edited(engine_layout(OLD), (*ATTENTION, "gate"), np.ones(3)),
        r"layers\.0\.attention\.gate",
    ),
    "engine, another shape": (
        lambda: edited(engine_layout(OLD), EMBED, np.ones((426, 31), np.float32)),
        r"embed\.weight.*\[426, 31\].*\[426, 32\]",
    ),
    "engine, integers": (
        lambda: edited(engine_layout(OLD), EMBED, np.ones((426, 32), np.int32)),
        r"embed\.weight is int32",
    ),
    "engine, no array": (lambda: edited(engine_layout(OLD), EMBED, "weights"), r"embed\.weight"),
    "public, a leaf missing": (lambda: edited(OLD, Q, None), r"layers\.0\.attention\.q\.kernel"),
    "public, a leaf too many": (
        lambda: edited(OLD, (*ATTENTION, "gate"), np.ones(3)),
        r"layers\.0\.attention\.gate",
    ),
    "public, another shape": (
        lambda: edited(OLD, Q, np.ones((8, 8, 31), np.float32)),
        r"layers\.0\.attention\.q\.kernel.*31",
    ),
    "another model": (lambda: tiny.public_params(tiny.SPECS["moe"]), r"experts|router|vocab|embed"),
    "nothing": (lambda: {}, "embed.weight|lack"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_tree_is_rejected_with_the_name_of_the_leaf(llm: LLM, answers: dict[str, list[int]], case: str) -> None:
    tree, words = WRONG[case]
    before = jax.tree.leaves(llm.params)
    with pytest.raises(JaxserveError, match=words):
        llm.update_weights(tree())
    assert all(mine is old for mine, old in zip(jax.tree.leaves(llm.params), before, strict=True))
    assert answer(llm) == answers["old"]
    assert llm.metrics().policy_version == 0


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_memory_and_wake_restores_the_weights(llm: LLM, answers: dict[str, list[int]], level: int) -> None:
    cache = jax.tree.leaves(llm._engine.runner.cache)
    llm.sleep(level)
    assert all(pool.is_deleted() for pool in cache)
    assert llm.params == {}
    with pytest.raises(JaxserveError, match="is asleep"):
        llm.generate(PROMPT, GREEDY)
    with pytest.raises(JaxserveError, match="the engine is asleep; wake it first"):
        llm.public_params()
    with pytest.raises(JaxserveError, match="is already asleep"):
        llm.sleep()
    if level == 2:
        with pytest.raises(JaxserveError, match="load new ones"):
            llm.wake()
        llm.update_weights(OLD, version=0)
    llm.wake()
    assert answer(llm) == answers["old"]
    with pytest.raises(JaxserveError, match="is not asleep"):
        llm.wake_up()
    with pytest.raises(JaxserveError, match="level 3"):
        llm.sleep(3)


@pytest.mark.parametrize("level, kept", [(1, "kept in host memory"), (2, "discarded")])
@pytest.mark.parametrize("returned", [True, False])
def test_sleep_says_who_can_use_the_memory(
    llm: LLM,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    level: int,
    kept: str,
    returned: bool,
) -> None:
    monkeypatch.setattr(jax_start, "returns_memory", lambda device: returned)
    assert llm._engine.sleep(level) == returned
    line = capsys.readouterr().err
    assert line.startswith(f"asleep: weights are {kept}; freed device memory is available to ")
    assert ("to all processes" in line, "to this process only (jax keeps freed memory" in line) == (
        returned,
        not returned,
    )
    llm.update_weights(OLD)


@pytest.mark.parametrize("returned", [True, False])
def test_sleep_mode_without_effect_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, returned: bool
) -> None:
    """As in a program that has started jax before."""
    monkeypatch.setattr(jax_start, "returns_memory", lambda device: returned)
    tiny_llm.make(enable_sleep_mode=True)
    line = "enable_sleep_mode has no effect: jax keeps freed memory unless"
    assert (line in capsys.readouterr().err) == (not returned)


def test_after_a_deep_sleep_a_checkpoint_is_read_again(tmp_path: Path) -> None:
    golden.write_checkpoint("qwen3", tmp_path)
    few = {name: value for name, value in tiny_llm.OPTIONS.items() if name != "spec"}
    llm = LLM(str(tmp_path), skip_tokenizer_init=True, **few)
    before = llm.generate([1, 5, 9], GREEDY)[0].outputs[0].token_ids
    held = [weakref.ref(leaf) for leaf in jax.tree.leaves(llm.params)]
    llm.update_weights(jax.tree.map(lambda leaf: -leaf, llm.params), version=7)
    held += [weakref.ref(leaf) for leaf in jax.tree.leaves(llm.params)]
    llm.sleep(2)
    assert not any(leaf() is not None for leaf in held), "the weights are still referenced"
    llm.wake()
    assert llm.metrics().policy_version == 0, "the checkpoint's are no update"
    assert llm.generate([1, 5, 9], GREEDY)[0].outputs[0].token_ids == before


def test_weights_may_come_during_sleep(llm: LLM, answers: dict[str, list[int]]) -> None:
    llm.sleep()
    llm.update_weights(engine_layout(NEW), version=5)
    llm.wake_up()
    [output] = llm.generate(PROMPT, GREEDY)
    assert (output.outputs[0].token_ids, output.outputs[0].policy_version) == (answers["new"], 5)


def test_a_shared_tree_outlives_sleep(answers: dict[str, list[int]]) -> None:
    """The trainer holds the same arrays."""
    mine = engine_layout(NEW)
    llm = tiny_llm.make(params=mine)
    assert pointers(llm.params) == pointers(mine)
    llm.sleep(2)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(mine))
    llm.update_weights(mine)
    llm.wake()
    assert answer(llm) == answers["new"]


def test_reset_prefix_cache(llm: LLM) -> None:
    answer(llm)
    [hit] = llm.generate(PROMPT, GREEDY)
    llm.reset_prefix_cache()
    [miss] = llm.generate(PROMPT, GREEDY)
    assert (hit.num_cached_tokens, miss.num_cached_tokens) == (24, 0)
    assert hit.outputs[0].token_ids == miss.outputs[0].token_ids


def test_weights_on_a_mesh(answers: dict[str, list[int]]) -> None:
    mesh = make_mesh(tensor=2)
    with jax.set_mesh(mesh):
        old, new = engine_layout(OLD), engine_layout(NEW)
    llm = tiny_llm.make(params=old, mesh=mesh)
    assert pointers_of_shards(llm.params) == pointers_of_shards(old)
    assert answer(llm) == answers["old"]
    llm.update_weights(new)
    assert pointers_of_shards(llm.params) == pointers_of_shards(new)
    assert answer(llm) == answers["new"]
    llm.update_weights(OLD)
    assert answer(llm) == answers["old"]
    for mine, given in zip(*map(jax.tree.leaves, (llm.public_params(), OLD)), strict=True):
        np.testing.assert_array_equal(mine, given)
    found = llm.generate_arrays([PROMPT], GREEDY)
    assert found.tokens.sharding.is_fully_replicated and found.tokens.sharding.device_set == set(mesh.devices.flat)
    assert found.tokens[0, 0].tolist() == answers["old"]
    llm.sleep()
    llm.wake()
    assert answer(llm) == answers["old"]
    with pytest.raises(ConfigError, match="mesh"):
        tiny_llm.make(params=old)


def pointers_of_shards(params: Params) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]


def test_a_mesh_set_by_the_caller_is_ignored(llm: LLM, answers: dict[str, list[int]]) -> None:
    with jax.set_mesh(make_mesh(tensor=2)):
        llm.update_weights(NEW)
        assert answer(llm) == answers["new"]
        assert jax.tree.structure(llm.public_params()) == jax.tree.structure(NEW)
        fresh = tiny_llm.make(params=OLD)
        assert answer(fresh) == answers["old"]


def test_donated_arrays_are_rejected(llm: LLM, answers: dict[str, list[int]]) -> None:
    tree = jax.tree.map(jnp.array, llm.public_params())
    tree["layers"][0]["mlp"]["down"]["kernel"].delete()
    with pytest.raises(JaxserveError, match=r"layers\.0\.mlp\.down\.kernel was deleted or donated"):
        llm.update_weights(tree)
    assert answer(llm) == answers["old"]


@pytest.mark.parametrize("version", ["a", -1, 1.5, True])
def test_versions_are_whole_numbers(llm: LLM, version: Any) -> None:
    with pytest.raises(JaxserveError, match="version"):
        llm.update_weights(llm.params, version=version)
