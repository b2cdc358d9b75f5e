# SPDX-License-Identifier: Apache-2.0
"""Times vLLM offline: a Llama of the same shape with random weights, and the same lengths.

    python peer_vllm.py REQUESTS PROMPT ANSWER

Needs a Python with vllm, and nothing of jaxserve. The first run warms up; the second one counts.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import vllm  # pyright: ignore[reportMissingImports]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    requests, prompt, answer = (int(word) for word in sys.argv[1:4])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        llm = vllm.LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=8192)
    params = vllm.SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
    print(json.dumps({"version": vllm.__version__}), flush=True)
    draws = random.Random(3)
    for _ in range(2):
        ids = [draws.choices(range(3, CONFIG["vocab_size"]), k=prompt) for _ in range(requests)]
        began = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
        seconds = time.perf_counter() - began
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds_taken": seconds, "tokens_per_s": made / seconds}), flush=True)


if __name__ == "__main__":
    main()
