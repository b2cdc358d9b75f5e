# SPDX-License-Identifier: Apache-2.0
"""Section `check_models`: whole models, computed with the kernels, against the logits of transformers.

Uses the tests' golden checkpoints, in float32 with full-precision matmuls: prefill of the prompt, then the greedy text
token by token in decode steps.
"""

import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.checks.attention import implementation
from convert import load
from jaxserve.models import decoder, registry
from tests.golden import load as golden
from tests.models.paged import Paged
from tests.models.paged import Row as Sequence

COLUMNS = ("worst", "tolerance", "same_text", "ok")

CASES = (
    *("llama-gqa-tied", "qwen3-moe", "deepseek-v3", "gpt-oss", "gemma2", "gemma3", "mixtral", "deepseek-v2-groups"),
    *("qwen2", "phi3", "gpt-neox-parallel", "opt", "gpt2", "cohere-qk-norm", "glm4", "falcon-new", "stablelm-qk-norm"),
)
TOLERANCE = 2e-4  # relative to the logits' standard deviation


def check(case: str) -> Row:
    want = golden.read(case)
    with tempfile.TemporaryDirectory() as name:
        folder = golden.write_checkpoint(case, Path(name))
        spec, family = registry.read_config(folder)
        params = load.load(folder, spec, family, dtype=jnp.float32)
    # Jitted here, because the tests' jitted step may hold a trace with another choice of kernels.
    step = jax.jit(partial(decoder.step, spec), donate_argnums=1)
    prompt = list(want.prompt)
    longest = max(len(prompt), len(want.greedy_prompt) + len(want.greedy))
    paged = Paged(spec, params, tokens=len(prompt), max_length=longest, step=step)
    [logits] = paged.step((Sequence(len(prompt)), prompt))
    worst = float(np.abs(logits - want.logits).max() / want.logits.std())

    paged = Paged(spec, params, tokens=len(prompt), max_length=longest, step=step)
    row = Sequence(len(want.greedy_prompt) + len(want.greedy))
    [logits] = paged.step((row, list(want.greedy_prompt)))
    text = [int(logits[-1].argmax())]
    while len(text) < len(want.greedy):
        [logits] = paged.step((row, text[-1:]), decode_only=True)
        text.append(int(logits[-1].argmax()))
    same = tuple(text) == want.greedy
    return {"worst": worst, "tolerance": TOLERANCE, "same_text": same, "ok": same and worst < TOLERANCE}


def run(page: Page) -> None:
    cases = CASES[:1] if page.settings.tiny else CASES
    with implementation(page), jax.default_matmul_precision("highest"):
        page.each(cases, check, name=str)
