# SPDX-License-Identifier: Apache-2.0
"""Long texts of a body are read piece by piece, with the values and errors of a parser that reads them at once."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from jaxserve.server.answers import replies
from jaxserve.server.errors import ApiError
from jaxserve.server.protocol import long_values
from jaxserve.server.protocol.base import as_api_error, parse
from jaxserve.server.protocol.chat import ChatRequest
from jaxserve.server.protocol.completion import CompletionRequest
from jaxserve.server.protocol.tokens import TokenizeRequest

WORDS = ["a", "é", "中", "😀", "\\", '"', "\n", "\u2028", "\\u", "u0041", "\\ud83d", "/"]
TEXT = "".join(WORDS) * 20_000


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=60), st.booleans(), st.integers(1, 40))
def test_pieces_are_whole_characters(words: list[str], ascii_only: bool, piece: int) -> None:
    text = "".join(words).encode("utf-8", "ignore").decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_values, "TEXT_PIECE", piece)
        assert long_values.text(json.dumps(text, ensure_ascii=ascii_only).encode()) == text


def test_no_piece_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a piece is decoded, no other thread runs."""
    decoder, sizes = long_values._text, list[int]()  # pyright: ignore[reportPrivateUsage]

    class Noted:
        def decode(self, raw: bytes) -> str:
            sizes.append(len(raw))
            return decoder.decode(raw)

    monkeypatch.setattr(long_values, "_text", Noted())
    for ascii_only in (False, True):
        for text in (TEXT, "x" * 2_000_000, "\\" * 1_000_000):
            raw = json.dumps({"prompt": text}, ensure_ascii=ascii_only).encode()
            assert parse(CompletionRequest, raw).prompt == text
    assert max(sizes) < long_values.TEXT_PIECE + 100 and len(sizes) > 30


BODIES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": TEXT, "max_tokens": 3}),
    (CompletionRequest, {"prompt": [TEXT, "", "b"]}),
    (CompletionRequest, {"prompt": [TEXT, 5]}),
    (CompletionRequest, {"prompt": [[5], TEXT]}),
    (CompletionRequest, {"prompt": {"a": TEXT}}),
    (CompletionRequest, {"prompt": "a", "user": TEXT}),
    (CompletionRequest, {"prompt": "a", "suffix": TEXT}),
    (TokenizeRequest, {"prompt": TEXT}),
    (TokenizeRequest, {"prompt": TEXT, "messages": [{"role": "user", "content": TEXT}]}),
    (ChatRequest, {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": TEXT, "name": "b"}]}),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}, {"type": "text"}]}]}),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": [TEXT]}]}]}),
    (ChatRequest, {"messages": [{"role": "user", "content": [TEXT]}]}),
    (ChatRequest, {"messages": [{"role": 5, "content": TEXT}]}),
    (ChatRequest, {"messages": [TEXT]}),
    (ChatRequest, {"messages": TEXT}),
]


@pytest.mark.parametrize("place", range(len(BODIES)))
@pytest.mark.parametrize("ascii_only", [False, True])
def test_bodies_are_the_same_as_from_pydantic(place: int, ascii_only: bool) -> None:
    kind, body = BODIES[place]
    raw = json.dumps(body, ensure_ascii=ascii_only).encode()
    try:
        expected = kind.model_validate_json(raw)
    except ValidationError as error:
        with pytest.raises(ApiError) as caught:
            parse(kind, raw)
        fault = as_api_error(error, kind)
        assert (caught.value.message, caught.value.param) == (fault.message, fault.param)
    else:
        found = parse(kind, raw)
        assert found == expected and found.model_fields_set == expected.model_fields_set


@pytest.mark.parametrize("wrong", [b"\\ud83d", b"\\udc00", b"\xff", b"\\x", b"\n", b"\\u12", b"\xed\xa0\x80"])
def test_what_is_no_json_text(wrong: bytes) -> None:
    raw = b'{"prompt": "' + b"x" * 300_000 + wrong + b"x" * 300_000 + b'"}'
    with pytest.raises(ApiError, match="not valid JSON"):
        parse(CompletionRequest, raw)


def test_long_values_of_unknown_fields_are_only_names() -> None:
    raw = json.dumps({"prompt": "a", "other": TEXT, "small": 1}).encode()
    assert parse(CompletionRequest, raw, unknown="warn").model_extra == {"other": 0, "small": 1}


# --- answers --------------------------------------------------------------------------------------------------------

LEAF = st.none() | st.integers(-(2**31), 2**31) | st.text(max_size=3)
VALUES = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES, st.integers(1, 3))
def test_answers_are_encoded_the_same_in_parts(value: Any, many: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replies, "MANY", many)
        assert replies.encode_long(value) == replies.encode(value)


def test_no_part_of_an_answer_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = [{f" token{rank}": -0.123456789 * rank for rank in range(20)} for _ in range(3000)]
    choice = {"index": 0, "logprobs": {"tokens": ["a"] * 3000, "top_logprobs": [None, *positions]}}
    value, sizes, encode = {"choices": [choice] * 5}, list[int](), replies.encode

    def noted(value: Any) -> bytes:
        sizes.append(len(made := encode(value)))
        return made

    monkeypatch.setattr(replies, "encode", noted)
    assert replies.encode_long(value) == encode(value)
    assert sum(sizes) > 5_000_000 and max(sizes) < 50_000
