# SPDX-License-Identifier: Apache-2.0
"""The costs of controls (memory, copies, transfers), and which requests need them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sampling import controls
from jaxserve.sampling.control_row import COUNT_SHAPE, ROWS_AT_ONCE, ControlRow, kinds, mask_words, pack, row_size
from jaxserve.types.sampling_params import SamplingParams
from tests.conftest import ForbidCompiles
from tests.sampling.oracle import Asked
from tests.sampling.rows import ALLOCATE, Rows

ROWS, PLACES = 6, 4


def vector(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def step(
    state: controls.Controls, logits: jax.Array, rows: jax.Array, active: jax.Array, positions: jax.Array
) -> tuple[jax.Array, controls.Controls]:
    edited = controls.apply(state, logits, rows=rows, active=active, positions=positions)
    tokens = jnp.argmax(edited, axis=1).astype(jnp.int32)
    return tokens, controls.update(state, rows=rows, active=active, tokens=tokens)


def programs(vocab_size: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    places = vector(PLACES), vector(PLACES, dtype=bool), vector(PLACES)
    return {
        **{f"set_rows[{n}]": (controls.set_rows, (vector(n, row_size(vocab_size)),)) for n in ROWS_AT_ONCE},
        "add_counts": (controls.add_counts, (vector(*COUNT_SHAPE),)),
        "step": (step, (vector(PLACES, vocab_size, dtype=np.float32), *places)),
    }


@pytest.mark.parametrize("name", [*programs(100)])
def test_controls_are_updated_in_place(name: str) -> None:
    function, arguments = programs(1000)[name]
    state = controls.abstract(ROWS, 1000)
    compiled = jax.jit(function, donate_argnums=0).lower(state, *arguments).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == controls.nbytes(ROWS, 1000)
    lines = [line.strip() for line in (compiled.as_text() or "").splitlines()]
    shapes = [f"[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(state)]
    copies = [line for line in lines if " copy(" in line and any(shape in line for shape in shapes)]
    assert not copies
    assert not [line for line in lines if " sort(" in line]


def test_no_buffer_moves_and_nothing_compiles_later(forbid_compiles: ForbidCompiles) -> None:
    rows = Rows(ROWS, 1000)
    params = SamplingParams(repetition_penalty=2, frequency_penalty=1, logit_bias={5: 1}, min_tokens=3)
    every = Asked(params, prompt=range(9), output=[1, 2], stops=[3], bad_words=[(2, 4)])

    def walk() -> None:
        for row in range(ROWS):
            rows.put(row, every)
        rows.apply(np.zeros((PLACES, 1000), np.float32), range(PLACES), [11] * PLACES, [True] * PLACES)
        rows.update(range(PLACES), [7] * PLACES, [True, False] * 2)

    walk()
    before = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(rows.controls)]
    with forbid_compiles():
        walk()
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(rows.controls)] == before


@pytest.mark.parametrize("vocab_size", [50257, 151936])
def test_shapes_at_the_size_of_real_vocabularies(vocab_size: int) -> None:
    state = controls.abstract(256, vocab_size)
    assert controls.nbytes(256, vocab_size) == 256 * 4 * (
        vocab_size + -(-vocab_size // 32) + 2 * 1024 + 256 + 1 + 3 + 128 * 32 + 31
    )
    for name, (function, arguments) in programs(vocab_size).items():
        result = jax.eval_shape(function, state, *arguments)
        assert (result[1] if name == "step" else result) == state, name
    edited = jax.eval_shape(
        lambda s, x, r, a, p: controls.apply(s, x, rows=r, active=a, positions=p),
        state,
        *programs(vocab_size)["step"][1],
    )
    assert (edited.shape, edited.dtype) == ((PLACES, vocab_size), jnp.float32)


def test_abstract_takes_a_sharding() -> None:
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Explicit,))
    whole = jax.NamedSharding(mesh, jax.P())
    state = controls.abstract(ROWS, 100, whole)
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves(state))
    with jax.set_mesh(mesh):  # replicated controls work in programs over a mesh
        tokens, after = jax.eval_shape(step, state, *programs(100)["step"][1])
    assert tokens.shape == (PLACES,) and after.counts.shape == (ROWS, 100)


def test_allocation_is_zeros() -> None:
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(ALLOCATE(ROWS, 1000)))


@pytest.mark.parametrize(
    ("asked", "bad_words", "needed"),
    [
        ({}, (), (False, False)),
        (dict(temperature=0, seed=3, stop_token_ids=[4], top_k=3, logprobs=2), (), (False, False)),
        (dict(logit_bias={}), (), (False, False)),
        (dict(presence_penalty=0.1), (), (True, False)),
        (dict(frequency_penalty=-0.1), (), (True, False)),
        (dict(repetition_penalty=0.9), (), (True, False)),
        (dict(logit_bias={1: 0.5}), (), (True, False)),
        (dict(allowed_token_ids=[0]), (), (False, True)),
        (dict(min_tokens=1), (), (True, False)),
        ({}, ((1, 2),), (True, False)),
        (dict(min_tokens=1, allowed_token_ids=[0]), (), (True, True)),
    ],
)
def test_requests_that_need_controls(
    asked: dict[str, Any], bad_words: tuple[tuple[int, ...], ...], needed: tuple[bool, bool]
) -> None:
    assert kinds(SamplingParams(**asked), bad_words) == needed


def packed(**changed: Any) -> tuple[Any, list[Any]]:
    given: dict[str, Any] = dict(params=SamplingParams(), prompt=[1, 2], stops=[], bad_words=[])
    output = changed.pop("output", [])
    controls = ControlRow(vocab_size=100, **{**given, **changed})
    [rows], counts = pack([(0, controls, output)], 100)
    return rows, counts


def test_vectors_have_fixed_sizes() -> None:
    params = SamplingParams(repetition_penalty=2, logit_bias={1: 2.0}, allowed_token_ids=[3])
    for change in (
        {},
        dict(params=params),
        dict(params=params, output=[1] * 99, bad_words=[(1, 2)], stops=[4, 5] * 200),
    ):
        row, counts = packed(**change)
        assert row.shape == (1, row_size(100)) and row.dtype == np.int32
        assert [(c.shape, c.dtype) for c in counts] == [(COUNT_SHAPE, np.int32)] * ("params" in change)
    assert row_size(100) - row_size(32) == mask_words(100) - mask_words(32) == 3


@pytest.mark.parametrize(
    "beyond",
    [
        dict(stops=range(257), params=SamplingParams(min_tokens=1)),
        dict(bad_words=[(1,)] * 129),
        dict(bad_words=[(1,) * 33]),
        dict(bad_words=[()]),
        dict(prompt=[100], params=SamplingParams(repetition_penalty=2)),
        dict(output=[-1], params=SamplingParams(presence_penalty=2)),
        dict(params=SamplingParams(allowed_token_ids=[128])),
    ],
)
def test_entries_that_do_not_fit_are_never_dropped(beyond: dict[str, Any]) -> None:
    """Users get an earlier and better error; here a bug of the caller must not become a wrong mask."""
    with pytest.raises((ValueError, IndexError)):
        packed(**beyond)


def test_stops_without_a_minimum_length_take_no_place() -> None:
    row, counts = packed(stops=range(5000), params=SamplingParams(presence_penalty=1))
    assert row.shape == (1, row_size(100)) and not counts


def test_only_a_repetition_penalty_sends_the_prompt() -> None:
    prompt = range(100)
    assert packed(params=SamplingParams(presence_penalty=1, frequency_penalty=1), prompt=prompt)[1] == []
    assert len(packed(params=SamplingParams(repetition_penalty=1.1), prompt=prompt)[1]) == 1


def test_packing_takes_lists_as_they_are() -> None:
    """Prompts may be arrays, tuples or lists."""
    params, reference = SamplingParams(frequency_penalty=1), None
    for kind in (list, tuple, partial(np.array, dtype=np.int32)):
        row, counts = packed(params=params, prompt=kind([5, 6]), output=kind([7, 7]))
        found = np.concatenate([row.ravel(), *map(np.ravel, counts)])
        reference = found if reference is None else reference
        np.testing.assert_array_equal(found, reference)
