# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Records what sentence-transformers and transformers make of texts with the models of pooled.py.

`make golden-pooled` runs it, in the venv of the golden cases.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer, __version__
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.golden.pooled import CASES, EXPECTED, PAIRS, TEXTS, write


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found: dict[str, Any] = {"transformers": transformers.__version__, "sentence_transformers": __version__}
    for case, pooled in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            found[case] = record(str(write(case, Path(place) / "model")), labels=pooled.labels)
    EXPECTED.write_text(json.dumps(found, indent=1) + "\n")


def record(folder: str, *, labels: int) -> list[list[float]]:
    if labels == 1:
        scorer = CrossEncoder(folder, device="cpu")
        scorer.tokenizer.pad_token = scorer.tokenizer.eos_token  # asked for, but one text needs no padding
        return [[float(scorer.predict([pair])[0])] for pair in PAIRS]
    if not labels:
        model = SentenceTransformer(folder, device="cpu")
        model.tokenizer.pad_token = model.tokenizer.eos_token
        return [[round(float(x), 7) for x in model.encode([text])[0]] for text in TEXTS]
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = [classifier(**tokenizer(text, return_tensors="pt")).logits[0].double() for text in TEXTS]
    each = classifier.config.problem_type == "multi_label_classification"
    return [(row.sigmoid() if each else row.softmax(-1)).tolist() for row in logits]


if __name__ == "__main__":
    main()
