# SPDX-License-Identifier: Apache-2.0
"""The runner by itself: padding changes nothing, programs are shared, memory is given back."""

import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.engine.execute import compiler
from jaxserve.engine.execute.runner import Runner, bucket_of, settle
from jaxserve.engine.schedule import packing
from jaxserve.models import param_layout
from tests.engine.execute.smallest import CAPACITY, SPEC
from tests.models import tiny


@pytest.fixture(scope="module")
def runner() -> Runner:
    runner = Runner(SPEC, param_layout.to_engine_layout(SPEC, tiny.public_params(SPEC)), CAPACITY)
    runner.allocate()
    return runner


def filled(tree: Any) -> Any:
    """Fill the state with values that any write would change."""
    return jax.tree.map(lambda leaf: (jax.numpy.ones_like(leaf) * 7).astype(leaf.dtype), tree)


def state(runner: Runner) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves((runner.cache, runner.tables, runner.last, runner.controls))]


def test_padding_changes_nothing(runner: Runner) -> None:
    runner.cache, runner.tables, runner.last, runner.controls = filled(
        (runner.cache, runner.tables, runner.last, runner.controls)
    )
    before = state(runner)
    largest = {bucket_of(key)[0]: key for key in reversed(runner.every_key())}
    assert {"decode", "mixed", "embed", "edit", *runner.heads} < largest.keys()
    runner.exercise(largest.values())
    for old, new in zip(before, state(runner), strict=True):
        np.testing.assert_array_equal(old, new)


def test_programs_are_shared_by_equal_runners(runner: Runner) -> None:
    key = (1, runner.heads[0])
    twin = Runner(runner.spec, runner.params, CAPACITY)
    assert compiler.compiled(twin.program(key)) is compiler.compiled(runner.program(key))
    other = Runner(runner.spec, runner.params, replace(CAPACITY, limits=replace(CAPACITY.limits, max_logprobs=2)))
    assert compiler.compiled(other.program(key)) is compiler.compiled(runner.program(key)), "it returns no logprobs"
    last = other.program((1, other.heads[-1]))
    assert compiler.compiled(last) is not compiler.compiled(runner.program((1, runner.heads[-1])))


def test_memory_is_freed_and_allocated_again(runner: Runner) -> None:
    leaves = jax.tree.leaves((runner.cache, runner.tables, runner.last, runner.controls))
    runner.free()
    assert all(leaf.is_deleted() for leaf in leaves)
    runner.allocate()
    assert all(not leaf.any() for leaf in state(runner))


def test_the_end_of_a_process_waits_for_its_steps(runner: Runner) -> None:
    """Otherwise jax's threads, which need Python's lock after a copy, abort the process."""

    @jax.jit
    def slow(vector: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 40, lambda _, x: jax.numpy.sin(x @ x), vector)

    busy = Runner(runner.spec, runner.params, CAPACITY)
    big = jax.numpy.ones((1000, 1000), jax.numpy.float32)
    busy.last = slow(big)
    assert not busy.last.is_ready()
    settle()
    assert busy.last.is_ready()


def test_an_unknown_program(runner: Runner) -> None:
    with pytest.raises(ValueError, match="no program 'nothing'"):
        runner.program("nothing")


def test_devices_do_not_share_programs(runner: Runner) -> None:
    """Equal shapes on another device need other programs, independently of jax's default device."""
    device = jax.devices()[2]
    with jax.default_device(device):
        other = Runner(runner.spec, jax.device_put(runner.params, device), CAPACITY)
    other.allocate()
    key = (1, runner.heads[0])
    assert compiler.compiled(other.program(key)) is not compiler.compiled(runner.program(key))
    assert other.cache[0]["latent"].devices() == {device}


def test_interrupted_compiling_leaves_the_rest(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []

    def interrupt(where: object, program: object, store: object) -> None:
        begun.append(program)
        time.sleep(0.01)  # otherwise one thread may take all of them before another sees the first one's end
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "compile_on", interrupt)
    wanted = [runner.program((1, need)) for need in runner.heads] * 20
    with pytest.raises(KeyboardInterrupt):
        compiler.compile_all(wanted, workers=1)
    assert len(begun) < len(wanted)


def test_programs_are_compiled_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch, runner: Runner) -> None:
    """The state that is allocated later matches the compiled programs: nothing is moved or compiled again."""
    late = Runner(runner.spec, runner.params, CAPACITY)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in state_of(late))
    monkeypatch.setattr(compiler, "compile_all", lambda wanted, **_: [compiler.compiled(one) for one in wanted])
    late.warm(keys=late.covering())
    late.exercise(late.covering())
    shapes = jax.tree.leaves(late._state)
    for leaf, shape in zip(state_of(late), shapes, strict=True):
        assert isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    assert late.compiled_late == 0


def state_of(runner: Runner) -> list[Any]:
    return jax.tree.leaves((runner.cache, runner.tables, runner.last, runner.controls))


@pytest.mark.parametrize("tied", [False, True])
def test_a_program_gets_the_parameters_that_it_reads(tied: bool) -> None:
    """Each call passes over all arguments: a head over two, not over those of all layers."""
    spec = replace(SPEC, tied=tied)
    runner = Runner(spec, param_layout.to_engine_layout(spec, tiny.public_params(spec)), CAPACITY)
    read = {
        key: {param_layout.dotted(path) for path, _ in param_layout.leaves(runner.program(key).shapes[0])}
        for key in ((1, runner.heads[0]), (1, runner.heads[-1]), ("embed", 1), packing.decode_layout(1))
    }
    head = {"final_norm.weight", "embed.weight" if tied else "head"}
    assert read[1, runner.heads[0]] == read[1, runner.heads[-1]] == read["embed", 1] == head
    whole = {param_layout.dotted(path) for path, _ in param_layout.leaves(runner.params)}
    assert read[packing.decode_layout(1)] == whole - head | {"embed.weight"}
