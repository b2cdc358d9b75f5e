# SPDX-License-Identifier: Apache-2.0
"""Bad requests: each error has a status and a field, reveals nothing about the machine and affects no other request."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from jaxserve.server import requests
from tests.server.routes.checks import Canary, check_error
from tests.server.routes.served import Served

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
VOCABULARY = 426  # the model's and the tokenizer's
HELLO = [{"role": "user", "content": "hello"}]
FLOATS = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    "length_penalty",
)
INTEGERS = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "priority", "best_of")
NEGATIVE = (
    "n",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "stream_interval",
    "best_of",
)  # not top_k, seed, priority, -1 for all
NOT_FINITE = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400")


@pytest.fixture(scope="module", autouse=True)
def undisturbed(served: Served) -> Iterator[None]:
    """Another client is served all the time, and rejected requests leave nothing behind."""
    with Canary(served):
        yield
    assert served.in_flight() == 0
    assert served.send("GET", "/health").status == 200


def refused(served: Served, path: str, body: Any, param: str | None, status: int = 400) -> None:
    check_error(served.post(path, body), status, param)


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hello", "max_tokens": 2, **fields}


@pytest.mark.parametrize(
    "prompt",
    [
        *("", [], [[]], [[5], []], ["a", ""], None, 5, 1.5, True, {}, {"a": 1}, [None], [True], [1.0], [5, "a"]),
        *(["a", 5], [[5, "a"]], [["a"]], [[[5]]], [-1, 5], [[-1]], [[5], [5, -1]], [VOCABULARY], [999999999]),
        *([2**31], [2**63], [2**64], [-(2**63)], [10**400], ["x"] * 1025, [[5]] * 1025, [5] * 128, "x" * 1_000_000),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_invalid_prompts(served: Served, prompt: object) -> None:
    refused(served, COMPLETIONS, {"prompt": prompt, "max_tokens": 1}, "prompt")
    longer = [5] * 129 if prompt == [5] * 128 else prompt  # nothing is generated
    if isinstance(longer, list) and len(longer) == 1025:
        longer = longer * 2  # of inputs there may be 2048
    refused(served, EMBEDDINGS, {"input": longer}, "input")


def test_missing_prompts(served: Served) -> None:
    refused(served, COMPLETIONS, {"max_tokens": 1}, "prompt")
    refused(served, EMBEDDINGS, {}, "input")
    refused(served, CHAT, {}, "messages")


@pytest.mark.parametrize("number", [*NOT_FINITE, '"x"', "true", "[]", "{}"])
@pytest.mark.parametrize("field", FLOATS)
def test_invalid_numbers(served: Served, field: str, number: str) -> None:
    refused(served, COMPLETIONS, b'{"prompt":"x","max_tokens":1,"%b":%b}' % (field.encode(), number.encode()), field)


@pytest.mark.parametrize("value", ["2.5", '"5"', "true", "[1]", "9" * 400, "9" * 30])
@pytest.mark.parametrize("field", INTEGERS)
def test_invalid_whole_numbers(served: Served, field: str, value: str) -> None:
    refused(served, COMPLETIONS, b'{"prompt":"x","%b":%b}' % (field.encode(), value.encode()), field)


@pytest.mark.parametrize("field", NEGATIVE)
def test_negative_numbers(served: Served, field: str) -> None:
    for value in (-1, -(2**31), -(2**63)):
        refused(served, COMPLETIONS, completion(**{field: value}), field)


RANGES: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": 2.01}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": -1}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 5}, "n"),  # above max_num_seqs
    ({"n": 16385}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"prompt": ["x"] * 1024, "n": 128}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 10**9}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 129}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 0, "echo": True, "n": 2}, "n"),
    ({"min_tokens": 10**9, "max_tokens": 2}, "min_tokens"),
    ({"min_tokens": 10**9, "max_tokens": 10**9}, "max_tokens"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"logprobs": 9}, "logprobs"),
    ({"logprobs": 10**6}, "logprobs"),
    ({"prompt_logprobs": 9}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),  # all of them: above max_logprobs
    ({"prompt_logprobs": -2}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"stop_token_ids": [999999], "min_tokens": 2}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids"),
    ({"stop_token_ids": [2**40]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
    ({"logit_bias": {"191222": -100}}, "logit_bias"),
    ({"logit_bias": {"-1": 5}}, "logit_bias"),
    ({"logit_bias": {"abc": 1}}, "logit_bias"),
    ({"logit_bias": {"1.5": 1}}, "logit_bias"),
    ({"logit_bias": {"": 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias"),
    ({"logit_bias": {"5": True}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
    ({"allowed_token_ids": [VOCABULARY]}, "allowed_token_ids"),
    ({"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}, "min_tokens"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": ["x"] * 129}, "bad_words"),
    ({"bad_words": ["x" * 1025]}, "bad_words"),
    ({"bad_words": [5]}, "bad_words"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 1025}, "stop"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 129}, "cache_salt"),
    ({"cache_salt": "x" * 1_000_000}, "cache_salt"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"request_id": "x" * 65}, "request_id"),
    ({"request_id": "a\nb"}, "request_id"),
    ({"request_id": 5}, "request_id"),
    ({"user": "x" * 1025}, "user"),
    ({"user": 5}, "user"),
    ({"metadata": {str(key): "" for key in range(17)}}, "metadata"),
    ({"stream": "true"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"echo": "yes"}, "echo"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncation_side": "left"}, "truncation_side"),
    ({"truncation_side": "middle", "truncate_prompt_tokens": 1}, "truncation_side"),
    ({"service_tier": "flex"}, "service_tier"),
]


@pytest.mark.parametrize(("fields", "param"), RANGES, ids=lambda value: json.dumps(value)[:50])
def test_values_out_of_range(served: Served, fields: dict[str, Any], param: str | None) -> None:
    refused(served, COMPLETIONS, completion(**fields), param)


LATER = {
    "suffix": "x",
    "prompt_embeds": "AAAA",
    "response_format": {"type": "json_object"},
    "structured_outputs": {"json": {}},
    "guided_json": {},
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": "root ::= 'a'",
    "guided_decoding_backend": "auto",
    "logprob_token_ids": [5],
    "thinking_token_budget": 5,
    "repetition_detection": {"min_count": 2},
    "kv_transfer_params": {"do_remote_decode": True},
    "ec_transfer_params": {"a": 1},
    "vllm_xargs": {"a": 1},
    "routed_experts_prompt_start": 0,
    "return_token_offsets": True,
    "store": True,
}
LATER_CHAT = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "reasoning_effort": "low",
    "include_reasoning": False,
    "documents": [{"text": "x"}],
    "audio": {"voice": "x", "format": "wav"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "return_assistant_tokens_mask": True,
    "verbosity": "low",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    **{name: LATER[name] for name in LATER if name not in ("suffix", "prompt_embeds", "response_format")},
}


@pytest.mark.parametrize("field", LATER)
def test_unsupported_fields_of_completions_are_named(served: Served, field: str) -> None:
    refused(served, COMPLETIONS, completion(**{field: LATER[field]}), field)


@pytest.mark.parametrize("field", LATER_CHAT)
def test_unsupported_fields_of_chats_are_named(served: Served, field: str) -> None:
    refused(served, CHAT, {"messages": HELLO, "max_tokens": 1, field: LATER_CHAT[field]}, field)


def test_unsupported_fields_may_be_null(served: Served) -> None:
    assert served.post(COMPLETIONS, completion(**dict.fromkeys(LATER))).status == 200
    body = {"messages": HELLO, "max_tokens": 1, **dict.fromkeys(LATER_CHAT)}
    assert served.post(CHAT, body).status == 200


CHATS: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [5]}, "messages"),
    ({"messages": [{}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"),
    ({"messages": [{"role": "", "content": "x"}]}, "messages"),
    ({"messages": [{"role": 5, "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        "messages",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages"),
    ({"messages": HELLO * 4097}, "messages"),
    ({"messages": [{"role": "user", "content": "long " * 200}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 10_000_000}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": -2, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 9, "logprobs": True}, "logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 1000}, "max_completion_tokens"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}, "chat_template"),
    *(
        ({"chat_template_kwargs": {key: True}}, "chat_template_kwargs")
        for key in (
            *("tokenize", "chat_template", "messages", "tools", "documents", "conversation", "padding", "truncation"),
            *("continue_final_message", "max_length", "return_tensors", "return_dict", "add_generation_prompt"),
        )
    ),
    ({"chat_template_kwargs": {"tokenize": True}, "messages": [{"role": "user", "content": "x" * 10**7}]}, None),
    ({"chat_template_kwargs": {str(key): 1 for key in range(65)}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("fields", "param"), CHATS, ids=lambda value: json.dumps(value)[:50])
def test_invalid_chats(served: Served, fields: dict[str, Any], param: str | None) -> None:
    refused(served, CHAT, {"messages": HELLO, "max_tokens": 1, **fields}, param)


BODIES = {
    "empty": b"",
    "space": b"  ",
    "number": b"5",
    "null": b"null",
    "list": b"[]",
    "string": b'"prompt"',
    "open": b"{",
    "cut": b'{"prompt": "x", "max_tok',
    "trailing comma": b'{"prompt": "x",}',
    "two": b'{"prompt": "x"}{"prompt": "x"}',
    "single quotes": b"{'prompt': 'x'}",
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "the other half": b'{"prompt": "\\udc00"}',
    "surrogate bytes": b'{"prompt": "\xed\xa0\x80"}',
    "bare control character": b'{"prompt": "a\x01b"}',
    "bare NUL": b'{"prompt": "a\x00b"}',
    "deep list": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"prompt": "x", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "huge number": b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}",
    "huge id": b'{"prompt": [' + b"9" * 5_000 + b"]}",
    "many unknown": json.dumps({"prompt": "x", **{f"a{key}": 1 for key in range(200_000)}}).encode(),
    "many values": json.dumps({"prompt": [5] * 600_000}).encode(),
    "many keys": json.dumps({"prompt": "x", "metadata": {f"a{key}": 1 for key in range(200_000)}}).encode(),
}


@pytest.mark.parametrize("name", BODIES)
def test_invalid_bodies(served: Served, name: str) -> None:
    for path in (COMPLETIONS, CHAT, EMBEDDINGS, "/tokenize", "/detokenize"):
        refused(served, path, BODIES[name], None)


@pytest.mark.parametrize(
    "media", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_only_json_is_accepted(served: Served, media: str) -> None:
    error = check_error(served.post(COMPLETIONS, completion(), Content_Type=media), 400)
    assert "application/json" in error["message"]


def test_unknown_models(served: Served) -> None:
    for name in ("nope", "tiny\n", "x" * 4096, "../etc", "<script>", "\x1b[31m"):
        for path, fields in ((COMPLETIONS, completion()), (CHAT, {"messages": HELLO}), (EMBEDDINGS, {"input": "x"})):
            error = check_error(served.post(path, {**fields, "model": name}), 404, "model")
            assert error["message"].startswith("The model `") and error["message"].isprintable()
    refused(served, COMPLETIONS, completion(model=5), "model")
    check_error(served.send("GET", "/v1/models/nope"), 404, "model")


def test_a_misspelled_field_explains_a_missing_one(served: Served) -> None:
    error = check_error(served.post(CHAT, {"messges": HELLO}), 400, "messges")
    assert "messages" in error["message"]


def test_errors_about_length_have_the_numbers(served: Served) -> None:
    error = check_error(served.post(COMPLETIONS, {"prompt": [5] * 200}), 400, "prompt")
    assert "maximum context length is 128 tokens" in error["message"] and "200" in error["message"]
    error = check_error(served.post(COMPLETIONS, completion(prompt=[[5], [5] * 200])), 400, "prompt")
    assert "prompt 1" in error["message"]
    error = check_error(served.post(CHAT, {"messages": HELLO * 30}), 400, "messages")
    assert "maximum context length is 128 tokens" in error["message"]


@pytest.mark.parametrize("seconds", ["x", "0", "-1", "nan", "inf", "", "1" * 5000])
def test_invalid_deadlines(served: Served, seconds: str) -> None:
    check_error(served.post(COMPLETIONS, completion(), X_Request_Timeout=seconds), 400, "X-Request-Timeout")


def test_a_far_deadline(served: Served) -> None:
    assert served.post(COMPLETIONS, completion(), X_Request_Timeout="9" * 20).status == 200


def test_a_passed_deadline_is_a_504(served: Served) -> None:
    for more in ({}, {"stream": True}):
        reply = served.post(
            COMPLETIONS, completion(max_tokens=100, ignore_eos=True, **more), X_Request_Timeout="0.000000001"
        )
        check_error(reply, 504)


def test_ids_outside_the_vocabulary(served: Served) -> None:
    for tokens in ([-1], [VOCABULARY], [10**9], [2**63], [True], ["5"], [0] * 10**6, None, 5):
        refused(served, "/detokenize", {"tokens": tokens}, "tokens" if tokens != [0] * 10**6 else None)
    refused(served, "/detokenize", {}, "tokens")
    refused(served, "/tokenize", {"prompt": "x" * (2**20 + 1)}, "prompt")
    refused(served, "/tokenize", {"prompt": 5}, "prompt")
    refused(served, "/tokenize", {}, None)
    refused(served, "/tokenize", {"prompt": "x", "messages": HELLO}, None)


def test_embedding_errors_name_input(served: Served) -> None:
    for given in ([9999], [[5], [9999]], [5] * 129, "", ["x", ""], [[5]] * 2049):
        error = check_error(served.post(EMBEDDINGS, {"input": given}), 400, "input")
        assert "prompt" not in error["message"], error


def test_impossible_embeddings(served: Served) -> None:
    fields: list[tuple[dict[str, Any], str]] = [
        ({"dimensions": 5}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "bytes"}, "encoding_format"),
        ({"messages": HELLO}, "messages"),
    ]
    for more, param in fields:
        refused(served, EMBEDDINGS, {"input": "x", **more}, param)


def test_dimensions_are_checked_before_anything_is_computed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "run", None)
    refused(served, EMBEDDINGS, {"input": "x", "dimensions": 5}, "dimensions")


def test_a_body_in_many_pieces(served: Served) -> None:
    """The same as for a body in one piece."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    body = json.dumps({"prompt": "x" * 100_000}).encode()
    pieces = (body[at : at + 7] for at in range(0, len(body), 7))
    with closing(connection):
        connection.request("POST", COMPLETIONS, pieces, {"Content-Type": "application/json"}, encode_chunked=True)
        answer = connection.getresponse()
        assert answer.status == 400 and b"maximum context length" in answer.read()
