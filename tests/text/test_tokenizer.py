# SPDX-License-Identifier: Apache-2.0
"""Loading, encoding, chat templates and whole decodes, against what transformers and `tokenizers` themselves do."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from jaxserve import demo
from jaxserve.errors import CheckpointError, RequestError
from jaxserve.text import tokenizer as tokenizers
from tests.golden.load import TOKENIZERS
from tests.text.chats import chat_ids

KINDS = ("byte-level", "byte-fallback")
EXPECTED: dict[str, Any] = json.loads((TOKENIZERS / "expected.json").read_text())
LOADED = {kind: tokenizers.load(TOKENIZERS / kind) for kind in KINDS}
USER = [{"role": "user", "content": "hi"}]


def small(words: list[str], **options: Any) -> tokenizers.Tokenizer:
    """A tokenizer with one token per word, split at spaces."""
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = options.pop("decoder", None)
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizers.Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **options))


# --- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(kind: str) -> None:
    tokenizer = LOADED[kind]
    for case in EXPECTED[kind]["texts"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
        assert tokenizer.decode(case["ids"]) == case["decoded_without_special"]


FOLDERS = (TOKENIZERS / "byte-level", TOKENIZERS / "byte-fallback", demo.FOLDER, demo.DRAFT_FOLDER)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_the_backend_for_one_text(folder: Path, special: bool) -> None:
    """`encode_batch_fast`, which lets other threads run, gives the same ids as `encode`, which does not."""
    tokenizer = tokenizers.load(folder)
    texts = [case["text"] for kind in KINDS for case in EXPECTED[kind]["texts"]]
    end = tokenizer.decode([*tokenizer.eos_token_ids], skip_special_tokens=False)
    texts += ["", end, f"a{end} b {end}{end}", "naïve 你好 🦊\r\n\t x  ", "\x00\ufffd\ufdd0", " " * 300]
    texts += [" ".join(texts) * 50, "x" * 20_000]
    backend: Any = tokenizer._backend
    for text in texts:
        expected = backend.encode(text, add_special_tokens=special).ids
        assert tokenizer.encode(text, add_special_tokens=special) == expected
        assert len(tokenizer.encoded(text, add_special_tokens=special)) == len(expected)


def test_special_tokens_are_added_only_on_request() -> None:
    tokenizer = LOADED["byte-level"]
    with_them = tokenizer.encode("The model")
    assert tokenizer.encode("The model", add_special_tokens=False) == with_them[1:]
    assert tokenizer.decode(with_them[:1], skip_special_tokens=False) == "<|begin_of_text|>"


def test_the_vocabulary() -> None:
    assert LOADED["byte-level"].vocab_size == 426
    assert LOADED["byte-level"].eos_token_ids == {424}
    assert LOADED["byte-fallback"].vocab_size == 516
    assert LOADED["byte-fallback"].eos_token_ids == {2}
    assert tokenizers.Tokenizer(PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()))).eos_token_ids == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", [600, 2**31, 2**32, 2**70, -1])
def test_ids_outside_the_vocabulary_have_no_text(kind: str, token: int) -> None:
    tokenizer = LOADED[kind]
    plain = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.decode([*plain, token, *plain]) == tokenizer.decode([*plain, *plain])
    assert tokenizer.token_text(token) == ""
    assert small(["?", "a"]).decode([1, token, 1]) == "a a"


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_single_tokens_put_together_are_the_text(kind: str) -> None:
    tokenizer = LOADED[kind]
    ids = tokenizer.encode("The model reads the prompt.", add_special_tokens=False)
    assert "".join(map(tokenizer.token_text, ids)).lstrip(" ") == "The model reads the prompt."
    assert any(tokenizer.token_text(token).startswith(" ") for token in ids[1:])
    [end] = tokenizer.eos_token_ids
    assert tokenizer.token_text(end) == tokenizer.decode([end], skip_special_tokens=False) != ""
    part = tokenizer.encode("🙂", add_special_tokens=False)[-1]
    assert tokenizer.token_text(part) == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_single_tokens_put_together_are_the_text(kind: str) -> None:
    """Also if a character spans several tokens, none of which has a text."""
    tokenizer = LOADED[kind]
    text = "naïve 你好 🦊🦊 done"
    parts = [tokenizer.token_bytes(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert b"".join(part or b"" for part in parts).decode().strip() == text


def test_texts_of_single_tokens_are_cached_only_for_the_vocabulary() -> None:
    tokenizer = tokenizers.load(TOKENIZERS / "byte-level")
    for token in range(5000):
        tokenizer.token_text(token)
    held = [*vars(tokenizer).values(), *vars(tokenizer._decoding).values()]
    sizes = [len(value) for value in held if isinstance(value, dict)]
    assert sorted(sizes)[-2:] == [tokenizer.vocab_size] * 2


@pytest.mark.parametrize("text", ["half \ud83d of a pair", 5, None, ["a", "b"]])
def test_values_that_are_not_text_are_rejected(text: Any) -> None:
    with pytest.raises(RequestError) as refused:
        LOADED["byte-level"].encode(text)
    assert refused.value.field == "prompt"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["a", " ", "é", "<|eot_id|>", "</s>", "<"])
def test_encoding_takes_linear_time(kind: str, unit: str) -> None:
    def seconds(count: int) -> float:
        begin = time.process_time()
        LOADED[kind].encode(unit * count)
        return time.process_time() - begin

    few = min(seconds(5_000) for _ in range(3))
    assert seconds(40_000) < 32 * max(few, 1e-3)  # eight times as much; 64 times if it were quadratic


# --- loading --------------------------------------------------------------------------------------------------------


def copy_of(kind: str, folder: Path) -> Path:
    return Path(shutil.copytree(TOKENIZERS / kind, folder / kind))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_folder_without_tokenizer_is_rejected(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="has no tokenizer"):
            tokenizers.load(folder)
    # transformers would make an empty one of this.
    shutil.copy(TOKENIZERS / "byte-fallback" / "tokenizer_config.json", tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', '{"model": {"type": "BPE"}}', "\x00" * 50])
def test_a_damaged_vocabulary_is_rejected(tmp_path: Path, content: str) -> None:
    folder = copy_of("byte-level", tmp_path)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        tokenizers.load(folder)


def test_a_vocabulary_too_large_is_not_read(tmp_path: Path) -> None:
    folder = copy_of("byte-level", tmp_path)
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(2**31)
    with pytest.raises(CheckpointError, match="larger than 256 MiB"):
        tokenizers.load(folder)


@pytest.mark.parametrize("declared", [{}, {"tokenizer_class": "EvilTokenizer"}, {"tokenizer_class": None}])
@pytest.mark.parametrize("automap", [{"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, ["evil.Evil", None]])
def test_code_of_a_folder_never_runs(tmp_path: Path, declared: dict[str, Any], automap: Any) -> None:
    folder = copy_of("byte-level", tmp_path)
    witness = tmp_path / "it ran"
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Evil: ...\n")
    edit(folder / "tokenizer_config.json", auto_map=automap, **declared)
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    try:
        assert tokenizers.load(folder).encode("The") == LOADED["byte-level"].encode("The")
    except CheckpointError as error:
        assert "cannot load" in str(error)
    assert not witness.exists()


def test_truncation_and_padding_of_a_vocabulary_file_are_ignored(tmp_path: Path) -> None:
    folder = copy_of("byte-level", tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=40, pad_id=7)
    backend.save(str(folder / "tokenizer.json"))
    assert tokenizers.load(folder).encode("The model reads") == LOADED["byte-level"].encode("The model reads")


def test_loading_prints_nothing_and_imports_no_framework() -> None:
    lines = [
        "import sys",
        "from jaxserve.text import tokenizer",
        "assert not {'transformers', 'tokenizers'} & set(sys.modules), 'imported before it is needed'",
        f"loaded = tokenizer.load({str(TOKENIZERS / 'byte-level')!r})",
        "loaded.encode(loaded.chat_text([{'role': 'user', 'content': 'x'}])), loaded.decode([5])",
        "assert not {'jax', 'torch', 'tensorflow'} & set(sys.modules)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- chat -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_chats_are_those_of_transformers(kind: str) -> None:
    tokenizer, expected = LOADED[kind], EXPECTED[kind]
    assert tokenizer.chat_text(expected["messages"]) == expected["rendered"]
    assert chat_ids(tokenizer, expected["messages"]) == expected["chat_ids"]


def test_a_final_message_can_be_continued() -> None:
    tokenizer = LOADED["byte-level"]
    messages = [*USER, {"role": "assistant", "content": "I think"}]
    text = tokenizer.chat_text(messages, continue_final_message=True, add_generation_prompt=False)
    assert text.endswith("I think")
    with pytest.raises(RequestError) as refused:
        tokenizer.chat_text(messages, continue_final_message=True)
    assert refused.value.field == "continue_final_message"


def test_a_template_sees_tools_and_its_own_variables() -> None:
    template = "{{ tools[0].name }} {{ style }} {{ messages[0].content }} {{ add_generation_prompt }}"
    text = LOADED["byte-level"].chat_text(
        USER,
        chat_template=template,
        tools=[{"name": "f"}],
        template_kwargs={"style": "plain"},
        add_generation_prompt=False,
    )
    assert text == "f plain hi False"


@pytest.mark.parametrize(
    "name",
    [
        *("tokenize", "return_dict", "chat_template", "messages", "tools", "documents", "conversation", "padding"),
        *("continue_final_message", "truncation", "max_length", "return_tensors", "add_generation_prompt", "self"),
        *("conversations", "tokenizer_kwargs", "return_assistant_tokens_mask", "kwargs", "sanitize_control_tokens"),
    ],
)
def test_template_variables_cannot_take_reserved_names(name: str) -> None:
    with pytest.raises(RequestError, match=f"'{name}'") as refused:
        LOADED["byte-level"].chat_text(USER, template_kwargs={name: True})
    assert refused.value.field == "chat_template_kwargs"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for %}",
        "{{ missing.thing }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content }}",
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_a_request_error(template: str) -> None:
    with pytest.raises(RequestError, match="chat template") as refused:
        LOADED["byte-level"].chat_text(USER, chat_template=template)
    assert refused.value.field == "messages"


def test_errors_of_a_template_are_reported() -> None:
    with pytest.raises(RequestError, match="Conversation roles must alternate"):
        LOADED["byte-fallback"].chat_text([*USER, *USER])


@pytest.mark.parametrize("messages", [[], "hi", {"role": "user"}, ["hi"], [[USER[0]]], [{"content": "x"}], [{}], None])
def test_invalid_messages_are_rejected(messages: Any) -> None:
    with pytest.raises(RequestError) as refused:
        LOADED["byte-level"].chat_text(messages)
    assert refused.value.field == "messages"


@pytest.mark.parametrize("tools", ["f", ["f"], [print], {"name": "f"}])
def test_invalid_tools_are_rejected(tools: Any) -> None:
    with pytest.raises(RequestError) as refused:
        LOADED["byte-level"].chat_text(USER, tools=tools)
    assert refused.value.field == "tools"


def test_a_request_can_have_its_own_template() -> None:
    tokenizer = small(["?", "hi"])
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.chat_text(USER)
    assert chat_ids(tokenizer, USER, chat_template="{{ messages[0].content }}<end>") == [1, 2]


# --- bad words ------------------------------------------------------------------------------------------------------


def test_bad_words_have_a_form_after_a_space() -> None:
    tokenizer = LOADED["byte-level"]
    plain, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("s", " s"))
    assert len(plain) == len(spaced) == 1  # or this tests something else
    assert tokenizer.bad_word_ids(["s"]) == tokenizer.bad_word_ids([" s"]) == (tuple(plain), tuple(spaced))
    # "two" starts with the space's own token after a space, which would ban all that does.
    two = tuple(tokenizer.encode("two", add_special_tokens=False))
    assert len(tokenizer.encode(" two", add_special_tokens=False)) != len(two)
    assert tokenizer.bad_word_ids(["two", "two"]) == (two,)
    assert tokenizer.bad_word_ids([]) == ()


def test_bad_words_are_limited() -> None:
    tokenizer = LOADED["byte-level"]
    digits = "0123456789"
    assert len(tokenizer.encode("7" * 32, add_special_tokens=False)) == 32
    assert len(tokenizer.bad_word_ids(["7" * 32])) >= 1
    many = [first + second for first in digits for second in digits]
    sequences = {ids for word in many for ids in tokenizer.bad_word_ids([word])}
    assert set(tokenizer.bad_word_ids(many)) == sequences
    for words in (["7" * 33], many + [word + "x" for word in many], ["fine", "  "]):
        with pytest.raises(RequestError) as refused:
            tokenizer.bad_word_ids(words)
        assert refused.value.field == "bad_words"


# --- other decoders -------------------------------------------------------------------------------------------------


def test_spaces_between_special_tokens_can_be_left_out() -> None:
    tokenizer = small(["?", "a", "b"])
    ids = [2, 1, 3, 3, 1, 3]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "b a <end> <end> a <end>"
    left_out = tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert left_out == "b a <end><end> a <end>"
    assert tokenizer.decode(ids, spaces_between_special_tokens=False) == "b a a"


FUSED = (decoders.ByteFallback(), decoders.Fuse())


def after_bytes(*steps: Any) -> Any:
    return decoders.Sequence([*FUSED, *steps])


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (decoders.WordPiece(), ["?", "read", "##ing", "s"]),
        (decoders.Metaspace(), ["?", "▁read", "ing", "▁s"]),
        (decoders.Sequence([decoders.Replace("_", " "), decoders.Strip(" ", 1, 0)]), ["?", "_a", "b", "_"]),
        (decoders.Sequence([decoders.ByteFallback(), decoders.Replace("_", " "), decoders.Fuse()]), ["?", "_a", "b"]),
        (after_bytes(decoders.Strip("_", 2, 0)), ["?", "__a", "b", "_"]),
        (after_bytes(decoders.Strip("_", 1, 1)), ["?", "_a_", "b"]),
        (decoders.Sequence([decoders.Replace(Regex("_+"), " "), after_bytes()]), ["?", "__a", "b_", "_"]),
        (decoders.Sequence([decoders.Replace(Regex("_+"), " "), *FUSED]), ["?", "__a", "b_", "_"]),
    ],
)
def test_other_decoders_decode_as_they_do(decoder: Any, words: list[str]) -> None:
    tokenizer = small(words, decoder=decoder)
    for ids in ([1, 2, 1, 2], [2, 1], [1], [len(words) - 1, 1, 1]):
        assert tokenizer.decode(ids) == decoder.decode([words[token] for token in ids])


def test_parts_of_text_are_one_text() -> None:
    tokenizer = LOADED["byte-level"]
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    whole = tokenizer.chat_text([{"role": "user", "content": "one\ntwo"}])
    assert tokenizer.chat_text([{"role": "user", "content": parts}]) == whole


@pytest.mark.parametrize("content", [5, None, [{"type": "image_url", "image_url": {"url": "x"}}], ["text"], [{}]])
def test_content_that_is_not_text_is_rejected(content: Any) -> None:
    with pytest.raises(RequestError, match=r"messages\[0\]") as caught:
        LOADED["byte-level"].chat_text([{"role": "user", "content": content}])
    assert caught.value.field.startswith("messages")
