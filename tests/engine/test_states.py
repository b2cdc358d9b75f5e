# SPDX-License-Identifier: Apache-2.0
"""A recurrent layer beside attention: its state follows each sequence through rows, chunks, forks and preemptions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.config import EngineConfig
from jaxserve.engine.capacity import resolve
from jaxserve.engine.execute import memory
from jaxserve.errors import CheckpointError
from jaxserve.models import decoder
from jaxserve.models.layers import Linear
from jaxserve.models.recurrent import Stateful
from jaxserve.models.spec import Recurrent, StateArray
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import FULL, LONGEST, Driver, alone, params_of
from tests.models import tiny

WIDTH = 6


@dataclass(frozen=True, kw_only=True)
class Fading(Recurrent):
    """Half of the sum so far, and the value of the token."""

    state: tuple[StateArray, ...] = (StateArray(name="sum", shape=(WIDTH,)),)

    @property
    def width(self) -> int:
        return self.state[0].shape[0]


class FadingSum(nnx.Module):
    def __init__(self, spec: Fading, hidden: int, *, dtype: Any) -> None:
        self.value = Linear({"latent": spec.width}, {"hidden": hidden}, dtype=dtype)
        self.out = Linear({"hidden": hidden}, {"latent": spec.width}, dtype=dtype)

    def __call__(self, x: jax.Array, turn: Any, core: Any) -> tuple[jax.Array, Any]:
        values = self.value(x)
        if not isinstance(core, Stateful):

            def step(total: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
                return (total := 0.5 * total + value), total

            _, sums = jax.lax.scan(step, jnp.zeros_like(values[:, 0]), values.swapaxes(0, 1))
            return self.out(sums.swapaxes(0, 1)), None
        place = jnp.arange(len(x))
        lines = jnp.searchsorted(jnp.asarray(core.ragged.cu_q_lens)[1:], place, side="right", method="compare_all")

        def ragged(totals: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            line, value = at
            total = 0.5 * totals.at[line].get(mode="clip") + value
            return totals.at[line].set(total, mode="drop"), total

        totals, sums = jax.lax.scan(ragged, core.before()["sum"], (lines, values))
        return self.out(sums), core.after({"sum": totals})


HYBRID = replace(
    FULL,
    layers=(
        replace(tiny.block(tiny.grouped(), tiny.MLP), attention=Fading()),
        tiny.block(tiny.grouped(), tiny.MLP),
        replace(tiny.block(tiny.grouped(), tiny.MLP), attention=Fading()),
    ),
)


@pytest.fixture(autouse=True)
def mixer() -> Iterator[None]:
    decoder.MIXERS[Fading] = FadingSum
    yield
    del decoder.MIXERS[Fading]


def asked(name: str, prompt: list[int], **params: Any) -> Request:
    given: dict[str, Any] = dict(temperature=1.0, seed=len(prompt), max_tokens=12, ignore_eos=True) | params
    return Request(id=name, prompt_token_ids=prompt, params=SamplingParams(**given))


REQUESTS = [
    asked("long", list(range(5, 45))),
    asked("forked", list(range(50, 61)), n=3),
    asked("short", [7]),
    asked("same beginning", [*range(5, 30), 9], temperature=0),
    asked("other", list(range(60, 80)), n=2, max_tokens=20),
]


def test_greedy_tokens_are_those_of_the_dense_model() -> None:
    prompt = list(range(11, 30))
    [got] = Driver(HYBRID).finish(asked("a", prompt, temperature=0)).values()
    line, params = list(prompt), params_of(HYBRID)
    for token in got.tokens:
        padded = jnp.asarray([line + [0] * (LONGEST - len(line))], jnp.int32)
        logits = decoder.forward(HYBRID, params, padded)
        assert token == int(np.argmax(logits[0, len(line) - 1]))
        line.append(token)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(budget=5), dict(async_scheduling=False, budget=7), dict(spare=8), dict(spare=8, budget=6)],
    ids=str,
)
def test_states_follow_their_sequences(options: dict[str, Any]) -> None:
    driver, single = Driver(HYBRID, **options), Driver(HYBRID, async_scheduling=False)
    wanted = alone(single, REQUESTS)
    got = driver.finish(*REQUESTS)
    assert {name: stream.tokens for name, stream in got.items()} == {name: s.tokens for name, s in wanted.items()}
    again = driver.finish(*(replace(each, id=f"{each.id} again") for each in REQUESTS))
    assert [s.tokens for s in again.values()] == [s.tokens for s in got.values()]
    assert driver.engine.metrics().cached_tokens == 0
    if "spare" in options:
        assert driver.scheduler.preemptions


def test_states_have_their_memory() -> None:
    config = EngineConfig(model="x", max_num_seqs=4, num_blocks=9, block_size=8, max_num_batched_tokens=32)
    on = memory.of_weights(HYBRID, params_of(HYBRID), None, on_cpu=True)
    hybrid, full = (resolve(config, spec, on) for spec in (HYBRID, replace(HYBRID, layers=HYBRID.layers[1:2])))
    assert hybrid.state - full.state == 4 * 2 * WIDTH * 4
    assert hybrid.block_bytes == full.block_bytes
    assert not hybrid.limits.enable_prefix_caching and "prefix caching is off" in hybrid.cache_lines()[-1]
    driver = Driver(HYBRID)
    assert driver.engine.capacity.state == sum(
        leaf.nbytes for leaf in jax.tree.leaves((driver.runner.tables, driver.runner.last, driver.runner.controls))
    ) + sum(each["sum"].nbytes for each in driver.runner.cache if "sum" in each)


def test_absurd_states_are_refused() -> None:
    """A config is untrusted."""
    for shape in ((0,), (2**40,), ("a",)):
        mixer = Fading(state=(StateArray(name="sum", shape=shape),))  # pyright: ignore[reportArgumentType]
        with pytest.raises(CheckpointError, match=r"the config is invalid: .*state"):
            replace(HYBRID, layers=(replace(HYBRID.layers[0], attention=mixer), *HYBRID.layers[1:]))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(CheckpointError, match="model has no layer with attention"):
        replace(HYBRID, layers=HYBRID.layers[:1])
