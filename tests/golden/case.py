# SPDX-License-Identifier: Apache-2.0
"""The type of a golden case, and what the files of several families share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.golden.weights import Rules


@dataclass(frozen=True)
class Case:
    name: str
    config: Mapping[str, Any]
    hub: bool = False
    prompt: int = 40
    greedy_prompt: int = 12
    # Settings that must give other logits from the same weights: proof that the case sees its switch.
    against: Sequence[Mapping[str, Any]] = ()
    rules: Rules = field(default_factory=Rules)
    # (pattern, replacement): from the names transformers saves to those of published checkpoints.
    rename: Sequence[tuple[str, str]] = ()
    # Tensors that published checkpoints have although transformers does not save them.
    extra: Mapping[str, Sequence[int]] = field(default_factory=dict)
    # And some that no model reads.
    unread: Mapping[str, Sequence[int]] = field(default_factory=dict)
    # Among equal scores the lowest index is chosen, as torch does on a GPU. On a CPU it follows no rule.
    lowest_first: bool = False
    # The continuation goes from the short regime of longrope to the long one, where Phi-3 drops its cache:
    # each token is the one that the whole text so far gives, with the frequencies of its length.
    crossing: bool = False


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# With wide embeddings a tied model would repeat its last token forever.
TIED = Rules(gains={"embed_tokens": 0.25})

# Experts 1 and 4 always have the same score: whatever the hidden state, it is exactly 0.
TIES = Rules(zeros={"gate.weight": [1, 4]})

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0],
    "original_max_position_embeddings": 48,
}

# What config.json has on the hub whatever the model.
HUB = {
    **SIZES,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
}

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}
