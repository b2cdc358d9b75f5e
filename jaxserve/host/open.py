# SPDX-License-Identifier: Apache-2.0
"""Opens an engine in this process with its tokenizer: how LLM and AsyncLLM begin."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.frontend.prepare import Preparer, preparer_for, tokenizer_of


def open_engine(model: str, settings: Mapping[str, Any], **given: Any) -> tuple[Engine, Preparer]:
    """`given`: params, spec and mesh, of a program that has them."""
    config = EngineConfig(model=model, **settings)
    # Before the engine, which may download and compile for long.
    tokenizer = tokenizer_of(config, loads_model=given.get("params") is None)
    with jax.set_mesh(None):  # a mesh in the caller's context is not meant for the engine
        engine = Engine(config, **given)
    defaults = engine.model.sampling_defaults
    return engine, preparer_for(engine.limits, tokenizer, defaults=defaults, also_ends=engine.also_ends)
