# SPDX-License-Identifier: Apache-2.0
"""A tiny model on disk, and engine processes that serve it."""

import shutil
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.frontend.client import EngineClient, connect
from jaxserve.frontend.process import EngineProcess
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.sampling_params import SamplingParams
from tests.fast import programs
from tests.golden import load
from tests.golden.load import TOKENIZERS

VOCABULARY = 426
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "max_logprobs": 8,
    "num_blocks": 65,
    "warmup": False,
    "compilation_cache_dir": programs(),
}
PATIENCE = 60  # seconds, for what takes one or two


def write_model(folder: Path) -> Path:
    """Write a llama of one layer, with the byte-level tokenizer and its vocabulary."""
    golden = load.read("llama-gqa-tied")
    config = {**golden.config, "vocab_size": VOCABULARY, "num_hidden_layers": 1}
    shapes = golden.tensors | {"model.embed_tokens.weight": (VOCABULARY, config["hidden_size"])}
    tensors = {
        name: load.weights.tensor(golden.seed, name, shape, golden.rules)
        for name, shape in shapes.items()
        if ".layers.1." not in name
    }
    load.write_folder(folder, config, tensors, "float32", 1)
    for file in (TOKENIZERS / "byte-level").iterdir():
        shutil.copy(file, folder)
    return folder


def faulty(fault: str) -> list[str]:
    """The command of a child with this fault."""
    return [sys.executable, "-m", "tests.host.faulty", fault]


@contextmanager
def process(config: EngineConfig, **options: Any) -> Generator[EngineProcess]:
    engine = EngineProcess(config, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(grace=2)


def wait(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def front(engine: EngineProcess, config: EngineConfig) -> EngineClient:
    wait(lambda: engine.state.phase != "starting")
    assert engine.state.phase == "ready", engine.state
    return connect(engine, config)


async def outputs(front: EngineClient, prompt: Any, params: SamplingParams, **more: Any) -> list[RequestOutput]:
    job = front.preparer.prepare(prompt, params, **more)
    return [output async for output in front.outputs(job)]
