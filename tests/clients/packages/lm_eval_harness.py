# SPDX-License-Identifier: Apache-2.0
"""lm-eval's two clients of such servers, on a task of two questions from a local file."""

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}

import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from shapes import QUESTION, run

TOKENIZER = os.environ.get("TOKENIZER", "")  # the folder of the model's
QUESTIONS = (
    {"question": QUESTION, "answer": "12", "choices": ["12", "3"], "right": 0},
    {"question": "What is 2 + 2?", "answer": "4", "choices": ["9", "4"], "right": 1},
)
COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
CHOICES = {
    **COMMON,
    "task": "toy_choices",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
TEXTS = {
    **COMMON,
    "task": "toy_texts",
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def evaluate(kind: str, arguments: str, tasks: list[dict[str, Any]], **more: Any) -> str:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data = Path(folder, "data.jsonl")
        data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
        for task in tasks:
            full = {**task, "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": folder}}
            Path(folder, f"{task['task']}.yaml").write_text(yaml.safe_dump(full))
        found: Any = simple_evaluate(
            model=kind,
            model_args=arguments,
            tasks=[task["task"] for task in tasks],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
            **more,
        )
    return " ".join(f"{name}:{len(found['samples'][name])}" for name in found["results"])


def local_completions(url: str, model: str) -> str:
    arguments = f"model={model},base_url={url}/completions,num_concurrent=2,max_retries=1,tokenizer={TOKENIZER}"
    return evaluate("local-completions", arguments, [CHOICES, TEXTS])


def local_chat_completions(url: str, model: str) -> str:
    arguments = f"model={model},base_url={url}/chat/completions,num_concurrent=2,max_retries=1"
    return evaluate("local-chat-completions", arguments, [TEXTS], apply_chat_template=True)


if __name__ == "__main__":
    run("lm_eval", {shape.__name__: shape for shape in (local_completions, local_chat_completions)})
