# SPDX-License-Identifier: Apache-2.0
"""An engine in this process, and the way into it: what LLM and AsyncLLM begin with."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.frontend.prepare import Intake, tokenizer_of


def opened(model: str, settings: Mapping[str, Any], **given: Any) -> tuple[Engine, Intake]:
    """An engine and its intake. `given` are params, spec and mesh of a program that has them."""
    config = EngineConfig(model=model, **settings)
    # Before the engine, which may download and compile for long.
    tokenizer = tokenizer_of(config, loads_model=given.get("params") is None)
    with jax.set_mesh(None):  # a mesh in the caller's context is not meant
        engine = Engine(config, **given)
    if tokenizer is not None:
        engine.also_ends(tokenizer.eos_token_ids)
    return engine, Intake(tokenizer, engine.limits, defaults=engine.model.sampling_defaults)
