# SPDX-License-Identifier: Apache-2.0
"""The token ids of a conversation, as the server computes them."""

from typing import Any

from jaxserve.text.tokenizer import Tokenizer


def chat_ids(tokenizer: Tokenizer, messages: Any, **options: Any) -> list[int]:
    """`options` are those of `Tokenizer.chat_text`. Templates write special tokens themselves."""
    return tokenizer.encode(tokenizer.chat_text(messages, **options), add_special_tokens=False)
