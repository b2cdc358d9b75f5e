# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Records what transformers makes of a real GGUF file: token ids, and greedy texts in float32.

`make golden-gguf` runs it where `make real-model` was run before.
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.real.chats import EXPECTED, FILE, LENGTH, PROMPTS, TEXTS


def main() -> int:
    transformers.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    place = {"gguf_file": FILE.name}
    tokenizer = AutoTokenizer.from_pretrained(FILE.parent, **place)
    model = AutoModelForCausalLM.from_pretrained(FILE.parent, **place, dtype=torch.float32)
    texts = {text: tokenizer.encode(text, add_special_tokens=False) for text in TEXTS}
    greedy: dict[str, list[int]] = {}
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH, min_new_tokens=LENGTH
        )
        greedy[prompt] = made[0, ids.shape[1] :].tolist()
    content = {"transformers": transformers.__version__, "texts": texts, "greedy": greedy}
    EXPECTED.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
