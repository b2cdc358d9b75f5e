# SPDX-License-Identifier: Apache-2.0
"""Measures in a separate process for a section and prints the results as lines of JSON.

    python -m benchmarks.gpu.engine.child start CACHE SINCE [tiny]     an engine's start, to the first token
    python -m benchmarks.gpu.engine.child steps LAYERS [tiny]          steps of a shallow model, to compare XLA flags

SINCE is the time at which the process was started, in seconds since the epoch.
"""

import json
import os
import sys
import time
from typing import Any

_BEGAN = time.time()


def say(**values: Any) -> None:
    """In one write, because several threads report compiled programs."""
    os.write(1, f"{json.dumps(values)}\n".encode())


def start(cache: str, since: float, tiny: bool) -> None:
    """Starts an engine with all programs that the product compiles before it is ready."""
    from jaxserve.config import EngineConfig
    from jaxserve.engine.engine import Engine
    from jaxserve.engine.execute import jax_start
    from jaxserve.types.request import Request
    from jaxserve.types.sampling_params import SamplingParams

    small: dict[str, Any] = {
        "max_num_seqs": 1,
        "max_num_batched_tokens": 8,
        "num_blocks": 8,
        "max_model_len": 32,
        "block_size": 8,
    }
    small["warmup"] = False
    config = EngineConfig(model="random", compilation_cache_dir=cache, **(small if tiny else {}))
    jax_start.start(config)  # before the device is used
    from benchmarks.gpu.engine import rig

    say(import_s=time.time() - since, python_s=_BEGAN - since)
    began = time.time()
    spec = rig.model(tiny)
    params = rig.random_params(spec)
    say(weights_s=time.time() - began)
    began = time.time()

    def on_progress(what: str, done: int, count: int) -> None:
        say(**{what: done, "programs": count})

    engine = Engine(config, params=params, spec=spec, report=lambda line: None, on_progress=on_progress)
    say(engine_s=time.time() - began)
    began = time.time()
    greedy = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.add(Request(id="first", prompt_token_ids=[5, 6, 7], params=greedy))
    while engine.unfinished:
        engine.step()
    say(first_token_s=time.time() - began, whole_s=time.time() - since, late=engine.runner.compiled_late)


def steps(layers: int, tiny: bool) -> None:
    from benchmarks.gpu.engine.rig import Rig

    # Only the sizes that are timed: compilation is most of a child's time.
    sizes = (1, 32) if tiny else (1, 64, 2048)
    rig = Rig(tiny=tiny, layers=layers, only=sizes)
    say(**{f"{name}_s": value for name, value in rig.seconds.items()})
    for rows in sizes[:-1]:
        row = rig.decode(rows, 16 if tiny else 1024, seconds=1.0)
        say(**{f"decode_{rows}_ms": row["ms"], f"decode_{rows}_device_ms": row["device_ms"]})
    say(prefill_ms=rig.prefill(sizes[-1], repeats=5)["ms"])


def main(arguments: list[str]) -> None:
    tiny = arguments[-1] == "tiny"
    match arguments[0]:
        case "start":
            start(arguments[1], float(arguments[2]), tiny)
        case "steps":
            steps(int(arguments[1]), tiny)
        case other:
            raise SystemExit(f"error: unknown measurement {other!r}; use start or steps")


if __name__ == "__main__":
    main(sys.argv[1:])
