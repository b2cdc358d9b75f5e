# SPDX-License-Identifier: Apache-2.0
"""A 4-bit checkpoint in an engine: one result on every road, no compile after the start, --quantization."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig, QuantizationSetting
from jaxserve.engine.execute import loading
from jaxserve.errors import JaxserveError
from jaxserve.models import online
from jaxserve.quant.formats import FORMATS
from tests.fast import programs
from tests.golden import load as golden
from tests.quant.test_formats import DATA

CASES = ("gptq-4-ordered", "ct-moe", "fp8-deepseek")
OPTIONS: dict[str, Any] = dict(
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=64,
    num_blocks=64,
    block_size=8,
    skip_tokenizer_init=True,
    compilation_cache_dir=programs(),
    dtype="float32",
)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(7)
    shared = random.integers(0, 16, 17).tolist()
    return [shared + random.integers(0, 16, length).tolist() for length in range(1, 2 * count, 2)]


def answers(llm: LLM, given: list[list[int]]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(given, GREEDY)]


@pytest.mark.parametrize("case", CASES)
def test_one_result_on_every_road(case: str, forbid_compiles: Callable[[], AbstractContextManager[None]]) -> None:
    simple = LLM(str(DATA / case), enable_prefix_caching=False, async_scheduling=False, warmup=False, **OPTIONS)
    texts = prompts(6)
    wanted = [answers(simple, [text])[0] for text in texts]
    assert len({tuple(tokens) for tokens in wanted}) > 2
    llm = LLM(str(DATA / case), warmup="all", **OPTIONS)
    with forbid_compiles():
        assert answers(llm, texts) == wanted  # more than run at once, and longer than a step
        assert llm.metrics().prefix_hits > 0
        assert answers(llm, texts) == wanted  # all of them cached


# --- --quantization ---------------------------------------------------------------------------------------------------


def opened(case: str | Path, name: Any) -> Any:
    folder = case if isinstance(case, Path) else DATA / case
    return loading.open_folder(EngineConfig(model=str(folder), quantization=name), None)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("awq-32", "awq"),
        ("awq-32", "awq_marlin"),
        ("gptq-4", "gptq_marlin"),
        ("ct-mixed", "compressed-tensors"),
        ("fp8-block", "fp8"),
        ("modelopt-fp8", "modelopt"),
        ("modelopt-nvfp4", "modelopt_fp4"),
        ("gpt-oss-mxfp4", "gpt_oss_mxfp4"),
        ("bnb-nf4", "bitsandbytes"),
    ],
)
def test_the_method_of_the_checkpoint_may_be_named(case: str, name: str) -> None:
    assert opened(case, name).spec == opened(case, None).spec


def test_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JaxserveError, match="quantization is 'awq', but the checkpoint is quantized by gptq; leave it"):
        opened("gptq-4", "awq")
    with pytest.raises(JaxserveError, match="already quantized; leave out quantization='int8'"):
        opened("gptq-4", "int8")
    plain = golden.write_checkpoint("llama-mha", tmp_path)
    with pytest.raises(JaxserveError, match="'awq', but the checkpoint is not quantized; leave it out, or choose int8"):
        opened(plain, "awq")
    assert opened(plain, "int8").spec.quantized


def test_all_methods_can_be_named() -> None:
    named = set(get_args(QuantizationSetting.__value__))
    assert named == {*online.ONLINE, *FORMATS.keys() - {"toy"}, *online.SAME}
    assert set(online.SAME.values()) <= FORMATS.keys()
