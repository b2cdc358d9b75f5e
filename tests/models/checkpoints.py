# SPDX-License-Identifier: Apache-2.0
"""Golden checkpoints, loaded."""

import tempfile
from pathlib import Path

import jax.numpy as jnp

from convert import load
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from tests.golden import load as golden


def load_case(case: str) -> tuple[ModelSpec, Params]:
    """On the mesh in context, in float32."""
    with tempfile.TemporaryDirectory() as name:
        folder = golden.write_checkpoint(case, Path(name))
        return load.load_model(folder, dtype=jnp.float32)
