# SPDX-License-Identifier: Apache-2.0
"""LLM: embeddings, counts, requests that have no numbers to give, and contexts of the caller's."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import JaxserveError, RequestError
from jaxserve.llm import LLM
from jaxserve.text import tokenizer as tokenizers
from jaxserve.types.metrics import STEP_TOKENS
from jaxserve.types.sampling_params import SamplingParams
from tests import tiny_llm
from tests.tiny_llm import Reference

TOKENIZER = tokenizers.load(tiny_llm.TOKENIZER)
GREEDY = SamplingParams(temperature=0, max_tokens=6)
LONG = list(range(40, 80))  # more than a step computes at once


@pytest.fixture(scope="module")
def shared() -> LLM:
    return tiny_llm.make()


@pytest.fixture
def llm(shared: LLM) -> Generator[LLM]:
    yield shared
    found = shared.metrics()
    assert (found.running, found.waiting, found.used_blocks) == (0, 0, 0)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(tiny_llm.params())


def test_embeddings_are_the_models_last_hidden_states(llm: LLM, reference: Reference) -> None:
    text = "The server"
    prompts = [LONG, text, [5], {"prompt_token_ids": LONG[:30], "cache_salt": "mine"}, *([i] for i in range(8))]
    ids = [LONG, TOKENIZER.encode(text), [5], LONG[:30], *([i] for i in range(8))]
    found = llm.embed(prompts)
    assert [(e.dtype, e.shape) for e in found] == [(np.float32, (tiny_llm.SPEC.hidden,))] * len(prompts)
    for embedding, tokens in zip(found, ids, strict=True):
        np.testing.assert_allclose(embedding, reference.embedding(tokens), rtol=1e-4, atol=1e-4)
    [alone] = llm.embed(LONG)
    np.testing.assert_allclose(alone, found[0], rtol=1e-5, atol=1e-5)
    alone /= np.linalg.norm(alone)  # it is the caller's own
    assert llm.embed([]) == []
    assert len(llm.embed([list(range(128))])) == 1  # as long as the model takes
    with pytest.raises(RequestError, match=r"prompt 1: .*129 tokens.*at most 128 can be embedded"):
        llm.embed([[1], [1] * 129])


def poisoned(token: int) -> dict[str, Any]:
    """Of this token the model knows no numbers."""
    public = tiny_llm.params()
    weight = public["embed"]["weight"].at[token].set(jnp.nan)
    return {**public, "embed": {**public["embed"], "weight": weight}}


def test_what_has_no_numbers_is_an_error_that_says_which() -> None:
    llm = tiny_llm.make(params=poisoned(33))
    with pytest.raises(JaxserveError, match=r"sequence 1: .*not finite"):
        llm.score([[1, 2, 3], [1, 33, 2], [4]])
    with pytest.raises(JaxserveError, match=r"prompt 1: .*not finite"):
        llm.embed([[1, 2, 3], [1, 33, 2]])
    [output] = llm.generate([1, 33], GREEDY)
    assert output.outputs[0].finish_reason == "error"
    assert np.isfinite(llm.score([1, 2, 3])[0]).all() and np.isfinite(llm.embed([1, 2, 3])[0]).all()
    found = llm.metrics()
    assert found.used_blocks == 0 and found.finished["error"] == 3


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no transfers": lambda: jax.transfer_guard("disallow_explicit"),
    "no compiling": lambda: jax.disable_jit(True),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_what_a_caller_says_of_its_own_computing_is_not_meant(
    reference: Reference, context: Callable[[], AbstractContextManager[Any]]
) -> None:
    public = tiny_llm.params()
    wanted = reference.greedy(LONG, 6)
    with context():
        llm = LLM("tiny", params=public, tokenizer=str(tiny_llm.TOKENIZER), **tiny_llm.OPTIONS)
        [output] = llm.generate([LONG], GREEDY)
        assert output.outputs[0].token_ids == wanted
        arrays = llm.generate_arrays([LONG], GREEDY)
        llm.update_weights(public)
        llm.sleep()
        llm.wake()
        [again] = llm.generate([LONG], replace(GREEDY, max_tokens=3))
    assert arrays.tokens[0, 0].tolist() == wanted
    assert again.outputs[0].token_ids == wanted[:3]


def test_what_steps_computed_is_counted(llm: LLM) -> None:
    llm.reset_prefix_cache()
    before = llm.metrics()
    llm.generate([LONG], replace(GREEDY, max_tokens=3))
    after = llm.metrics()
    steps = [new - old for new, old in zip(after.step_tokens, before.step_tokens, strict=True)]
    upper = (*STEP_TOKENS, float("inf"))
    # 40 prompt tokens by 16, then two of three sampled ones.
    assert {end: count for end, count in zip(upper, steps, strict=True) if count} == {16: 2, 8: 1, 1: 2}
    assert sum(after.step_tokens) == after.steps
    assert after.computed_tokens - before.computed_tokens == 42
    assert (after.prefix_queries - before.prefix_queries, after.prefix_hits - before.prefix_hits) == (40, 0)
    llm.embed(LONG)
    found = llm.metrics()
    assert (found.prefix_queries - after.prefix_queries, found.prefix_hits - after.prefix_hits) == (40, 32)
