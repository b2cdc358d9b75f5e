# SPDX-License-Identifier: Apache-2.0
"""Every family through the whole engine writes what transformers wrote, token by token.

Two requests share overlapped steps of few tokens. One has the golden prompt; the other begins with some of its greedy
text too, and must go on with the rest. So both prompts are computed in chunks, the second one's beside the first one's
decoding, and then both decode; from where the second begins follows that they end in the same step.
"""

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.models import registry
from jaxserve.types import Request, SamplingParams
from tests.engine.driver import Stream
from tests.golden import load as golden
from tests.models.checkpoints import load_case
from tests.models.test_golden import CROSSING, paged_cases

BLOCK = 8
BUDGET = 5


def begun(prompt: int) -> int:
    """How many tokens of the text the second prompt has, to be complete as many steps later: then both end at once, and
    programs for one row alone need not be compiled."""
    beside = -prompt % BUDGET  # its first tokens come along with the first prompt's last
    return next(k for k in range(1, prompt) if -(-(prompt + k - beside) // (BUDGET - 1)) == k)


def cases() -> list[str]:
    """One of each architecture, and of each that has a RoPE which depends on the sequence's length."""
    chosen: dict[tuple[str, bool], str] = {}
    for case in (*sorted(paged_cases()), *(case for case in golden.cases() if case not in CROSSING)):
        config = golden.read(case).config
        chosen.setdefault((config["architectures"][0], registry.spec_of(config).needs_rope_length), case)
    return sorted(chosen.values())


@pytest.mark.parametrize("case", cases())
def test_greedy_text(case: str) -> None:
    want = golden.read(case)
    spec, params = load_case(case)
    longest = len(want.greedy_prompt) + len(want.greedy)
    config = EngineConfig(
        model=case,
        max_model_len=longest,
        max_num_seqs=2,
        max_num_batched_tokens=BUDGET,
        block_size=BLOCK,
        num_blocks=1 + 2 * -(-longest // BLOCK),
        enable_prefix_caching=False,  # the second would find what the first computed
        warmup=False,
        compilation_cache_dir="",
    )
    engine = Engine(config, spec=spec, params=params, report=lambda line: None)
    streams: dict[str, Stream] = {}
    for name, count in (("all", 0), ("rest", begun(len(want.greedy_prompt)))):
        sampling = SamplingParams(temperature=0, max_tokens=len(want.greedy) - count)
        prompt = [*want.greedy_prompt, *want.greedy[:count]]
        engine.add(Request(id=name, prompt_token_ids=prompt, params=sampling))
        streams[name] = Stream()
    while engine.unfinished:
        for update in engine.step():
            streams[update.request_id].take(update)
    assert tuple(streams["all"].tokens) == want.greedy
    assert tuple(streams["rest"].tokens) == want.greedy[-len(streams["rest"].tokens) :]
    assert len(streams["rest"].tokens) > len(want.greedy) // 2
