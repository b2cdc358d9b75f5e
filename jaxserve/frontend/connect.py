# SPDX-License-Identifier: Apache-2.0
"""From an engine process whose model was read to a front that takes requests for it."""

from dataclasses import replace
from pathlib import Path

from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError
from jaxserve.frontend.client import Front
from jaxserve.frontend.prepare import Intake, tokenizer_of
from jaxserve.frontend.process import EngineProcess


def connect(engine: EngineProcess, config: EngineConfig) -> Front:
    """Loads the tokenizer, which takes a second or more. May be called while the engine still compiles."""
    opened = engine.opened
    if opened is None:
        raise JaxserveError("the engine has not read its model", "wait until it has")
    folder = None if opened.folder is None else Path(opened.folder)
    tokenizer = tokenizer_of(config, loads_model=True, model_folder=folder)
    limits = opened.limits
    if tokenizer is not None:
        ends = sorted(token for token in tokenizer.eos_token_ids if 0 <= token < limits.vocab_size)
        engine.call("also_ends", token_ids=ends)  # done before any request that comes after it
        limits = replace(limits, eos_token_ids=limits.eos_token_ids.union(ends))
    return Front(engine, Intake(tokenizer, limits, defaults=opened.sampling_defaults))
