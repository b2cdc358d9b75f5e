# SPDX-License-Identifier: Apache-2.0
"""The golden cases, one entry each: a tiny model of every family and of every switch of its config.

A case without `hub` is recorded with the config.json that this release of transformers saves. One
with `hub` is recorded with the config.json written here, which has the keys and the older forms of
a published model, and only its sizes are tiny.
"""

from tests.golden.case import Case
from tests.golden.families import (
    cohere,
    deepseek,
    gemma,
    glm,
    gpt2_opt,
    gpt_neox,
    gpt_oss,
    llama,
    llama_like,
    mistral,
    phi,
    qwen,
    stablelm_falcon,
)

__all__ = ["CASES", "Case"]

CASES = [
    *llama.CASES,
    *mistral.CASES,
    *qwen.CASES,
    *gemma.CASES,
    *phi.CASES,
    *gpt_neox.CASES,
    *deepseek.CASES,
    *llama_like.CASES,
    *cohere.CASES,
    *gpt2_opt.CASES,
    *stablelm_falcon.CASES,
    *glm.CASES,
    *gpt_oss.CASES,
]
