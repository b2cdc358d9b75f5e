# SPDX-License-Identifier: Apache-2.0
"""Every family and config option against transformers' results, by dense and paged attention.

Each kind of attention runs paged here or in tests/engine/test_families.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import decoder
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from tests.golden import load as golden
from tests.golden.load import Golden
from tests.models.checkpoints import load_case
from tests.models.golden_cases import CROSSING, TOLERANCE, paged_cases
from tests.models.paged import Paged, Row

CHUNKS = (1, 7, 5, 13, 3)


@pytest.mark.parametrize("case", golden.cases())
def test_logits_and_greedy_text(case: str) -> None:
    want = golden.read(case)
    spec, params = load_case(case)
    check_dense(want, spec, params)
    if case in paged_cases():
        check_paged(want, spec, params)


def check_dense(want: Golden, spec: ModelSpec, params: Params) -> None:
    """The prompt, and the greedy text given whole: each token must be the best after those before it. Without a jit, so
    that equal layers, and what is around them, are compiled once for many cases."""
    text = [*want.greedy_prompt, *want.greedy]
    size = max(len(text), len(want.prompt))
    rows = np.zeros((2, size), np.int32)
    rows[0, : len(want.prompt)], rows[1, : len(text)] = want.prompt, text
    lengths = jnp.asarray([len(want.prompt), len(text)], jnp.int32)
    logits = np.asarray(decoder.forward(spec, params, jnp.asarray(rows), rope_lengths=lengths))
    close(logits[0, : len(want.prompt)], want)
    if want.case in CROSSING:
        prefixes = np.arange(len(want.greedy_prompt), len(text), dtype=np.int32)
        rows = np.tile(rows[1], (len(prefixes), 1))
        logits = np.asarray(decoder.forward(spec, params, jnp.asarray(rows), rope_lengths=jnp.asarray(prefixes)))
        assert tuple(logits[np.arange(len(prefixes)), prefixes - 1].argmax(axis=-1)) == want.greedy
        return
    best = logits[1].argmax(axis=-1)
    assert tuple(best[len(want.greedy_prompt) - 1 : len(text) - 1]) == want.greedy


def check_paged(want: Golden, spec: ModelSpec, params: Params) -> None:
    """Whole prefill; then chunks in odd sizes beside another row that decodes greedily."""
    prompt = list(want.prompt)
    size, longest = len(prompt), max(len(prompt), len(want.greedy_prompt) + len(want.greedy))
    paged = Paged(spec, params, tokens=size, max_length=longest)
    [whole] = paged.step((Row(len(prompt)), prompt))
    close(whole, want)

    paged = Paged(spec, params, tokens=size, max_length=longest)
    writer, reader = Row(len(want.greedy_prompt) + len(want.greedy)), Row(len(prompt))
    [logits] = paged.step((writer, list(want.greedy_prompt)))
    text, chunks = [int(logits[-1].argmax())], []
    sizes = iter(CHUNKS * 4)
    while len(text) < len(want.greedy):
        done = len(reader.tokens)
        chunk = prompt[done : done + next(sizes)] if done < len(prompt) else []
        outs = paged.step((writer, text[-1:]), *([(reader, chunk)] if chunk else []))
        text.append(int(outs[0][-1].argmax()))
        chunks += outs[1:]
    assert tuple(text) == want.greedy
    close(np.concatenate(chunks), want)


def close(logits: np.ndarray, want: Golden) -> None:
    assert logits.shape == want.logits.shape
    worst = np.abs(logits - want.logits).max() / want.logits.std()
    assert worst < TOLERANCE, f"{worst:.1e} of the spread"
