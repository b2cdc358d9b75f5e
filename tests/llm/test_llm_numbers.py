# SPDX-License-Identifier: Apache-2.0
"""LLM: scores, arrays, embeddings, weights that are not finite, JAX contexts of the caller, metrics."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import JaxserveError, RequestError
from jaxserve.llm import LLM
from jaxserve.types.metrics import STEP_TOKENS
from jaxserve.types.sampling_params import SamplingParams
from tests import tiny_llm
from tests.llm.checks import GREEDY, LONG, TOKENIZER, tokens
from tests.tiny_llm import END, Reference


def test_scores_are_the_models(llm: LLM, reference: Reference) -> None:
    sequences = [LONG, [5], [7, 8], list(range(60))]
    found = llm.logprobs(sequences)
    assert [(scores.dtype, scores.shape) for scores in found] == [(np.float32, (len(s) - 1,)) for s in sequences]
    for scores, sequence in zip(found, sequences, strict=True):
        np.testing.assert_allclose(scores, reference.scores(sequence), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(llm.logprobs(LONG)[0], found[0])
    np.testing.assert_array_equal(llm.logprobs(np.array(LONG))[0], found[0])
    assert len(llm.logprobs([list(range(128))])[0]) == 127  # as long as the model takes
    with pytest.raises(RequestError, match=r"prompt 1: .*129 tokens.*scored"):
        llm.logprobs([[1], [1] * 129])


def test_arrays_equal_the_outputs_of_generate(llm: LLM, reference: Reference) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=5, logit_bias={END: 6.0})
    prompts = [[1, 2, 3], [9], LONG]
    outputs = llm.generate(prompts, replace(params, logprobs=1))
    assert {len(ids) for ids in tokens(outputs)} > {5}  # some end early
    padded = np.zeros((3, 40), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = jnp.array([3, 1, 40], jnp.int32)
    for given in (prompts, [np.array(prompt) for prompt in prompts], (jnp.asarray(padded), lengths)):
        found = llm.generate_arrays(given, params, pad_id=-1)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
        assert (found.tokens.shape, found.tokens.dtype, found.logprobs.dtype) == ((3, 2, 5), jnp.int32, jnp.float32)
        for row, output in enumerate(outputs):
            for sample in output.outputs:
                at, count = (row, sample.index), len(sample.token_ids)
                assert found.tokens[at].tolist() == sample.token_ids + [-1] * (5 - count)
                assert found.mask[at].tolist() == [True] * count + [False] * (5 - count)
                assert found.lengths[at] == count
                assert found.finish_reasons[at] == ("stop", "length").index(str(sample.finish_reason))
                text = output.prompt_token_ids + sample.token_ids
                expected = reference.scores(text)[len(output.prompt_token_ids) - 1 :]
                np.testing.assert_allclose(found.logprobs[at][:count], expected, rtol=1e-4, atol=1e-4)
                assert not found.logprobs[at][count:].any()
    assert llm.generate_arrays([], params).tokens.shape == (0, 1, 0)
    assert llm.generate_arrays([[1] * 120], replace(params, max_tokens=None)).tokens.shape == (1, 2, 8)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([1, 2], "single prompt"),
        ((np.zeros((2, 3), np.int32), np.array([3])), "one integer length per row"),
        ((np.zeros((2, 3), np.int32), np.array([3, 4])), "lengths range from 3 to 4"),
        ((np.zeros((2, 3), np.int32), np.array([3, 0])), "prompt 1: the prompt is empty"),
        ([[1], [500]], "prompt 1: .*500"),
    ],
)
def test_errors_name_the_bad_array(llm: LLM, prompts: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.generate_arrays(prompts, GREEDY)
    with pytest.raises(RequestError, match="n varies from 1 to 2"):
        llm.generate_arrays([[1], [2]], [GREEDY, SamplingParams(n=2)])


def test_embeddings_are_the_models_last_hidden_states(llm: LLM, reference: Reference) -> None:
    text = "The server"
    prompts = [LONG, text, [5], {"prompt_token_ids": LONG[:30], "cache_salt": "mine"}, *([i] for i in range(8))]
    ids = [LONG, TOKENIZER.encode(text), [5], LONG[:30], *([i] for i in range(8))]
    found = llm.encode(prompts)
    assert [(e.dtype, e.shape) for e in found] == [(np.float32, (tiny_llm.SPEC.hidden,))] * len(prompts)
    for embedding, prompt in zip(found, ids, strict=True):
        np.testing.assert_allclose(embedding, reference.embedding(prompt), rtol=1e-4, atol=1e-4)
    [alone] = llm.encode(LONG)
    np.testing.assert_allclose(alone, found[0], rtol=1e-5, atol=1e-5)
    alone /= np.linalg.norm(alone)  # it is the caller's own
    assert llm.encode([]) == []
    assert len(llm.encode([list(range(128))])) == 1  # as long as the model takes
    with pytest.raises(RequestError, match=r"prompt 1: .*129 tokens.*at most 128 can be embedded"):
        llm.encode([[1], [1] * 129])


def poisoned(token: int) -> dict[str, Any]:
    """Weights with NaN in the embedding of this token."""
    public = tiny_llm.params()
    weight = public["embed"]["weight"].at[token].set(jnp.nan)
    return {**public, "embed": {**public["embed"], "weight": weight}}


def test_results_that_are_not_finite_raise_an_error_that_names_the_prompt() -> None:
    llm = tiny_llm.make(params=poisoned(33))
    with pytest.raises(JaxserveError, match=r"sequence 1: .*not finite"):
        llm.logprobs([[1, 2, 3], [1, 33, 2], [4]])
    with pytest.raises(JaxserveError, match=r"prompt 1: .*not finite"):
        llm.encode([[1, 2, 3], [1, 33, 2]])
    [output] = llm.generate([1, 33], GREEDY)
    assert output.outputs[0].finish_reason == "error"
    assert np.isfinite(llm.logprobs([1, 2, 3])[0]).all() and np.isfinite(llm.encode([1, 2, 3])[0]).all()
    found = llm.metrics()
    assert found.used_blocks == 0 and found.finished["error"] == 3


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no transfers": lambda: jax.transfer_guard("disallow_explicit"),
    "no compiling": lambda: jax.disable_jit(True),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_jax_contexts_of_the_caller_do_not_apply(
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


def test_metrics_count_computed_tokens(llm: LLM) -> None:
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
    llm.encode(LONG)
    found = llm.metrics()
    assert (found.prefix_queries - after.prefix_queries, found.prefix_hits - after.prefix_hits) == (40, 32)
