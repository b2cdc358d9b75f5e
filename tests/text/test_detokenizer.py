# SPDX-License-Identifier: Apache-2.0
"""Incremental detokenizing against decoding all tokens and searching the whole text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxserve.text import token_bytes
from jaxserve.text import tokenizer as tokenizers
from jaxserve.text.detokenizer import MOST_WAITING, IncrementalDetokenizer
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.sampling_params import SamplingParams
from tests.golden.load import TOKENIZERS

BYTE_LEVEL = tokenizers.load(TOKENIZERS / "byte-level")
BYTE_FALLBACK = tokenizers.load(TOKENIZERS / "byte-fallback")
THEIRS: dict[str, Any] = {
    kind: AutoTokenizer.from_pretrained(TOKENIZERS / kind) for kind in ("byte-level", "byte-fallback")
}


def wrapped(names: Sequence[str], decoder: Any) -> Tokenizer:
    backend = Backend(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=names[0]))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))


def streamed(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int], **options: Any) -> list[str]:
    """The text parts when the tokens arrive in chunks of these sizes, then one by one."""
    prompt = options.pop("prompt", ())
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, SamplingParams(**options))
    parts: list[str] = []
    place = 0
    for size in [*cuts, *[1] * len(ids)]:
        assert detokenizer.append(ids[place : place + size]) is None
        place += size
        parts.append(detokenizer.ready(False))
        assert detokenizer.text.startswith("".join(parts))
    parts.append(detokenizer.ready(True))
    assert detokenizer.text == "".join(parts)
    assert detokenizer.token_count == len(ids)
    return parts


def sentencepiece_rule(run: bytes) -> str:
    """The text of a run of byte tokens: its characters, and a replacement character for every other byte."""
    text = ""
    while run:
        for size in (4, 3, 2, 1):
            try:
                character = run[:size].decode()
            except UnicodeDecodeError:
                continue
            if len(character) == 1:
                text, run = text + character, run[size:]
                break
        else:
            text, run = text + "\ufffd", run[1:]
    return text


def by_runs(ids: Sequence[int], skip: bool) -> str:
    """The byte-fallback tokenizer's text by the rule above, from its names."""
    backend = THEIRS["byte-fallback"].backend_tokenizer
    text, run = "", b""
    for token in ids:
        if skip and token in (0, 1, 2):
            continue
        name = backend.id_to_token(token)
        if len(name) == 6 and name.startswith("<0x"):
            run += bytes.fromhex(name[3:5])
        else:
            text, run = text + sentencepiece_rule(run) + name.replace("▁", " "), b""
    return (text + sentencepiece_rule(run)).removeprefix(" ")


IDS = st.lists(st.integers(0, 425), max_size=40)
TEXTS = st.text("aé€🙂\u0301 \n<▁\ufffd" + "the reads", max_size=30)
PIECES = st.tuples(st.sampled_from("é€🙂\u0301\ufffd"), st.integers(0, 3), st.integers(1, 4))


def broken(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Incomplete, broken and complete characters among all sorts of tokens."""
    piece = PIECES.map(lambda it: tokenizer.encode(it[0], add_special_tokens=False)[-4:][it[1] : it[2]])
    token = st.integers(0, tokenizer.vocab_size - 1).map(lambda token: [token])
    return st.lists(piece | token, max_size=20).map(lambda parts: [token for part in parts for token in part])


CUTS = st.lists(st.integers(0, 5), max_size=8)


@given(ids=IDS | broken(BYTE_LEVEL) | TEXTS.map(BYTE_LEVEL.encode), cuts=CUTS, skip=st.booleans())
def test_byte_level_parts_are_the_whole_decode(ids: list[int], cuts: list[int], skip: bool) -> None:
    whole = THEIRS["byte-level"].decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(BYTE_LEVEL, ids, cuts, skip_special_tokens=skip)) == whole
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=skip) == whole


@given(ids=IDS | broken(BYTE_FALLBACK), cuts=CUTS, skip=st.booleans())
def test_byte_fallback_parts_are_the_whole_text(ids: list[int], cuts: list[int], skip: bool) -> None:
    whole = by_runs(ids, skip)
    assert "".join(streamed(BYTE_FALLBACK, ids, cuts, skip_special_tokens=skip)) == whole
    assert BYTE_FALLBACK.decode(ids, skip_special_tokens=skip) == whole


@given(text=TEXTS, cuts=CUTS, skip=st.booleans())
def test_byte_fallback_parts_are_the_whole_decode_where_no_byte_is_broken(
    text: str, cuts: list[int], skip: bool
) -> None:
    ids = BYTE_FALLBACK.encode(text)
    whole = THEIRS["byte-fallback"].decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(BYTE_FALLBACK, ids, cuts, skip_special_tokens=skip)) == whole


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@given(before=TEXTS, after=st.lists(st.integers(0, 425), max_size=10) | TEXTS, skip=st.booleans())
def test_text_continues_the_prompt(kind: str, before: str, after: list[int] | str, skip: bool) -> None:
    tokenizer = BYTE_LEVEL if kind == "byte-level" else BYTE_FALLBACK
    prompt = tokenizer.encode(before)
    ids = tokenizer.encode(after) if isinstance(after, str) else after
    parts = streamed(tokenizer, ids, [], skip_special_tokens=skip, prompt=prompt)
    both = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    assert tokenizer.decode(prompt, skip_special_tokens=skip) + "".join(parts) == both


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
def test_a_character_that_the_prompt_began_is_completed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂", add_special_tokens=False)
    for cut in range(1, len(ids)):
        parts = streamed(tokenizer, ids[cut:], [], prompt=ids[:cut])
        assert "".join(parts) == "🙂"


def test_parts_of_a_character_wait_for_the_rest_of_it() -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        first, *rest = tokenizer.encode("€", add_special_tokens=False)[-3:]
        [special] = tokenizer.eos_token_ids
        assert streamed(tokenizer, [first, special, *rest], []) == ["", "", "", "€", ""]
        assert streamed(tokenizer, [first], [])[-1] == "\ufffd"
        assert streamed(tokenizer, [first, special], [], skip_special_tokens=False)[1].startswith("\ufffd<")


def test_added_tokens_are_spelled_as_they_are() -> None:
    names = ["a b", "é", "Ã", "Ã\n", "▁", "©", "Ġ"]
    tokenizer = wrapped(names, decoders.ByteLevel())
    backend: Any = tokenizer._backend
    for ids in ([0, 1, 2, 3, 4, 5, 6], [2, 5], [2, 0, 5], [1, 5]):
        assert tokenizer.decode(ids) == backend.decode(ids) == "".join(streamed(tokenizer, ids, []))


OTHERS: dict[str, Tokenizer] = {
    "none": wrapped(["?", "a", "bc"], None),
    "wordpiece": wrapped(["?", "a", "##b", ".", "##c"], decoders.WordPiece()),
    "metaspace": wrapped(["?", "▁a", "b", "▁"], decoders.Metaspace()),
    "bytes": wrapped(["a", "Ġb", "â", "Ĥ", "¬", "Ã", "©"], decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])),
}


@pytest.mark.parametrize("kind", OTHERS)
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
@settings(max_examples=50)
def test_other_decoders_parts_are_the_whole_decode(kind: str, data: st.DataObject, cuts: list[int], skip: bool) -> None:
    tokenizer = OTHERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    if kind == "bytes":  # whole characters: of broken ones, another number of marks may come
        ids = [
            part for token in ids for part in ([2, 3, 4] if token in (2, 3, 4) else [5, 6] if token > 4 else [token])
        ]
    backend: Any = tokenizer._backend
    assert "".join(streamed(tokenizer, ids, cuts, skip_special_tokens=skip)) == backend.decode(
        ids, skip_special_tokens=skip
    )


def test_a_broken_character_does_not_hold_back_text_for_ever() -> None:
    parts = streamed(OTHERS["bytes"], [2] * 100 + [0] * 100, [])
    assert max(map(len, parts)) < 20
    assert "".join(parts).endswith("a" * 100)


# --- stop strings ---------------------------------------------------------------------------------------------------

LETTERS = ["a", "b", "ab", "ba", "aab", "bÃ", "©", "Ã©a", "abcabc", "c", ""]
WORDS = wrapped(LETTERS, decoders.ByteLevel())
END = len(LETTERS)  # the special token
TOKEN_BYTES = [
    *(b"a", b"b", b"ab", b"ba", b"aab", b"b\xc3", b"\xa9", b"\xc3\xa9a", b"abcabc", b"c", b"", b"<end>")  # by hand
]


@dataclass
class Stopped:
    stop: str | None
    tokens: int
    text: str


def searched(ids: Sequence[int], params: SamplingParams) -> Stopped:
    """Search the whole text for all stop strings after each token."""
    data = b""
    before = ""
    for count, token in enumerate(ids, start=1):
        data += b"" if token == END and params.skip_special_tokens else TOKEN_BYTES[token]
        text = whole_characters(data)
        found = [
            (begin + len(stop), begin, stop)
            for stop in params.stops
            for begin in range(len(text))
            if text.startswith(stop, begin) and begin + len(stop) > len(before)
        ]
        if found and count > params.min_tokens:
            end, begin, stop = min(found)
            return Stopped(stop, count, text[: end if params.include_stop_str_in_output else begin])
        before = text
    return Stopped(None, len(ids), data.decode(errors="replace"))


def whole_characters(data: bytes) -> str:
    for cut in range(len(data), max(len(data) - 4, -1), -1):
        try:
            data[cut:].decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and error.start == 0:
                return data[:cut].decode(errors="replace")
    return data.decode(errors="replace")


STOPS = st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=4)


@given(
    ids=st.lists(st.integers(0, END), max_size=25),
    stops=STOPS,
    cuts=CUTS,
    include=st.booleans(),
    skip=st.booleans(),
    min_tokens=st.integers(0, 8),
    streaming=st.booleans(),
)
@settings(max_examples=400)
def test_stop_strings_end_the_text_where_a_search_of_the_whole_finds_them(
    ids: list[int], stops: list[str], cuts: list[int], include: bool, skip: bool, min_tokens: int, streaming: bool
) -> None:
    params = SamplingParams(
        stop=stops,
        include_stop_str_in_output=include,
        skip_special_tokens=skip,
        min_tokens=min_tokens,
        max_tokens=100,
    )
    expected = searched(ids, params)
    detokenizer = IncrementalDetokenizer(WORDS, [0], params)
    hold = 0 if include else max(map(len, stops)) - 1
    parts: list[str] = []
    place, found = 0, None
    for size in [*cuts, *[1] * len(ids)]:
        if found is None:
            found = detokenizer.append(ids[place : place + size])
        place += size
        if streaming and found is None:
            parts.append(detokenizer.ready(False))
            assert "".join(parts) == detokenizer.text[: max(len(detokenizer.text) - hold, 0)]
    parts.append(detokenizer.ready(True))
    assert Stopped(found, detokenizer.token_count, "".join(parts)) == expected
    assert detokenizer.text == expected.text
    assert detokenizer.append([0]) is None
    assert detokenizer.text == expected.text
    assert detokenizer.token_count == expected.tokens


def appended(ids: list[int], *, stopped: bool = False, **options: Any) -> Stopped:
    detokenizer = IncrementalDetokenizer(WORDS, [], SamplingParams(**options))
    stop = detokenizer.append(ids, stopped=stopped)
    detokenizer.ready(True)
    return Stopped(stop, detokenizer.token_count, detokenizer.text)


def test_of_several_stop_strings_the_first_to_end_counts() -> None:
    assert appended([8], stop=["bcabc", "ca", "abca"]) == Stopped("abca", 1, "")
    assert appended([8, 1], stop=["cab", "abcab"]) == Stopped("abcab", 1, "")
    assert appended([8, 1], stop="c", include_stop_str_in_output=True) == Stopped("c", 1, "abc")
    assert appended([0, 9, 9, 1], stop="c") == Stopped("c", 2, "a")


def test_stop_strings_count_after_min_tokens() -> None:
    assert appended([9, 0, 9, 1], stop="c", min_tokens=1) == Stopped("c", 3, "ca")
    assert appended([0, 1, 9], stop="abc", min_tokens=2) == Stopped("abc", 3, "")
    assert appended([0, 1, 9], stop="abc", min_tokens=3) == Stopped(None, 3, "abc")


@pytest.mark.parametrize("stop", [None, "zzz"])
def test_a_stop_token_has_no_text_unless_requested(stop: str | None) -> None:
    assert appended([0, 9], stopped=True, stop=stop) == Stopped(None, 2, "a")
    assert appended([0, 9], stopped=True, stop=stop, include_stop_str_in_output=True) == Stopped(None, 2, "ac")
    assert appended([0, END], stopped=True, stop=stop, include_stop_str_in_output=True) == Stopped(None, 2, "a")
    shown = appended([0, END], stopped=True, stop=stop, include_stop_str_in_output=True, skip_special_tokens=False)
    assert shown == Stopped(None, 2, "a<end>")
    assert appended([0, 9], stopped=True, stop="c") == Stopped(None, 2, "a")
    assert appended([9, 9], stopped=True, stop="c") == Stopped("c", 1, "")


# --- cost -----------------------------------------------------------------------------------------------------------


def test_nothing_is_decoded_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    detokenizer = IncrementalDetokenizer(WORDS, [], SamplingParams())
    source: Any = detokenizer._source
    feed: Callable[[Sequence[int]], str] = source.feed
    monkeypatch.setattr(source, "feed", lambda ids: (fed.append(len(ids)), feed(ids))[1])
    for _ in range(100):
        detokenizer.append([0, 1])
    assert fed == []
    assert detokenizer.ready(True) == "ab" * 100
    assert fed == [200]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, OTHERS["none"], OTHERS["bytes"]])
@pytest.mark.parametrize("token", [1, 2, "special"])
def test_a_token_costs_the_same_however_many_came_before(tokenizer: Tokenizer, token: int | str) -> None:
    if token == "special":
        [token] = tokenizer.eos_token_ids
    assert isinstance(token, int)

    def seconds(count: int, **options: Any) -> float:
        detokenizer = IncrementalDetokenizer(tokenizer, [], SamplingParams(**options))
        begin = time.process_time()
        for _ in range(count):
            detokenizer.append([token])
            detokenizer.ready(False)
        detokenizer.ready(True)
        return time.process_time() - begin

    for options in ({}, {"stop": ["never to be seen"]}):
        few = min(seconds(500, **options) for _ in range(3))
        assert seconds(8000, **options) < 64 * max(few, 2e-4)  # 16 times as many; 256 times if it were quadratic


@pytest.mark.parametrize("kind", THEIRS)
def test_long_answers_are_decoded_in_pieces(kind: str) -> None:
    """The text is the same, and characters at the borders of pieces are not broken."""
    tokenizer = {"byte-level": BYTE_LEVEL, "byte-fallback": BYTE_FALLBACK}[kind]
    ids = tokenizer.encode("é你🦊 and so on, " * 1500, add_special_tokens=False)
    assert len(ids) > 2 * token_bytes.PIECE
    text = THEIRS[kind].decode(ids)
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids, [len(ids)])) == text


def test_tokens_do_not_pile_up_until_the_end() -> None:
    """An answer that is not streamed is decoded as it grows, not all at once in the thread that serves all streams."""
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, (), SamplingParams())
    for _ in range(5000):
        detokenizer.append([70])
        assert len(detokenizer._waiting) <= MOST_WAITING
    assert detokenizer.ready(True) == BYTE_LEVEL.decode([70] * 5000)
