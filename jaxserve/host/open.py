# SPDX-License-Identifier: Apache-2.0
"""Opens an engine and its tokenizer in this process, for LLM and AsyncLLM."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.frontend.pooling import Pooling
from jaxserve.frontend.pooling_files import pooling_of
from jaxserve.frontend.prepare import Preparer, preparer_for, tokenizer_of


def open_engine(model: str, settings: Mapping[str, Any], **given: Any) -> tuple[Engine, Preparer]:
    """`given`: params, spec and mesh, if the program already has them."""
    config = EngineConfig(model=model, **settings)
    # Load it before the engine, which may take long to download and compile: its errors then appear early.
    tokenizer = tokenizer_of(config, loads_model=given.get("params") is None)
    with jax.set_mesh(None):  # the engine must not use a mesh from the caller's context
        engine = Engine(config, **given)
    defaults = engine.model.sampling_defaults
    return engine, preparer_for(engine.limits, tokenizer, defaults=defaults, also_ends=engine.also_ends)


def pooling_for(engine: Engine, preparer: Preparer, words: Sequence[str]) -> Pooling:
    """What becomes of hidden states. Reads the small weights that this needs from the model's folder."""
    folder = engine.model.folder
    return pooling_of(None if folder is None else str(folder), preparer.tokenizer, words)
