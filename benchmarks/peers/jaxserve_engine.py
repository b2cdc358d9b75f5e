# SPDX-License-Identifier: Apache-2.0
"""The bare engine, timed step by step in its own process, for benchmarks.server to compare the server with.

    python -m benchmarks.peers.jaxserve_engine SETTINGS

SETTINGS are the fields of EngineConfig as JSON. All requests arrive at once; an answer says when each sequence's tokens
were read. No text is produced.
"""

import json
import sys
import time

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams


def run(engine: Engine, prompts: list[list[int]], max_tokens: int) -> dict[str, object]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    began = time.perf_counter()
    for place, ids in enumerate(prompts):
        engine.add(Request(id=str(place), prompt_token_ids=ids, params=params))
    times: dict[str, list[float]] = {str(place): [] for place in range(len(prompts))}
    tokens = 0
    while engine.unfinished:
        updates = engine.step()
        now = time.perf_counter() - began
        for update in updates:
            tokens += len(update.token_ids)
            times[update.request_id].append(now)
    return {"seconds": time.perf_counter() - began, "tokens": tokens, "times": list(times.values())}


def main() -> None:
    engine = Engine(EngineConfig(**json.loads(sys.argv[1])))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(engine, asked["prompts"], asked["max_tokens"])), flush=True)


if __name__ == "__main__":
    main()
