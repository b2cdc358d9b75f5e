# SPDX-License-Identifier: Apache-2.0
"""The timing of another engine, with a fake in its place."""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.engine import peer


class FakeLLM:
    """Returns so many tokens for each prompt."""

    made = 4
    asked: list[Any]

    def __init__(self, **options: Any) -> None:
        FakeLLM.asked = []

    def generate(self, prompts: list[dict[str, list[int]]], params: Any, *, use_tqdm: bool) -> list[Any]:
        FakeLLM.asked.append([len(prompt["prompt_token_ids"]) for prompt in prompts])
        sample = SimpleNamespace(token_ids=[7] * self.made)
        return [SimpleNamespace(outputs=[sample]) for _ in prompts]


def test_the_second_run_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    vllm: Any = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams, vllm.__version__ = FakeLLM, SimpleNamespace, "0"
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(sys, "argv", ["peer.py", "vllm", "2", "3", "4"])
    peer.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (
        lines[0] == {"version": "0"} and [list(line) for line in lines[1:]] == [["seconds_taken", "tokens_per_s"]] * 2
    )
    assert FakeLLM.asked == [[3, 3]] * 2
    monkeypatch.setattr(FakeLLM, "made", 3)
    with pytest.raises(SystemExit, match="6 tokens, expected 8"):
        peer.main()
