# SPDX-License-Identifier: Apache-2.0
"""Times transformers' `generate`; runs in a Python that has torch and transformers, and imports nothing of jaxserve.

    python transformers_generate.py FOLDER

The first line of output holds the versions. Then each line of input, {"prompts": [[ids]], "max_tokens": n}, gets one
line of output, {"seconds": s, "tokens": [[ids]]}. The prompts are one batch; uneven ones are padded on the left.
`max_tokens` may be a list with a number per prompt: the batch then runs until the longest answer is done, and each
answer is cut to its own length. Greedy, float32, ignoring end tokens, with torch's default number of threads.
"""

import json
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import transformers

PAD = 0


def main() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts, new = asked["prompts"], asked["max_tokens"]
        wanted = new if isinstance(new, list) else [new] * len(prompts)
        width, steps = max(map(len, prompts)), max(wanted)
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=steps, min_new_tokens=steps)
        seconds = time.perf_counter() - start
        answers = out[:, width:].tolist()
        tokens = [answer[:count] for answer, count in zip(answers, wanted, strict=True)]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
