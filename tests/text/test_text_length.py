# SPDX-License-Identifier: Apache-2.0
"""A text never has fewer tokens than its length says, whatever a tokenizer drops or joins; and it is not encoded."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from jaxserve.engine.capacity import Limits
from jaxserve.errors import RequestError
from jaxserve.frontend.prepare import Preparer
from jaxserve.text import tokenizer as tokenizers
from jaxserve.text.text_length import GENEROUS, text_length
from jaxserve.text.tokenizer import Encoded
from jaxserve.types.sampling_params import SamplingParams
from tests.golden.load import TOKENIZERS

REAL = {name: tokenizers.load(TOKENIZERS / name) for name in ("byte-level", "byte-fallback")}
LIMITS = Limits(
    vocab_size=1000,
    max_model_len=64,
    max_num_seqs=1,
    max_num_batched_tokens=8,
    block_size=8,
    num_blocks=9,
    max_logprobs=0,
)


def of_bytes(**parts: Any) -> Tokenizer:
    """Byte-level BPE with one long word and further options."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, "aa", "aaaa"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "a"), ("aa", "aa")]))
    backend.pre_tokenizer = parts.get("pre_tokenizer") or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if "normalizer" in parts:
        backend.normalizer = parts["normalizer"]
    backend.add_special_tokens(parts.get("added", []))
    return backend


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CRAFTED: dict[str, tuple[Tokenizer, int, bool]] = {
    "plain": (of_bytes(), 4, True),
    "lower": (of_bytes(normalizer=normalizers.Lowercase()), 4, True),
    "composing": (of_bytes(normalizer=normalizers.NFC()), 4 * GENEROUS, False),
    "decomposing": (of_bytes(normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.Prepend("x")])), 4, True),
    "stripping": (of_bytes(normalizer=normalizers.Strip()), 4, False),
    "longer": (of_bytes(normalizer=normalizers.Replace("b", "cc")), 4, True),
    "shorter": (of_bytes(normalizer=normalizers.Replace("bb", "c")), 4 * GENEROUS, False),
    "words": (of_bytes(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES])), 4, False),
    "greedy special": (of_bytes(added=[AddedToken("<s>", lstrip=True, rstrip=True, special=True)]), 4, False),
    "splitting": (of_bytes(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTES])), 4, True),
    "removing": (
        of_bytes(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split("b", "removed"), BYTES])),
        4 * GENEROUS,
        False,
    ),
    "unknowns": (Tokenizer(models.WordLevel({"[UNK]": 0, "aaaa": 1}, "[UNK]")), 5 * GENEROUS, False),
    "a byte is missing": (Tokenizer(models.BPE({"a": 0, "b": 1}, [])), GENEROUS, False),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_the_length_of_each_kind(name: str) -> None:
    backend, per_token, spaces_count = CRAFTED[name]
    found = text_length(backend)
    assert (found.per_token, found.spaces_count) == (per_token, spaces_count)


TEXTS = st.text(st.sampled_from("aaaabb \n\t1é\u0301漢𝄞\u3000<s>"), max_size=60) | st.text(max_size=30)
SOUND = [name for name, (_, per_token, _) in CRAFTED.items() if per_token == 4] + ["composing"]


@pytest.mark.parametrize("name", [*SOUND, *REAL])
def test_no_text_has_fewer_tokens(name: str) -> None:
    backend: Any = REAL[name]._backend if name in REAL else CRAFTED[name][0]
    known = text_length(backend)

    @given(TEXTS)
    def check(text: str) -> None:
        assert known.fewest_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids)

    check()


def test_the_longest_token_is_reached() -> None:
    known = text_length(CRAFTED["plain"][0])
    text = 400 * "a"
    assert known.fewest_tokens(text) == len(CRAFTED["plain"][0].encode(text).ids) == 100


def test_a_text_that_is_too_long_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = REAL["byte-level"]
    longest = max(map(len, cast(Any, tokenizer)._backend.get_vocab(with_added_tokens=True)))
    intake = Preparer(tokenizer, LIMITS)
    encoded: list[int] = []
    encode = tokenizers.Tokenizer.encoded

    def noting(self: tokenizers.Tokenizer, text: str, **options: Any) -> Encoded:
        encoded.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(tokenizers.Tokenizer, "encoded", noting)
    words = r"maximum context length is 64 tokens, but the prompt has 5000000 characters, which are at least \d+ tokens"
    for prompt in (5_000_000 * "x", {"prompt": 5_000_000 * "x"}):
        with pytest.raises(RequestError, match=words) as caught:
            intake.prepare(prompt, SamplingParams())
        assert caught.value.field == "prompt"
    with pytest.raises(RequestError, match="characters"):
        intake.encode((64 * longest + 1) * "x", add_special_tokens=False)
    assert encoded == []
    with pytest.raises(RequestError, match=r"the prompt has \d+ tokens"):
        intake.prepare(64 * longest * "x", SamplingParams())  # the tokens decide
    assert encoded == [64 * longest]
    assert intake.encode("hello", add_special_tokens=False) == encode(tokenizer, "hello", add_special_tokens=False).ids


def test_a_vocabulary_file_of_the_hub_says_the_same(tmp_path: Path) -> None:
    """Parts are read from what a backend writes of itself; here from the very file."""
    raw = json.loads((TOKENIZERS / "byte-fallback" / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
    raw["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    found = text_length(Tokenizer.from_str(json.dumps(raw)))
    assert found == REAL["byte-fallback"].text_length and found.spaces_count
    raw["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"})
    assert text_length(Tokenizer.from_str(json.dumps(raw))).per_token == GENEROUS * found.per_token
