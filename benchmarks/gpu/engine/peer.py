# SPDX-License-Identifier: Apache-2.0
"""Times another engine offline: a Llama of the same shape with random weights, and the same lengths.

    python peer.py transformers|vllm REQUESTS PROMPT ANSWER [tiny]

Needs a Python with that engine, and nothing of jaxserve. Greedy, ignoring end tokens. The first run is a warmup; the
second one counts.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class OtherEngine(NamedTuple):
    version: str
    generate: Callable[[list[list[int]]], list[Any]]  # the generated ids of each prompt


def open_transformers(shape: dict[str, Any], answer: int) -> OtherEngine:
    """Its continuous batching."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers
    from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

    cuda = torch.cuda.is_available()
    config = LlamaConfig(**shape, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if cuda else "cpu"):
        llama: Any = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    wanted = GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # On a GPU it chooses the sizes; on a CPU it would take all of the memory.
    sizes: dict[str, Any] = {} if cuda else {"num_blocks": 8, "max_batch_tokens": 64}
    settings = ContinuousBatchingConfig(**sizes)

    def generate(prompts: list[list[int]]) -> list[Any]:
        out = llama.generate_batch(
            inputs=prompts,
            generation_config=wanted,
            continuous_batching_config=settings,
            progress_bar=False,
            persistent_manager=True,  # a new manager for each run would take the memory twice
        )
        return [one.generated_tokens for one in out.values()]

    return OtherEngine(f"{transformers.__version__}, torch {torch.__version__}", generate)


def open_vllm(shape: dict[str, Any], answer: int) -> OtherEngine:
    import vllm  # pyright: ignore[reportMissingImports]

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        llm = vllm.LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=8192)
    params = vllm.SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)

    def generate(prompts: list[list[int]]) -> list[Any]:
        outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    return OtherEngine(vllm.__version__, generate)


def main() -> None:
    name = sys.argv[1]
    requests, prompt, answer = (int(word) for word in sys.argv[2:5])
    # The toy is for CPUs, on which only transformers runs here.
    shape: dict[str, Any] = TINY if sys.argv[-1] == "tiny" and name == "transformers" else LLAMA_8B
    peer = {"transformers": open_transformers, "vllm": open_vllm}[name](shape, answer)
    print(json.dumps({"version": peer.version}), flush=True)
    draws = random.Random(3)
    for _ in range(2):
        ids = [draws.choices(range(3, shape["vocab_size"]), k=prompt) for _ in range(requests)]
        began = time.perf_counter()
        outputs = peer.generate(ids)
        seconds = time.perf_counter() - began
        made = sum(map(len, outputs))
        if made != requests * answer:
            raise SystemExit(f"error: {made} tokens, expected {requests * answer}")
        print(json.dumps({"seconds_taken": seconds, "tokens_per_s": made / seconds}), flush=True)


if __name__ == "__main__":
    main()
