# SPDX-License-Identifier: Apache-2.0
"""Every family through the whole engine writes what transformers wrote, token by token, and embeds as it does.

Two requests share overlapped steps of few tokens. One has the golden prompt; the other begins with some of its greedy
text too, and must go on with the rest. So both prompts are computed in chunks, the second one's beside the first one's
decoding, and then both decode; from where the second begins follows that they end in the same step.

Of an embedding transformers' logits are known: they are the head's of it.
"""

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.models.cache_groups import groups_of
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import Stream
from tests.fast import programs
from tests.golden import load as golden
from tests.models.checkpoints import load_case
from tests.models.golden_cases import TOLERANCE, engine_cases

BLOCK = 8
BUDGET = 5


def begun(prompt: int) -> int:
    """How many tokens of the text the second prompt has, to be complete as many steps later: then both end at once, and
    programs for one row alone need not be compiled."""
    beside = -prompt % BUDGET  # its first tokens come along with the first prompt's last
    return next(k for k in range(1, prompt) if -(-(prompt + k - beside) // (BUDGET - 1)) == k)


@pytest.mark.parametrize("case", engine_cases())
def test_greedy_text(case: str) -> None:
    want = golden.read(case)
    spec, params = load_case(case)
    text = len(want.greedy_prompt) + len(want.greedy)
    engine = engine_of(case, spec, params, longest=text if spec.needs_rope_length else max(text, len(want.prompt)))
    streams: dict[str, Stream] = {}
    for name, count in (("all", 0), ("rest", begun(len(want.greedy_prompt)))):
        sampling = SamplingParams(temperature=0, max_tokens=len(want.greedy) - count)
        prompt = [*want.greedy_prompt, *want.greedy[:count]]
        engine.add(Request(id=name, prompt_token_ids=prompt, params=sampling))
        streams[name] = Stream()
    run(engine, streams)
    assert tuple(streams["all"].tokens) == want.greedy
    assert tuple(streams["rest"].tokens) == want.greedy[-len(streams["rest"].tokens) :]
    assert len(streams["rest"].tokens) > len(want.greedy) // 2

    if spec.needs_rope_length:  # the angles are those of max_model_len, as transformers' are of the recorded length
        engine = engine_of(case, spec, params, longest=len(want.prompt))
    count = len(want.prompt)
    count -= count % BUDGET == 1  # so that no step is of one token, for which programs would be compiled
    engine.add(Request(id="embedded", prompt_token_ids=want.prompt[:count], embed=True))
    streams["embedded"] = Stream()
    run(engine, streams)
    embedding = np.frombuffer(streams["embedded"].embedding or b"", np.float32)
    logits = head(spec, params, embedding)
    assert np.abs(logits - want.logits[count - 1]).max() < TOLERANCE * want.logits.std()


def engine_of(case: str, spec: ModelSpec, params: Params, *, longest: int) -> Engine:
    groups = len(groups_of(spec, longest).windows)
    config = EngineConfig(
        model=case,
        max_model_len=longest,
        max_num_seqs=2,
        max_num_batched_tokens=BUDGET,
        block_size=BLOCK,
        num_blocks=1 + 2 * groups * -(-longest // BLOCK),
        enable_prefix_caching=False,  # the second would find what the first computed
        warmup=False,
        compilation_cache_dir=programs(),
    )
    return Engine(config, spec=spec, params=params, report=lambda line: None)


def run(engine: Engine, streams: dict[str, Stream]) -> None:
    while engine.unfinished:
        for update in engine.step():
            streams[update.request_id].take(update)


def head(spec: ModelSpec, params: Params, embedding: np.ndarray) -> np.ndarray:
    """More numbers than the embedding has: no other has the same."""
    weight = np.asarray(params["embed"]["weight"] if spec.tied else params["head"], np.float64)
    assert embedding.shape == weight.shape[1:] and np.linalg.matrix_rank(weight) == embedding.size
    logits = weight @ embedding
    if spec.head_bias:
        logits += np.asarray(params["head_bias"], np.float64)
    logits = logits[: spec.vocab_size] * spec.logit_scale
    cap = spec.logit_soft_cap
    return logits if cap is None else cap * np.tanh(logits / cap)
