# SPDX-License-Identifier: Apache-2.0
"""Packs documents into batches of one shape, with a loss weight for every token."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from benchmarks.demo.corpus import Messages, documents
from benchmarks.demo.vocabulary import BEGIN, END, PAD

Batch = tuple[np.ndarray, np.ndarray]  # tokens int32 [rows, length], weights float32 [rows, length]


class BatchShape(NamedTuple):
    rows: int
    length: int
    topics: int  # the most topics of a conversation


def batches(tokenizer: Tokenizer, shape: BatchShape, *, seed: int) -> Iterator[Batch]:
    """Endless batches. Every row starts with the start of a document; its last document is truncated."""
    rows, length, most = shape
    source = encoded(tokenizer, documents(seed, most))
    pad = tokenizer.token_to_id(PAD)
    while True:
        tokens = np.full((rows, length), pad, np.int32)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            filled = 0
            while filled < length:
                ids, losses = next(source)
                count = min(len(ids), length - filled)
                tokens[row, filled : filled + count] = ids[:count]
                weights[row, filled : filled + count] = losses[:count]
                filled += count
        yield tokens, weights


def encoded(tokenizer: Tokenizer, source: Iterable[Messages | str]) -> Iterator[tuple[list[int], list[float]]]:
    """Ids and loss weights of each document: 1 for the answers in a conversation and for all plain text, else 0."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    number = {text: int(token) for text, token in tokenizer.get_vocab().items()}
    begin, end = number[BEGIN], number[END]
    for document in source:
        if isinstance(document, str):
            ids = [begin, *encode(document), end]
            yield ids, [0.0, *[1.0] * (len(ids) - 1)]
            continue
        ids, losses = [begin], [0.0]
        for message in document:
            content = [*encode(message["content"]), end]
            ids += [number[f"<|{message['role']}|>"], *content]
            losses += [0.0, *[float(message["role"] == "assistant")] * len(content)]
        yield ids, losses
