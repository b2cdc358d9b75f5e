# SPDX-License-Identifier: Apache-2.0
"""What each client sends by default is served, or refused by an error that says what is missing."""

import pytest

from tests.clients.bodies import Sent, sent
from tests.server.live import Reply
from tests.server.routes.checks import check_error
from tests.server.routes.served import Served

SENT = [*sent()]
# By shape, else by client and shape: the status, and the field that the error names.
REFUSED: dict[str, tuple[int, str | None]] = {
    "json_schema": (400, "response_format"),
    "tools": (400, "tools"),
    "agent": (400, "tools"),
    "image": (400, "messages"),
    "codex-responses": (404, None),
    "claude_code-messages": (404, None),
    "claude_code-count_tokens": (404, None),
    "lm_eval_harness-local_completions": (404, None),  # /tokenizer_info; it falls back to its own tokenizer
}
IGNORED = {"codex-models": "client_version"}  # the header of those that are served without something


def refusal(request: Sent) -> tuple[int, str | None] | None:
    if request.file == "lm_eval_harness" and request.path != "/tokenizer_info":
        return None
    return REFUSED.get(str(request)) or REFUSED.get(request.shape)


def ask(served: Served, request: Sent) -> Reply:
    return served.send(request.method, request.path, request.fitted, request.headers)


@pytest.mark.parametrize("request_", SENT, ids=str)
def test_each_is_served_or_refused_by_name(served: Served, request_: Sent) -> None:
    reply, refused = ask(served, request_), refusal(request_)
    if refused is not None:
        error = check_error(reply, *refused)
        assert (
            refused[0] == 404
            or "not supported" in error["message"]
            or "only text" in error["message"]
            or (error["message"] == 'response_format.type must be "text".')
        )
        return
    if request_.path == "/health":
        assert reply.status == 200
        return
    assert reply.status == 200, reply.body
    assert reply.headers.get("x-jaxserve-ignored") == IGNORED.get(str(request_))
    if (request_.body or {}).get("stream"):
        check_stream(reply, request_)
    elif "/completions" in request_.path:
        assert all(choice["finish_reason"] for choice in reply.json["choices"])
    else:
        assert reply.json["data"]


def check_stream(reply: Reply, request: Sent) -> None:
    *chunks, end = reply.events
    assert end == "[DONE]"
    assert any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"])
    options = (request.body or {}).get("stream_options") or {}
    assert ("usage" in chunks[-1] and chunks[-1]["usage"] is not None) == bool(options.get("include_usage"))


def test_every_kind_of_client_is_here() -> None:
    files = {request.file for request in SENT}
    assert files >= {
        *("openai_sdk", "langchain", "litellm_sdk", "openai_agents", "lm_eval_harness", "guidellm_benchmark"),
        *("aider_chat", "open_webui", "continue", "codex", "claude_code", "vllm_bench"),
    }
    assert {request.client.rpartition(" ")[2][:1].isdigit() for request in SENT} == {True}


def test_every_refusal_is_of_a_request_that_is_here() -> None:
    """A client that no longer sends it, or a server that has learned it, must show."""
    used = {str(request) for request in SENT} | {request.shape for request in SENT}
    assert {*REFUSED, *IGNORED} <= used
