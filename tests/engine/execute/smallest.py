# SPDX-License-Identifier: Apache-2.0
"""The smallest engine that the tests of runners and stored programs share: one row, four blocks, latent attention."""

from jaxserve.config import EngineConfig
from jaxserve.engine.capacity import Memory, resolve
from tests.models import tiny

SPEC = tiny.SPECS["mla"]
CONFIG = EngineConfig(
    model="tiny",
    max_num_seqs=1,
    max_num_batched_tokens=8,
    max_model_len=16,
    block_size=8,
    num_blocks=5,
    max_logprobs=3,
)
CAPACITY = resolve(CONFIG, SPEC, Memory(on_cpu=True, dtype="float32"))
