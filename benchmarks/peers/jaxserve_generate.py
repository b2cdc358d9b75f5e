# SPDX-License-Identifier: Apache-2.0
"""jaxserve's `LLM.generate`, timed in its own process, for benchmarks.offline.

    python -m benchmarks.peers.jaxserve_generate FOLDER PROMPTS LENGTH

At most PROMPTS prompts at once, each of at most LENGTH tokens including the new ones. Same input and output as
transformers_generate.py.
"""

import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from jaxserve import LLM, SamplingParams  # pyright: ignore


def main() -> None:
    folder, rows, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llm = LLM(
        model=folder,
        dtype="float32",
        max_model_len=length,
        max_num_seqs=rows,
        max_num_batched_tokens=max(512, rows),
        block_size=16,
        skip_tokenizer_init=True,
        warmup="all",
    )
    print(json.dumps({"jax": jax.__version__, "cores": os.cpu_count()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling_params=params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
