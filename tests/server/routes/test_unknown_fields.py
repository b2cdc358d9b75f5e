# SPDX-License-Identifier: Apache-2.0
"""What clients send beside what the server knows: served and reported, refused, or ignored, as the server is set."""

import json
import logging
from typing import Any

import pytest

from jaxserve.async_llm import AsyncLLM
from jaxserve.server.unknown_fields import MOST_LOGGED, MOST_SHOWN
from tests.server.routes.checks import check_error
from tests.server.routes.served import Served

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
HEADER = "x-jaxserve-ignored"
HELLO = [{"role": "user", "content": "hello"}]


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hello", "max_tokens": 2, "temperature": 0, "ignore_eos": True, **fields}


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [*messages] or HELLO, "max_tokens": 2, "temperature": 0, **fields}


UNKNOWN: list[tuple[str, dict[str, Any], str, str]] = [  # path, body, the header, the field that a strict server names
    (COMPLETIONS, completion(max_tokenz=1), "max_tokenz", "max_tokenz"),
    (COMPLETIONS, completion(new=None), "new", "new"),
    (COMPLETIONS, completion(**{"": 1}), "?", ""),
    (COMPLETIONS, completion(**{"a b,c": 1}), "a?b?c", "a b,c"),
    (COMPLETIONS, completion(zeta=1, alpha={"x": [1]}), "zeta,alpha", "zeta"),
    (COMPLETIONS, completion(session_id="x"), "session_id", "session_id"),
    (
        COMPLETIONS,
        completion(stream=True, stream_options={"include_usag": True}),
        "stream_options.include_usag",
        "stream_options",
    ),
    (
        CHAT,
        chat(HELLO[0] | {"id": "1"}, HELLO[0] | {"id": "2", "contnt": "x"}),
        "messages.id,messages.contnt",
        "messages",
    ),
    (CHAT, chat(media_io_kwargs={"image": {}}, stream=True), "media_io_kwargs", "media_io_kwargs"),
    (EMBEDDINGS, {"input": "hello", "temperature": 1}, "temperature", "temperature"),
    ("/tokenize", {"prompt": "hello", "stream": True}, "stream", "stream"),
    ("/tokenize", {"prompt": "hello " * 20_000, "new": 1}, "new", "new"),
    ("/reset_prefix_cache", {"device": 0}, "device", "device"),
]


@pytest.mark.parametrize(("path", "body", "names", "param"), UNKNOWN, ids=lambda value: json.dumps(value)[:40])
def test_unknown_fields_are_served_and_reported(
    served: Served, strict: Served, path: str, body: dict[str, Any], names: str, param: str
) -> None:
    if path != "/reset_prefix_cache":  # which this engine in a thread does not have
        reply = served.post(path, body)
        assert reply.status == 200, reply.body
        assert reply.headers[HEADER] == names
        without = served.post(path, {name: body[name] for name in body if name not in names.split(",")})
        assert HEADER not in without.headers or "messages" in names or "." in names or "?" in names
    check_error(strict.post(path, body), 400, param or None)


def test_the_answer_is_that_without_the_unknown_fields(served: Served) -> None:
    known, more = completion(max_tokens=8), completion(max_tokens=8, unheard_of={"temperature": 2})
    texts = [served.post(COMPLETIONS, body).json["choices"][0]["text"] for body in (known, more)]
    assert texts[0] == texts[1]
    plain, other = (served.post(COMPLETIONS, {**body, "stream": True}) for body in (known, more))
    assert plain.events[-1] == other.events[-1] == "[DONE]"
    assert (plain.headers.get(HEADER), other.headers.get(HEADER)) == (None, "unheard_of")


def test_each_name_is_logged_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "jaxserve.server"):
        for body in (completion(max_tokenzz=1), completion(max_tokenzz=2, once_more=1)):
            served.post(COMPLETIONS, body)
    lines = [record.getMessage() for record in caplog.records if "ignored the unknown" in record.getMessage()]
    assert lines == [
        "ignored the unknown field max_tokenzz of /v1/completions; did you mean max_tokens?",
        "ignored the unknown field once_more of /v1/completions; later ones are not logged",
    ]


def test_many_names_fill_neither_the_log_nor_the_header(async_llm: AsyncLLM, caplog: pytest.LogCaptureFixture) -> None:
    body = completion(**{f"unheard_of_{place}": 1 for place in range(900)})
    with Served(async_llm) as server, caplog.at_level(logging.WARNING, "jaxserve.server"):
        header = server.post(COMPLETIONS, body).headers[HEADER]
        assert len(header.split(",")) == MOST_SHOWN + 1 and header.endswith(f"+{900 - MOST_SHOWN}")
        server.post(COMPLETIONS, completion(**{"x" * 70_000: 1}))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("jaxserve")]
    assert len([line for line in ours if "unheard_of_" in line]) == MOST_LOGGED
    assert all(len(line) < 300 for line in ours)


def test_unknown_fields_are_ignored_silently_on_request(async_llm: AsyncLLM, caplog: pytest.LogCaptureFixture) -> None:
    with Served(async_llm, unknown_fields="ignore") as server, caplog.at_level(logging.WARNING, "jaxserve.server"):
        for path in (COMPLETIONS, f"{COMPLETIONS}?unheard=1"):
            reply = server.post(path, completion(max_tokenz=1))
            assert reply.status == 200 and HEADER not in reply.headers
    assert not caplog.records


def test_a_strict_server_suggests_a_name(strict: Served) -> None:
    error = check_error(strict.post(COMPLETIONS, completion(max_token=1)), 400, "max_token")
    assert error["message"] == "Unknown field: max_token. Did you mean max_tokens?"
    error = check_error(strict.post(COMPLETIONS, completion(xyzzy=1)), 400, "xyzzy")
    assert "--unknown-fields warn" in error["message"]
    error = check_error(strict.post(COMPLETIONS, completion(session_id="x")), 400, "session_id")
    assert error["message"].startswith("session_id has no effect.")


# --- known names whose value asks for nothing -----------------------------------------------------------------------

NEUTRAL: list[dict[str, Any]] = [
    {"suffix": ""},
    {"best_of": 1},
    {"max_tokens": 2.0},
    {"n": 1.0, "top_k": 5.0, "seed": 1.0, "min_tokens": 0.0, "logprobs": 1.0},
    {"response_format": {"type": "text"}},
    {"logit_bias": {}},
    {"stop": []},
    {"vllm_xargs": {}, "kv_transfer_params": {}, "logits_processors": []},
    {"prompt_embeds": ""},
]
NEUTRAL_CHAT: list[dict[str, Any]] = [
    {"tools": []},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tool_choice": "none"},
    {"functions": [], "function_call": "auto"},
    {"function_call": "none"},
    {"reasoning_effort": "none", "verbosity": "medium"},
    {"max_tokens": 2.0, "max_completion_tokens": 2.0, "logprobs": True, "top_logprobs": 1.0},
    {"response_format": {"type": "text"}, "modalities": ["text"]},
    {"documents": [], "store": False, "metadata": {}, "user": ""},
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "hello", "type": "text"},
    {"role": "user", "content": "hello", "type": "message", "name": "someone"},
    {"role": "assistant", "content": "x", "tool_calls": [], "annotations": [], "refusal": None, "audio": None},
    {"role": "assistant", "content": "x", "function_call": None, "provider_specific_fields": None},
    {"role": "assistant", "content": "x", "provider_specific_fields": {"refusal": None}, "reasoning_content": None},
    {"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}], "refusal": ""},
    {"role": "assistant", "content": "x", "reasoning_content": "hm", "reasoning": "hm"},
    {"role": "assistant", "content": None, "tool_calls": [], "tool_call_id": ""},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=json.dumps)
def test_neutral_values_of_completions(strict: Served, fields: dict[str, Any]) -> None:
    reply = strict.post(COMPLETIONS, {**completion(), **fields})
    assert reply.status == 200, reply.body
    assert reply.json["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("fields", NEUTRAL_CHAT, ids=json.dumps)
def test_neutral_values_of_chats(strict: Served, fields: dict[str, Any]) -> None:
    assert strict.post(CHAT, chat(**fields)).status == 200


@pytest.mark.parametrize("message", MESSAGES, ids=json.dumps)
def test_histories_from_other_servers(strict: Served, message: dict[str, Any]) -> None:
    reply = strict.post(CHAT, chat(*HELLO, message, *HELLO))
    assert reply.status == 200, reply.body


def test_what_changes_the_answer_is_refused(served: Served) -> None:
    """Even where unknown fields are ignored."""
    for fields in ({"guided_json": {}}, {"web_search_options": {}}, {"tool_choice": "required"}, {"max_tokens": 2.5}):
        [name] = fields
        if name != "web_search_options" and name != "tool_choice":
            check_error(served.post(COMPLETIONS, {**completion(), **fields}), 400, name)
        check_error(served.post(CHAT, chat(**fields)), 400, name)
    for message in ({"tool_calls": [{"id": "x"}]}, {"refusal": "no"}, {"audio": {"id": "x"}}):
        check_error(served.post(CHAT, chat({"role": "assistant", "content": "x", **message})), 400, "messages")
    for kind in ("image_url", "input_audio", "file"):
        part = {"type": kind, kind: {"url": "data:"}}
        check_error(served.post(CHAT, chat({"role": "user", "content": [part]})), 400, "messages")


def test_templates_read_what_the_model_thought_before(async_llm: AsyncLLM) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content or '-' }}{{ m.reasoning or '-' }}{% endfor %}"
    with Served(async_llm, chat_template=template) as server:
        for name in ("reasoning", "reasoning_content"):
            sent = chat(*HELLO, {"role": "assistant", "content": "x", name: "hm"}, return_prompt_text=True)
            assert server.post(CHAT, sent).json["prompt_text"] == "--hmhm"


# --- addresses ------------------------------------------------------------------------------------------------------


def test_unknown_query_parameters(served: Served, strict: Served) -> None:
    reply = served.get("/v1/models?client_version=0.60.1")
    assert reply.status == 200 and reply.headers[HEADER] == "client_version"
    assert [model["id"] for model in reply.json["data"]] == [
        model["id"] for model in served.get("/v1/models").json["data"]
    ]
    reply = served.post(f"{CHAT}?beta=true", chat(new=1))
    assert reply.status == 200 and reply.headers[HEADER] == "beta,new"
    check_error(strict.get("/v1/models?client_version=0.60.1"), 400)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tiny", "/v1/models/owner/other-name", "/health", "/version"]
)
def test_trailing_slashes(served: Served, path: str) -> None:
    plain, slashed = served.get(path), served.get(f"{path}/")
    assert (slashed.status, slashed.body) == (plain.status, plain.body) and plain.status == 200


def test_routes_behind_a_proxy_that_keeps_its_prefix(async_llm: AsyncLLM) -> None:
    with Served(async_llm, root_path="/llm/", api_key=("secret",)) as server:
        for path in ("/v1/models", "/llm/v1/models", "/llm/v1/models/"):
            assert server.get(path).status == 401
            assert server.get(path, Authorization="Bearer secret").json["data"][0]["id"] == "tiny"
        assert server.get("/llm/health").status == 200 and b"<html" in server.get("/llm/").body
        for path in ("/llmv1/models", "/other/v1/models", "/llm/llm/v1/models"):
            assert server.get(path, Authorization="Bearer secret").status == 404
        document = server.get("/llm/openapi.json", Authorization="Bearer secret").json
        assert document["servers"] == [{"url": "/llm"}] and "/v1/models" in document["paths"]


def test_routes_that_are_not_logged(async_llm: AsyncLLM, caplog: pytest.LogCaptureFixture) -> None:
    quiet = ("/v1/completions, /tokenize",)
    with Served(async_llm, disable_access_log_for=quiet) as server, caplog.at_level(logging.INFO, "jaxserve.server"):
        for path, body in ((COMPLETIONS, completion()), ("/tokenize", {"prompt": "x"}), (CHAT, chat())):
            assert server.post(path, body).status == 200
    assert [record.getMessage() for record in caplog.records] == ["POST /v1/chat/completions"]


def test_a_trailing_slash_after_an_address_with_a_body(served: Served) -> None:
    assert served.post(f"{COMPLETIONS}/", completion()).status == 200
    check_error(served.send("PUT", f"{COMPLETIONS}/"), 405)
