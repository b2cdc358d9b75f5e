# SPDX-License-Identifier: Apache-2.0
"""A tiny model behind the Python API, and its reference results from a dense forward pass.

All tests take the same shapes, so that a process compiles each program once.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.async_llm import AsyncLLM
from jaxserve.llm import LLM
from jaxserve.models import decoder, param_layout
from jaxserve.models.attention import Dense
from jaxserve.models.decoder import Params
from tests.fast import programs
from tests.golden.load import TOKENIZERS
from tests.models import tiny
from tests.models.paged import run_forward

TOKENIZER = TOKENIZERS / "byte-level"
END = 424  # its end of text
SPEC = replace(tiny.SPECS["one-kv-head"], vocab_size=426)
OPTIONS: dict[str, Any] = {
    "spec": SPEC,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "max_logprobs": 8,
    "warmup": False,
    "compilation_cache_dir": programs(),
}


def params(seed: int = 0) -> Params:
    return tiny.public_params(SPEC, seed)


def make(**more: Any) -> LLM:
    return LLM("tiny", **{"params": params(), "tokenizer": str(TOKENIZER), **OPTIONS, **more})


def make_async(**more: Any) -> AsyncLLM:
    return AsyncLLM("tiny", **{"params": params(), "tokenizer": str(TOKENIZER), **OPTIONS, **more})


class Reference:
    """The model computed densely, with parameters in public layout."""

    def __init__(self, public: Params) -> None:
        self._params = jax.jit(param_layout.to_engine_layout, static_argnums=0)(SPEC, public)

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [tokens, vocabulary]: log probabilities of what follows each token."""
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = run_forward(SPEC, self._params, jnp.asarray(padded))
        return np.asarray(jax.nn.log_softmax(logits[0, : len(tokens)]))

    def scores(self, tokens: Sequence[int]) -> np.ndarray:
        table = self.logprobs(tokens)
        return table[np.arange(len(tokens) - 1), np.asarray(tokens[1:], np.int64)]

    def embedding(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [hidden]: the last token's hidden state before the head."""
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(_states(self._params, jnp.asarray(padded))[0, len(tokens) - 1])

    def greedy(self, prompt: Sequence[int], count: int, ends: Set[int] = frozenset((END,))) -> list[int]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] not in ends):
            tokens.append(int(self.logprobs(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@jax.jit
def _states(params: Params, tokens: jax.Array) -> jax.Array:
    body, head = decoder.bind(decoder.Body, SPEC, params), decoder.bind(decoder.Head, SPEC, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x = body(tokens, positions, Dense())
    return head.final(x)


def counted[**P, R](function: Callable[P, R], calls: list[Any]) -> Callable[P, R]:
    """The same function, recording the arguments of each call."""

    def noting(*args: P.args, **options: P.kwargs) -> R:
        calls.append(args)
        return function(*args, **options)

    return noting
