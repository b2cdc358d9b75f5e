# SPDX-License-Identifier: Apache-2.0
"""Request bodies and their errors without a server, and the OpenAPI document."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jaxserve.engine.capacity import Limits
from jaxserve.errors import EngineError, OverloadedError, RequestError
from jaxserve.frontend.prepare import Preparer
from jaxserve.server import params
from jaxserve.server.errors import ApiError, as_api_error, scrubbed
from jaxserve.server.params import Order
from jaxserve.server.protocol.base import as_api_error as as_response
from jaxserve.server.protocol.base import parse
from jaxserve.server.protocol.bounds import SMALL
from jaxserve.server.protocol.chat import ChatRequest
from jaxserve.server.protocol.completion import CompletionRequest
from jaxserve.server.protocol.embeddings import EmbeddingRequest
from jaxserve.server.protocol.sampling import Sampling
from jaxserve.server.protocol.tokens import TokenizeRequest
from jaxserve.server.routes.openapi import document
from jaxserve.server.routes.table import all_routes
from jaxserve.text import tokenizer as tokenizers
from jaxserve.types.sampling_params import SamplingParams
from jaxserve.unsupported import WITHOUT_EFFECT
from tests.server.routes.checks import TELLS
from tests.tiny_llm import TOKENIZER

# The fields that vLLM's documentation lists: each works here, or is refused by its own name.
COMPLETION_FIELDS = (
    *("model", "prompt", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n"),
    *("presence_penalty", "seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user"),
    *("use_beam_search", "top_k", "min_p", "repetition_penalty", "length_penalty", "stop_token_ids"),
    *("include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens"),
    *("spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side", "allowed_token_ids"),
    *("prompt_logprobs", "logprob_token_ids", "bad_words", "prompt_embeds", "add_special_tokens", "response_format"),
    *("structured_outputs", "priority", "request_id", "session_id", "return_tokens_as_token_ids", "return_token_ids"),
    *("routed_experts_prompt_start", "return_token_offsets", "cache_salt", "kv_transfer_params"),
    *("ec_transfer_params", "vllm_xargs", "repetition_detection", "thinking_token_budget", "stream_interval"),
    *("best_of",),
)
CHAT_FIELDS = (
    *("messages", "model", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "max_tokens"),
    *("max_completion_tokens", "n", "presence_penalty", "response_format", "seed", "stop", "stream"),
    *("stream_options", "temperature", "top_p", "tools", "tool_choice", "reasoning_effort", "parallel_tool_calls"),
    *("user", "use_beam_search", "top_k", "min_p", "repetition_penalty", "length_penalty", "stop_token_ids"),
    *("include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens"),
    *("spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side", "allowed_token_ids"),
    *("prompt_logprobs", "logprob_token_ids", "bad_words", "thinking_token_budget", "include_reasoning", "echo"),
    *("add_generation_prompt", "continue_final_message", "add_special_tokens", "documents", "chat_template"),
    *("chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "structured_outputs", "priority"),
    *("request_id", "session_id", "return_tokens_as_token_ids", "return_token_ids", "return_prompt_text"),
    *("return_assistant_tokens_mask", "cache_salt", "kv_transfer_params", "ec_transfer_params", "vllm_xargs"),
    *("repetition_detection", "stream_interval", "metadata", "store", "service_tier", "prompt_cache_key"),
    *("safety_identifier",),
)


def test_every_field_of_vllm_is_known() -> None:
    assert set(COMPLETION_FIELDS) - set(CompletionRequest.model_fields) <= set(WITHOUT_EFFECT)
    assert set(CHAT_FIELDS) - set(ChatRequest.model_fields) <= set(WITHOUT_EFFECT)


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, EmbeddingRequest])
def test_null_means_no_value(kind: type[Sampling]) -> None:
    needed = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "input": "x"}
    body = {name: needed.get(name) for name in kind.model_fields if name != "messages" or kind is ChatRequest}
    assert parse(kind, json.dumps(body).encode())


def test_unknown_fields_can_be_ignored() -> None:
    raw = json.dumps({"prompt": "x", "max_tokenz": 1, "stream": True, "stream_options": {"new": 1}}).encode()
    with pytest.raises(ApiError, match="max_tokenz"):
        parse(CompletionRequest, raw)
    assert parse(CompletionRequest, raw, unknown="ignore").stream
    with pytest.raises(ApiError, match="suffix is not supported"):  # known, and of weight
        parse(CompletionRequest, b'{"prompt": "x", "suffix": "y"}', unknown="ignore")
    large = json.dumps({"prompt": "x" * 100_000, "max_tokenz": 1}).encode()
    with pytest.raises(ApiError, match="Did you mean max_tokens"):
        parse(CompletionRequest, large)
    assert parse(CompletionRequest, large, unknown="ignore")


def test_a_broken_key_in_a_large_body_is_a_client_error() -> None:
    for broken in (b'{"\xff": 1, "prompt": "%s"}', b'{"messages": [{"\xff": 1}], "prompt": "%s"}'):
        with pytest.raises(ApiError) as refused:
            parse(CompletionRequest, broken % (b"x" * 100_000))
        assert refused.value.status == 400


def test_unknown_fields_cannot_hide_an_object_with_too_many_keys() -> None:
    biases = {str(place): 1 for place in range(20_000)}
    large = json.dumps({"other": 1, "prompt": "a", "logit_bias": biases}).encode()
    with pytest.raises(ApiError, match="too many keys"):
        parse(CompletionRequest, large, unknown="ignore")


@pytest.mark.parametrize("field", ["", "logit_bias", "stream_options", "other"])
@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":"), (",", " : ")])
def test_too_many_keys(field: str, separators: tuple[str, str]) -> None:
    many = {f"k{place}": 1 for place in range(20_000)}
    raw = json.dumps({"prompt": "x", **({field: many} if field else many)}, separators=separators).encode()
    with pytest.raises(ApiError, match=f"{field or 'the body'} has an object with too many keys|has too many keys"):
        parse(CompletionRequest, raw, unknown="warn")


def test_keys_within_texts_do_not_count() -> None:
    text = json.dumps({f"k{place}": 1 for place in range(20_000)})
    for field in ("prompt", "other"):
        body = parse(CompletionRequest, json.dumps({"prompt": "x", field: text}).encode(), unknown="warn")
        assert body.prompt == (text if field == "prompt" else "x")


@pytest.mark.parametrize("field", ["n", "top_k", "min_tokens"])
def test_endless_numbers_are_not_repeated(field: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(CompletionRequest, b'{"prompt": ["a", "b"], "%s": %s}' % (field.encode(), b"9" * 4300))
    assert refused.value.status == 400 and refused.value.param == field and len(refused.value.message) < 500


@pytest.mark.parametrize("value", ["1e400", "-1e400", "NaN", "Infinity", "1.5", '"5"', "[5]"])
def test_what_is_no_whole_number_gets_the_range(value: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(ChatRequest, f'{{"messages": [{{"role": "user", "content": "x"}}], "max_tokens": {value}}}'.encode())
    assert refused.value.message == "max_tokens must be a whole number from 1 to 2147483647."


def test_a_message_without_content_is_named() -> None:
    with pytest.raises(ApiError) as refused:
        parse(ChatRequest, b'{"messages": [{"role": "user", "content": "x"}, {"role": "user"}]}')
    assert refused.value.message.startswith("messages[1].content is missing, which a message of role 'user' requires.")
    assert refused.value.param == "messages[1].content"


@pytest.mark.parametrize("padding", [0, 2**17])
def test_of_equal_keys_the_last_counts(padding: int) -> None:
    """As in other servers. A large body is parsed in parts, with the same result."""
    raw = b'{"max_tokens": 1, "prompt": "a", "prompt": "b%s", "max_tokens": 2}' % (b"b" * padding)
    body = parse(CompletionRequest, raw)
    assert isinstance(body.prompt, str)
    assert (body.max_tokens, set(body.prompt)) == (2, {"b"})
    ids = ",".join(["7"] * (padding or 1))
    assert parse(CompletionRequest, f'{{"prompt": [1], "prompt": [{ids}]}}'.encode()).prompt == [7] * (padding or 1)


def test_errors_within_a_field_name_the_path() -> None:
    cases: list[tuple[type[Any], dict[str, Any], str]] = [
        (ChatRequest, {"messages": [{"role": "user", "content": "x"}, {"role": 5}]}, "messages[1].role"),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": 5}]}]}, "messages[0].content"),
        (CompletionRequest, {"prompt": "x", "logit_bias": {"7": "x"}}, "logit_bias"),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": [5, -1]}, "stop_token_ids[1]"),
        (CompletionRequest, {"prompt": "x", "response_format": {"type": "grammar"}}, "response_format.type"),
        (TokenizeRequest, {"prompt": "x", "stream": True}, "stream"),
    ]
    for kind, body, path in cases:
        with pytest.raises(ApiError) as caught:
            parse(kind, json.dumps(body).encode())
        assert caught.value.param == path


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.sampled_from([CompletionRequest, ChatRequest, TokenizeRequest]), st.data())
def test_any_object_is_a_body_or_a_client_error(kind: type[Any], data: st.DataObject) -> None:
    names = st.sampled_from(sorted(kind.model_fields)) | st.text(max_size=8)
    body = data.draw(st.dictionaries(names, JSON, max_size=6))
    try:
        parse(kind, json.dumps(body, allow_nan=True).encode("utf-8", "surrogatepass"))
    except ApiError as error:
        assert error.status == 400 and error.message.isprintable() and len(error.message) < 1000
        json.loads(error.body())


@settings(max_examples=100)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_body_or_a_client_error(raw: bytes) -> None:
    with pytest.raises(ApiError):
        parse(CompletionRequest, raw)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors_as_responses() -> None:
    refused = as_api_error(RequestError("top_p", "top_p is 2, expected a number above 0 to 1", "correct the value"))
    assert (refused.status, refused.param, refused.type) == (400, "top_p", "BadRequestError")
    assert refused.message == "top_p is 2, expected a number above 0 to 1. Correct the value."
    full = as_api_error(OverloadedError("prompt", "queue full (8 of 8 waiting)", "retry later"))
    assert full.status == 503 and "Retry-After" in full.headers
    assert as_api_error(EngineError('File "/x/y.py"', "x")).status == 500
    assert as_api_error(ZeroDivisionError("/home/me")).status == 500


def test_errors_reveal_nothing_about_the_machine() -> None:
    text = 'Traceback (most recent call last):\n  File "/home/me/x.py", line 3\nat 0x7f8899aabbcc'
    assert not TELLS.search(scrubbed(text))
    assert not TELLS.search(scrubbed("cannot open /tmp/a/b.json: no such file"))
    assert scrubbed("top_p is 2, expected 0/1, see 0x12") == "top_p is 2, expected 0/1, see 0x12"


# --- long lists -----------------------------------------------------------------------------------------------------

MANY = 40_000
LONG_PROMPTS: list[object] = [
    [5] * MANY,
    [2**70, -1, *range(MANY)],
    [list(range(200))] * 300,
    [[1], [], list(range(MANY))],
    [[]] * MANY,
    [*range(MANY), True],
    [*range(MANY), 1.0],
    [*range(MANY), "a"],
    [*range(MANY), None],
    [*range(MANY), [1]],
    [[1] * MANY, 2],
    ["a" * 100] * 1000,
    "a" * SMALL,
]


@pytest.mark.parametrize("place", range(len(LONG_PROMPTS)))
def test_long_lists_are_read_as_by_pydantic(place: int) -> None:
    """Values and errors are the same as when pydantic reads the whole body."""
    body = {"prompt": LONG_PROMPTS[place], "max_tokens": 3, "user": "é"}
    for raw in (json.dumps(body).encode(), json.dumps(body, indent=1).encode()):
        assert len(raw) > SMALL
        try:
            expected: Any = CompletionRequest.model_validate_json(raw)
        except ValidationError as error:
            with pytest.raises(ApiError) as caught:
                parse(CompletionRequest, raw)
            expected = as_response(error, CompletionRequest)
            assert (caught.value.message, caught.value.param) == (expected.message, expected.param)
        else:
            found = parse(CompletionRequest, raw)
            assert found == expected and found.prompt == LONG_PROMPTS[place]
            assert found.model_fields_set == expected.model_fields_set


@pytest.mark.parametrize("end", [b",]", b",,5]", b"", b"] ]", b"5 5]", b",01]"])
def test_long_lists_that_are_not_json(end: bytes) -> None:
    with pytest.raises(ApiError, match="not valid JSON"):
        parse(CompletionRequest, b'{"prompt": [' + b"5," * MANY + b"6" + end + b"}")


# --- jobs -----------------------------------------------------------------------------------------------------------


def intake(vocab_size: int) -> Preparer:
    limits = Limits(
        vocab_size=vocab_size,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        block_size=8,
        num_blocks=64,
        max_logprobs=4,
    )
    return Preparer(tokenizers.load(TOKENIZER), limits)


def test_a_tokenizer_with_more_tokens_than_the_model() -> None:
    """Added tokens without a row in the embedding: text that contains one is rejected before it reaches a device."""
    small, order = intake(420), Order(name="cmpl-x", add_special_tokens=False)
    with pytest.raises(RequestError, match="prompt contains token id 42"):
        params.prepare(small, ["a<|eot_id|>b"], SamplingParams(), order, field="prompt")
    with pytest.raises(RequestError) as caught:
        params.prepare(small, ["a"], SamplingParams(allowed_token_ids=[420]), order, field="prompt")
    assert caught.value.field == "allowed_token_ids"
    assert params.prepare(small, ["ab"], SamplingParams(), order, field="prompt")


def test_requests_with_the_same_id_are_distinguished() -> None:
    order = Order(name="cmpl-a-b")
    made = params.prepare(intake(426), ["a", "b"], SamplingParams(), order, field="prompt")
    made += params.prepare(intake(426), ["a"], SamplingParams(), order, field="prompt")
    assert [each.id.rpartition("-")[0] for each in made] == ["cmpl-a-b"] * 3
    assert made[0].id != made[1].id


# --- the document ---------------------------------------------------------------------------------------------------


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def test_the_document_describes_every_route() -> None:
    routes = [route for route in all_routes(ui=False)]
    page = json.loads(json.dumps(document(routes)))
    assert page["openapi"] == "3.1.0" and page["info"]["title"] == "jaxserve" and page["info"]["version"]
    reported = {(method.upper(), path) for path, methods in page["paths"].items() for method in methods}
    assert reported == {(route.method, route.path) for route in routes}
    names = [operation["operationId"] for methods in page["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))
    for path, methods in page["paths"].items():
        for operation in methods.values():
            assert set(operation) <= {"summary", "operationId", "parameters", "requestBody", "security", "responses"}
            assert operation["summary"] and "200" in operation["responses"]
            assert all(re.fullmatch("[2-5][0-9][0-9]", status) for status in operation["responses"])
            given = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
            assert given == set(re.findall(r"{(\w+)}", path))
    for reference in _references(page):
        assert reference.removeprefix("#/components/schemas/") in page["components"]["schemas"]


def test_the_document_describes_what_is_accepted() -> None:
    schema = document(all_routes(ui=False))["components"]["schemas"]["CompletionRequest"]
    assert schema["additionalProperties"] is False and schema["required"] == ["prompt"]
    assert schema["properties"]["suffix"]["type"] == "null"
