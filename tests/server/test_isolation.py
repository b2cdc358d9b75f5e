# SPDX-License-Identifier: Apache-2.0
"""No request sees what another left in rows, cached prompts or blocks, and a text is the same however it is sent. Over
HTTP against the real server; the reference is the answer to the request alone, or `tokenizers`."""

import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.server.live import ENGINE, VOCABULARY, Live

ROWS = int(ENGINE["max_num_seqs"])
BLOCK = int(ENGINE["block_size"])
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PREEMPTIONS = "jaxserve:num_preemptions_total"


@pytest.fixture(autouse=True)
def rest(live: Live) -> Iterator[None]:
    """The server is at rest before and after each test."""
    live.wait_idle()
    yield
    live.wait_idle()
    assert live.get("/health").status == 200
    assert live.get("/load").json == {"server_load": 0}


def choices(live: Live, **body: Any) -> list[dict[str, Any]]:
    reply = live.post(COMPLETIONS, {"return_token_ids": True, **body})
    assert reply.status == 200, reply.body
    return sorted(reply.json["choices"], key=lambda choice: choice["index"])


# --- rows -----------------------------------------------------------------------------------------------------------

STEM = [30, 31, 32, 33, 34, 35]  # eight of them fit into one step: then all rows are taken at once
A, B, C = 64, 65, 66  # the tokens of these letters
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": 3},
    "allowed_token_ids": {"allowed_token_ids": [40, 41, 42]},
    "logit_bias": {"logit_bias": {"50": 100}},
    "penalties": {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 2},
    "bad_words": {"allowed_token_ids": [A, B, C], "bad_words": ["a", "the"]},
    "seed": {"temperature": 2, "seed": 7},
    "filters": {"temperature": 2, "seed": 8, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
    "min_tokens": {"ignore_eos": False, "min_tokens": 4, "logit_bias": {"0": 100, "1": 100, "2": 100}},
    "stop_token_ids": {"temperature": 1, "seed": 9, "stop_token_ids": list(range(0, VOCABULARY, 4))},
}
TOKENS = 8


def _fixed(name: str, prompts: list[list[int]]) -> dict[str, Any]:
    return {"prompt": prompts, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **FEATURES[name]}


def _same(got: dict[str, Any], alone: dict[str, Any]) -> bool:
    """Equal except for the index; numbers within float32 rounding in steps of other sizes."""
    names = ("text", "token_ids", "finish_reason", "stop_reason")
    if any(got[name] != alone[name] for name in names):
        return False
    if alone["logprobs"] is None:
        return got["logprobs"] is None
    one, other = (each["logprobs"] for each in (got, alone))
    return one["tokens"] == other["tokens"] and one["token_logprobs"] == pytest.approx(
        other["token_logprobs"], abs=1e-4
    )


def test_features_have_their_effect(live: Live) -> None:
    """Otherwise the tests of what they leave behind would prove nothing."""
    got = {name: choices(live, **_fixed(name, [STEM]))[0]["token_ids"] for name in FEATURES}
    assert got["plain"] == got["logprobs"]
    assert set(got["allowed_token_ids"]) <= {40, 41, 42}
    assert got["logit_bias"] == [50] * TOKENS
    for name in ("penalties", "seed", "filters", "min_tokens"):
        assert got[name] != got["plain"], name
    assert set(got["bad_words"]) <= {B, C}  # that of "a" is left out
    assert len(got["stop_token_ids"]) < TOKENS


def test_nothing_stays_in_a_row(live: Live) -> None:
    """Each feature after each other one, and after itself, in every row."""
    alone = {name: choices(live, **_fixed(name, [STEM]))[0] for name in FEATURES}
    pairs = itertools.combinations(FEATURES, 2)
    order = [name for pair in pairs for name in pair] + [name for name in FEATURES for _ in range(2)]
    for before, name in zip(["nothing", *order], order, strict=False):
        for got in choices(live, **_fixed(name, [STEM] * ROWS)):
            assert _same(got, alone[name]), f"{name} after {before} gave {got}, alone {alone[name]}"


def test_rows_beside_each_other(live: Live) -> None:
    """All features at once, over and over, more of them than rows."""
    alone = {name: choices(live, **_fixed(name, [STEM]))[0] for name in FEATURES}
    names = list(FEATURES) * 4
    random.Random(0).shuffle(names)
    with ThreadPoolExecutor(2 * ROWS) as pool:
        answers = list(pool.map(lambda name: choices(live, **_fixed(name, [STEM]))[0], names))
    for name, got in zip(names, answers, strict=True):
        assert _same(got, alone[name]), f"{name} gave {got}, alone {alone[name]}"


# --- cached prompts -------------------------------------------------------------------------------------------------


def _completion(live: Live, ids: list[int], salt: dict[str, str]) -> tuple[Any, int]:
    body = {"prompt": ids, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **salt}
    reply = live.post(COMPLETIONS, body).json
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def _streamed(live: Live, ids: list[int], salt: dict[str, str]) -> tuple[Any, int]:
    body = {"prompt": ids, "max_tokens": 4, "temperature": 1, "seed": 1, "n": 2, "stream": True, **salt}
    events = live.post(COMPLETIONS, body | {"stream_options": {"include_usage": True}}).events
    texts = ["", ""]
    for event in events[:-2]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    return texts, events[-2]["usage"]["prompt_tokens_details"]["cached_tokens"]


def _chat(live: Live, ids: list[int], salt: dict[str, str]) -> tuple[Any, int]:
    messages = [{"role": "user", "content": "".join(chr(97 + token % 26) for token in ids)}]
    reply = live.post(CHAT, {"messages": messages, "max_tokens": 4, "temperature": 0, **salt}).json
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def _embedding(live: Live, ids: list[int], salt: dict[str, str]) -> tuple[Any, int]:
    reply = live.post("/v1/embeddings", {"input": ids, **salt}).json
    vector = [round(value, 4) for value in reply["data"][0]["embedding"]]
    return vector, reply["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("ask", [_completion, _streamed, _chat, _embedding])
def test_cached_prompts_stay_within_their_salt(
    live: Live, ask: Callable[[Live, list[int], dict[str, str]], tuple[Any, int]]
) -> None:
    live.post("/reset_prefix_cache", {})  # what other tests left there begins with the same template
    rng = random.Random(ask.__name__)
    ids = [rng.randrange(20, VOCABULARY) for _ in range(8 * BLOCK)]
    salts: list[dict[str, str]] = [{}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a "}]
    first = [ask(live, ids, salt) for salt in salts]
    again = [ask(live, ids, salt) for salt in salts]
    assert [cached for _, cached in first] == [0] * len(salts)
    assert all(cached > 0 and cached % BLOCK == 0 for _, cached in again)
    assert len({cached for _, cached in again}) == 1
    for said, _ in (*first, *again):
        if ask is _embedding:
            assert said == pytest.approx(first[0][0], abs=1e-3)
        else:
            assert said == first[0][0]


def test_a_prompt_is_not_cached_by_a_part_of_a_block(live: Live) -> None:
    """What differs within a block, or before it, shares nothing from there on."""
    rng = random.Random("parts")
    ids = [rng.randrange(20, VOCABULARY) for _ in range(4 * BLOCK)]
    assert _completion(live, [*ids, 20], {})[1] == 0
    for place, cached in ((0, 0), (BLOCK, BLOCK), (3 * BLOCK - 1, 2 * BLOCK), (4 * BLOCK - 1, 3 * BLOCK)):
        other = list(ids)
        other[place] = 20 + (ids[place] - 19) % (VOCABULARY - 20)
        assert _completion(live, [*other, 20], {})[1] == cached


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))


def _byte_tokens(reference: tokenizers.Tokenizer, text: str) -> list[int]:
    """The text of the bytes alone, in the order of the ids."""
    alphabet = _alphabet()
    found = {reference.token_to_id(alphabet[byte]) for byte in text.encode()}
    return sorted(token for token in found if token is not None)


def _alphabet() -> dict[int, str]:
    """How byte-level tokenizers write bytes: those that print as they are, the others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


def _joined(live: Live, path: str, body: dict[str, Any]) -> dict[int, str]:
    reply = live.post(path, body | {"stream": True})
    assert reply.status == 200 and reply.events[-1] == "[DONE]"
    texts: dict[int, str] = {}
    for choice in (choice for event in reply.events[:-1] for choice in event["choices"]):
        more = choice["text"] if path == COMPLETIONS else choice["delta"].get("content") or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + more
    return texts


@pytest.mark.parametrize(
    ("letters", "more"),
    [
        ("", {}),  # whatever the model says
        ("é😀", {}),
        ("aé\u6c34", {"stop": ["é", "\u6c34"]}),
        ("é😀", {"stream_interval": 3}),
        ("é😀", {"stop": "😀", "include_stop_str_in_output": True}),
    ],
    ids=["anything", "two and four bytes", "stops", "intervals", "kept stop"],
)
def test_a_streamed_text_is_the_whole_text(
    live: Live, reference: tokenizers.Tokenizer, letters: str, more: dict[str, Any]
) -> None:
    """Random bytes: characters that are spread over tokens, broken characters, broken ends."""
    if letters:
        more = more | {"allowed_token_ids": _byte_tokens(reference, letters)}
    seen, begun = "", _byte_tokens(reference, "é")[-1:]  # the first byte of a character
    for seed in range(2):
        body = {"max_tokens": 40, "n": ROWS, "temperature": 2, "seed": seed, "ignore_eos": True, **more}
        for path, prompt, half in (
            (COMPLETIONS, {"prompt": "x"}, []),
            (COMPLETIONS, {"prompt": [45, *begun]}, begun),
            (CHAT, {"messages": [{"role": "user", "content": "x"}]}, []),
        ):
            asked = {**prompt, **body, "return_token_ids": True}
            whole = live.post(path, asked)
            assert whole.status == 200, whole.body
            texts = _joined(live, path, asked)
            for choice in whole.json["choices"]:
                text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
                assert texts[choice["index"]] == text
                if "stop" not in more:
                    decoded = reference.decode([*half, *choice["token_ids"]], skip_special_tokens=True)
                    assert text == decoded
                seen += text
    assert "\ufffd" in seen
    lengths = {len(letter.encode()) for letter in seen if letter != "\ufffd"}
    assert {len(letter.encode()) for letter in letters if letter not in more.get("stop", "")} <= lengths


# --- blocks ---------------------------------------------------------------------------------------------------------


def test_more_than_all_blocks_hold(live: Live) -> None:
    """Preempted requests start again, and their answers do not change."""
    rng = random.Random(5)
    bodies: list[dict[str, Any]] = []
    for number in range(6):
        prompt = [rng.randrange(20, VOCABULARY) for _ in range(rng.randrange(5, 40))]
        how = {"temperature": 0} if number % 2 else {"temperature": 1, "seed": number, "n": 2}
        bodies.append({"prompt": prompt, "max_tokens": 190, "ignore_eos": True, **how})
    alone = [[choice["token_ids"] for choice in choices(live, **body)] for body in bodies]
    before = live.metrics()[PREEMPTIONS]
    with ThreadPoolExecutor(2 * len(bodies)) as pool:
        answers = list(pool.map(lambda body: choices(live, **body), bodies * 2))
    assert live.metrics()[PREEMPTIONS] > before
    for number, answer in enumerate(answers):
        assert [choice["token_ids"] for choice in answer] == alone[number % len(bodies)]
        assert {choice["finish_reason"] for choice in answer} == {"length"}
