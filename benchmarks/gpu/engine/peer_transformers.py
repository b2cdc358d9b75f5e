# SPDX-License-Identifier: Apache-2.0
"""Times transformers' continuous batching: a Llama of the same shape with random weights, and the same lengths.

    python peer_transformers.py REQUESTS PROMPT ANSWER [tiny]

Needs a Python with torch and transformers, and nothing of jaxserve. Greedy, ignoring end tokens. The first run warms
up; the second one counts.
"""

import json
import random
import sys
import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}


def model(tiny: bool) -> Any:
    sizes: dict[str, Any] = TINY if tiny else LLAMA_8B
    config = LlamaConfig(**sizes, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    return made.eval()


def main() -> None:
    requests, prompt, answer = (int(word) for word in sys.argv[1:4])
    tiny = sys.argv[-1] == "tiny"
    llama = model(tiny)
    print(json.dumps({"version": f"{transformers.__version__}, torch {torch.__version__}"}), flush=True)
    draws = random.Random(3)
    wanted = GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # On a GPU it chooses the sizes; on a CPU it would take all of the memory.
    sizes: dict[str, Any] = {} if torch.cuda.is_available() else {"num_blocks": 8, "max_batch_tokens": 64}
    settings = ContinuousBatchingConfig(**sizes)
    for _ in range(2):
        ids = [draws.choices(range(3, llama.config.vocab_size), k=prompt) for _ in range(requests)]
        began = time.perf_counter()
        out = llama.generate_batch(
            inputs=ids,
            generation_config=wanted,
            continuous_batching_config=settings,
            progress_bar=False,
            persistent_manager=True,  # a new manager for each run would take the memory twice
        )
        seconds = time.perf_counter() - began
        made = sum(len(one.generated_tokens) for one in out.values())
        if made != requests * answer:
            raise SystemExit(f"error: {made} tokens, expected {requests * answer}")
        print(json.dumps({"seconds_taken": seconds, "tokens_per_s": made / seconds}), flush=True)


if __name__ == "__main__":
    main()
