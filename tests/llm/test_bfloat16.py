# SPDX-License-Identifier: Apache-2.0
"""Engines in bfloat16 on a CPU: what they generate and how likely they find a text, beside transformers in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from tests.fast import programs
from tests.golden import load as golden

CASES = ("llama-mha", "mixtral", "deepseek-v3", "gpt2", "gemma3")
OPTIONS: dict[str, Any] = dict(
    skip_tokenizer_init=True,
    max_num_seqs=2,
    max_num_batched_tokens=16,
    num_blocks=32,
    warmup="none",
    compilation_cache_dir=programs(),
)


@pytest.mark.parametrize("case", CASES)
def test_it_generates_what_float32_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setenv("JAXSERVE_CPU_DTYPE", "bfloat16")
    content = golden.read(case)
    llm = LLM(str(golden.write_checkpoint(case, tmp_path, dtype="bfloat16")), **OPTIONS)
    assert llm.spec.dtype == "bfloat16"
    [answer] = llm.generate(
        [list(content.greedy_prompt)], SamplingParams(temperature=0, max_tokens=len(content.greedy), ignore_eos=True)
    )
    assert list(answer.outputs[0].token_ids)[:4] == list(content.greedy)[:4]
    [scored] = llm.generate([list(content.prompt)], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert scored.prompt_logprobs is not None
    given = [next(iter(each.values())).logprob for each in scored.prompt_logprobs[1:] if each]
    shifted = content.logits - content.logits.max(-1, keepdims=True)
    wanted = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    true = [wanted[place, token] for place, token in enumerate(content.prompt[1:])]
    assert abs(np.mean(given) - np.mean(true)) < 0.02
    assert np.abs(np.subtract(given, true)).max() < 0.5


def test_two_devices_generate_the_same(tmp_path: Path) -> None:
    content = golden.read("mixtral")
    folder = golden.write_checkpoint("mixtral", tmp_path, dtype="bfloat16")
    llm = LLM(str(folder), dtype="bfloat16", tensor_parallel_size=2, **OPTIONS)
    [answer] = llm.generate([list(content.greedy_prompt)], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert list(answer.outputs[0].token_ids) == list(content.greedy)[:4]
