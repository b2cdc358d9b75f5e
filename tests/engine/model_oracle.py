# SPDX-License-Identifier: Apache-2.0
"""Predicts a sample of a request from the model's logits in plain numpy: tokens, log probabilities, ranks.

The noise that sampling adds is a pure function of seed, position and token, so even a sampled token can be predicted.
Only if two tokens are nearly equal in float32, either is correct.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxserve.types.outputs import TokenLogprobs
from jaxserve.types.request import Request
from pallas_kernels.reference import survivors
from pallas_kernels.row_sampler import gumbel_noise
from tests.engine.driver import EOS, VOCABULARY
from tests.sampling.oracle import Asked, edits

NEAR = 2e-4  # of two logits: the dense model and the paged one differ by less


@dataclass(frozen=True)
class Step:
    """What determines the next token of a sample."""

    request: Request
    index: int
    output: list[int]  # what it generated so far
    logits: np.ndarray  # [vocabulary], as the model gives them

    @property
    def edited(self) -> np.ndarray:
        params, request = self.request.params, self.request
        stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (EOS,))}
        asked = Asked(params, request.prompt_token_ids, self.output, sorted(stops), request.bad_word_ids)
        return edits(self.logits, asked)

    @property
    def scores(self) -> np.ndarray:
        """The values that sampling takes the maximum of, in units of logits."""
        params, edited = self.request.params, self.edited
        if params.greedy:
            return edited
        seed = (params.seed or 0) ^ ((params.seed or 0) >> 32 & 0xFFFF_FFFF)
        noise = gumbel_noise(
            jnp.uint32((seed + self.index) & 0xFFFF_FFFF),
            jnp.int32(len(self.request.prompt_token_ids) + len(self.output)),
            jnp.arange(VOCABULARY, dtype=jnp.int32),
        )
        return edited + np.float64(np.float32(params.temperature)) * np.asarray(noise, np.float64)

    def survivors(self, slack: float = 0.0) -> np.ndarray:
        """The tokens that the filters keep; with slack also those that are filtered out by no more than that."""
        params = self.request.params
        edited = self.edited
        kept = survivors(
            edited,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=min(1.0, params.top_p + slack),
            min_p=params.min_p * (1 - 10 * slack),
        )
        return kept | ((edited >= edited[kept].min() - 10 * slack) & (edited > -np.inf)) if slack > 0 else kept

    def possible(self) -> set[int]:
        """The correct tokens: one, except for ties."""
        scores = self.scores
        best = np.where(self.survivors(), scores, -np.inf).max()
        loosely = np.where(self.survivors(NEAR), scores, -np.inf)
        strictly = np.where(self.survivors(-NEAR), scores, -np.inf)
        floor = min(best, strictly.max()) - NEAR
        return set(np.flatnonzero(loosely >= floor).tolist())

    def processed(self) -> np.ndarray:
        """The logits of the distribution that is sampled from."""
        scaled = self.edited / (self.request.params.temperature or 1.0)
        return np.where(self.survivors(), scaled, -np.inf)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def check_logprobs(reported: TokenLogprobs, logits: np.ndarray, token: int, wanted: int) -> None:
    """Compare with a row of logits; ranks and order up to ties."""
    likely = log_softmax(logits)
    assert reported.token == token
    np.testing.assert_allclose(reported.logprob, likely[token], rtol=1e-5, atol=1e-4)
    above, near = (likely > likely[token] + NEAR).sum(), (likely > likely[token] - NEAR).sum()
    assert above + 1 <= reported.rank <= max(near, above + 1)
    count = min(wanted, int((likely > -np.inf).sum()))
    assert len(reported.top_tokens) == len(reported.top_logprobs) == len(set(reported.top_tokens)) == count
    np.testing.assert_allclose(reported.top_logprobs, np.sort(likely)[::-1][:count], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(reported.top_logprobs, likely[reported.top_tokens], rtol=1e-5, atol=1e-4)
