# SPDX-License-Identifier: Apache-2.0
"""Prints what the real model answers, as JSON. A separate program, because tests compile without optimization."""

import json
from typing import Any

from convert.gguf import folder as folders
from jaxserve.llm import LLM
from jaxserve.text import tokenizer as tokenizers
from jaxserve.types.sampling_params import SamplingParams
from tests.real.chats import FILE, LENGTH, PROMPTS, QUESTIONS


def main() -> None:
    """All prompts and questions in one batch, which ends all at once: so the fewest programs are compiled."""
    tokenizer = tokenizers.load(folders.of(FILE))
    asked = [tokenizer.chat_text([{"role": "user", "content": question}]) for question in QUESTIONS]
    options: dict[str, Any] = dict(max_num_seqs=24, max_num_batched_tokens=128, block_size=16, num_blocks=200)
    llm = LLM(str(FILE), dtype="float32", max_model_len=128, warmup=False, **options)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in (*PROMPTS, *asked)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True))
    print(json.dumps([{"ids": list(each.outputs[0].token_ids), "text": each.outputs[0].text} for each in outputs]))


if __name__ == "__main__":
    main()
