# SPDX-License-Identifier: Apache-2.0
"""Model folders from the golden cases, unchanged or with one change; bitwise comparison of parameters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert import load
from jaxserve.errors import CheckpointError
from jaxserve.models import param_layout
from jaxserve.models.decoder import Params
from tests.golden import load as golden

Tensors = dict[str, np.ndarray]


def tensors_of(case: str) -> Tensors:
    content = golden.read(case)
    return {name: content.tensor(name) for name in content.tensors}


def write(folder: Path, case: str, change: Callable[[Tensors], object] = lambda tensors: None, **config: Any) -> Path:
    """The case's folder with its tensors changed, and its config."""
    tensors = tensors_of(case)
    change(tensors)
    return golden.write_folder(folder, golden.read(case).config | config, tensors, "float32", 1)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, *expected: str) -> str:
    """The error of loading this folder."""
    with pytest.raises(CheckpointError) as caught:
        load.load_model(folder)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 5000
    for part in expected:
        assert part in message, message
    return message


def same(found: Params, wanted: Params) -> None:
    """Compare bits and shardings."""
    a, b = dict(param_layout.leaves(found)), dict(param_layout.leaves(wanted))
    assert a.keys() == b.keys()
    for path, value in a.items():
        name = param_layout.dotted(path)
        assert (value.shape, value.dtype) == (b[path].shape, b[path].dtype), name
        assert _bits(value) == _bits(b[path]), name
        assert value.sharding.is_equivalent_to(b[path].sharding, value.ndim), name


def _bits(array: jax.Array) -> bytes:
    return np.asarray(array).tobytes()
