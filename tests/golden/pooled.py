# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose output is made of a hidden state: what they look like on the hub. make_pooled.py records what
sentence-transformers and transformers make of some texts with them. Python 3.11 is enough."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

from tests.golden import load, weights
from tests.golden.load import DATA, TOKENIZERS

VOCABULARY = 426  # of the byte-level tokenizer
EXPECTED = DATA / "pooled" / "expected.json"
TEXTS = ["The model reads the prompt.", "def fibonacci(n):", "Le café", "x"]
PAIRS = [("Which text has a number?", "1 22 333"), ("Which text has a number?", "none here"), ("a", "b")]


@dataclass(frozen=True)
class Pooled:
    base: str  # a golden case
    config: Mapping[str, Any]  # what differs in config.json
    bare: bool = False  # names of tensors lack `model.`
    labels: int = 0  # rows of the classification head
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # type -> config.json
    template: str | None = None  # for pairs of texts


POOLING = {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
MEAN = {
    "word_embedding_dimension": 64,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
}
CASES = {
    "embed": Pooled(
        "qwen3",
        {"architectures": ["Qwen3ForCausalLM"]},
        bare=True,
        modules={"Transformer": {}, "Pooling": POOLING, "Normalize": {}},
    ),
    "embed-dense": Pooled(
        "llama-gqa-tied",
        {"architectures": ["LlamaModel"]},
        bare=True,
        modules={
            "Transformer": {},
            "Pooling": POOLING,
            "Dense": {
                "in_features": 64,
                "out_features": 24,
                "bias": True,
                "activation_function": "torch.nn.modules.activation.Tanh",
            },
        },
    ),
    "embed-mean": Pooled(
        "qwen3",
        {"architectures": ["Qwen3Model"]},
        bare=True,
        modules={"Transformer": {}, "Pooling": MEAN, "Normalize": {}},
    ),
    "embed-mean-dense": Pooled(
        "llama-gqa-tied",
        {"architectures": ["LlamaModel"]},
        bare=True,
        modules={
            "Transformer": {},
            "Pooling": {"embedding_dimension": 64, "pooling_mode": "mean", "include_prompt": True},
            "Dense": {
                "in_features": 64,
                "out_features": 24,
                "bias": True,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
            "Normalize": {},
        },
    ),
    "embed-weighted": Pooled(
        "qwen3",
        {"architectures": ["Qwen3Model"]},
        bare=True,
        modules={
            "Transformer": {},
            "Pooling": MEAN | {"pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True},
        },
    ),
    "embed-cls": Pooled(
        "llama-gqa-tied",
        {"architectures": ["LlamaModel"]},
        bare=True,
        modules={
            "Transformer": {},
            "Pooling": MEAN | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True},
            "Normalize": {},
        },
    ),
    "classify": Pooled(
        "llama-gqa-tied",
        {
            "architectures": ["LlamaForSequenceClassification"],
            "id2label": {"0": "bad", "1": "so-so", "2": "good"},
            "label2id": {"bad": 0, "so-so": 1, "good": 2},
        },
        labels=3,
    ),
    "classify-each": Pooled(
        "qwen3",
        {
            "architectures": ["Qwen3ForSequenceClassification"],
            "id2label": {"0": "a", "1": "b"},
            "label2id": {"a": 0, "b": 1},
            "problem_type": "multi_label_classification",
        },
        labels=2,
    ),
    "rerank": Pooled(
        "qwen3",
        {
            "architectures": ["Qwen3ForSequenceClassification"],
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        },
        labels=1,
    ),
}
CASES["rerank-template"] = replace(
    CASES["rerank"],
    template="{% for m in messages %}{{ 'Q: ' if m.role == 'query' else ' D: ' if m.role == 'document' else '?' }}"
    "{{ m.content }}{% endfor %} match?",
)


def write(case: str, folder: Path) -> Path:
    """The model's folder, with the byte-level tokenizer."""
    pooled = CASES[case]
    golden = load.read(pooled.base)
    config = {**golden.config, "vocab_size": VOCABULARY, "pad_token_id": 0, **pooled.config}
    shapes = golden.tensors | {"model.embed_tokens.weight": (VOCABULARY, config["hidden_size"])}
    shapes.pop("lm_head.weight", None)
    tensors = {name: weights.tensor(golden.seed, name, shape, golden.rules) for name, shape in shapes.items()}
    if pooled.labels:
        tensors["score.weight"] = weights.uniform(1, "score", (pooled.labels, config["hidden_size"])) * 0.3
    if pooled.bare:
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    load.write_folder(folder, config, tensors, "float32", 1)
    for file in (TOKENIZERS / "byte-level").iterdir():
        copyfile(file, folder / file.name)
    if pooled.labels == 1:  # sentence-transformers uses any template
        (folder / "chat_template.jinja").unlink()
    if pooled.template is not None:
        (folder / "chat_template.jinja").write_text(pooled.template)
    modules: list[dict[str, Any]] = []
    for index, (kind, content) in enumerate(pooled.modules.items()):
        place = "" if kind == "Transformer" else f"{index}_{kind}"
        modules.append(
            {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{kind}"}
        )
        if place:
            (folder / place).mkdir()
            if content:
                (folder / place / "config.json").write_text(json.dumps(content))
        if kind == "Dense":
            size = (content["out_features"], content["in_features"])
            values = {
                "linear.weight": weights.uniform(2, "dense", size),
                "linear.bias": weights.uniform(3, "b", size[:1]),
            }
            load.write_safetensors(folder / place / "model.safetensors", values, "float32")
    if modules:
        (folder / "modules.json").write_text(json.dumps(modules))
    return folder
