# SPDX-License-Identifier: Apache-2.0
"""transformers' `generate`, timed; run by a Python that has torch and transformers, and nothing of ours.

    python transformers_generate.py FOLDER

First line out: versions. Then for each line in, {"prompts": [[ids]], "max_tokens": n}, one line out,
{"seconds": s, "tokens": [[ids]]}. Greedy, float32, and never ended by a token; threads as torch has them by default.
"""

import json
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import transformers


def main() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    told = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = torch.tensor(asked["prompts"])
        new = asked["max_tokens"]
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
            )
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": out[:, ids.shape[1] :].tolist()}), flush=True)


if __name__ == "__main__":
    main()
