# SPDX-License-Identifier: Apache-2.0
"""Rendered requests generate what the originals do; the API's page describes every route without other files."""

import re
from typing import Any

import pytest

from jaxserve.async_llm import AsyncLLM
from jaxserve.server.routes.docs import STYLE
from jaxserve.server.routes.table import all_routes
from tests.server.routes.checks import check_error
from tests.server.routes.served import Served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def test_a_rendered_chat_generates_the_same(served: Served) -> None:
    sent: dict[str, Any] = {
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 6,
        "stop": ["zz"],
        "logit_bias": {"5": 1},
    }
    made = served.post(f"{CHAT}/render", sent).json
    assert made["token_ids"] == served.post("/tokenize", {"messages": MESSAGES}).json["tokens"]
    params = made["sampling_params"]
    assert (params["temperature"], params["max_tokens"], params["stop"]) == (0, 6, ["zz"])
    assert (params["n"], params["top_p"], params["logprobs"]) == (1, 1, None)
    fields = {name: params[name] for name in ("temperature", "max_tokens", "logit_bias")}
    answer = served.post(COMPLETIONS, {"prompt": made["token_ids"], **fields})
    original = served.post(CHAT, {**sent, "stop": None})
    assert answer.json["choices"][0]["text"] == original.json["choices"][0]["message"]["content"]


def test_the_shape_is_vllms(served: Served) -> None:
    sent = {"prompt": [[7, 8, 9], [5, 6]], "stream": True, "stream_options": {"include_usage": True}, "cache_salt": "a"}
    first, second = served.post(f"{COMPLETIONS}/render", {**sent, "model": "tiny", "priority": 3}).json
    assert (first["token_ids"], second["token_ids"]) == ([7, 8, 9], [5, 6])
    assert first["request_id"].startswith("cmpl-") and first["sampling_params"]["max_tokens"] == 16
    for made in (first, second):
        assert {name: made[name] for name in made if name not in ("request_id", "token_ids", "sampling_params")} == {
            **{"features": None, "model": "tiny", "stream": True, "stream_options": {"include_usage": True}},
            **{"cache_salt": "a", "priority": 3, "token_offsets": None},
        }
    free = served.post(f"{CHAT}/render", {"messages": MESSAGES})
    assert free.json["sampling_params"]["max_tokens"] == 128 - len(free.json["token_ids"])
    assert served.in_flight() == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": MESSAGES, "use_beam_search": True}, "use_beam_search"),
        (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
        (COMPLETIONS, {"prompt": [5] * 200}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "temperature": 3}, "temperature"),
    ],
)
def test_what_is_refused_is_refused_here_too(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    check_error(served.post(f"{path}/render", body), 400, param)


def test_the_page_describes_every_route(served: Served) -> None:
    reply = served.get("/docs")
    assert reply.status == 200 and reply.headers["content-type"] == "text/html; charset=utf-8"
    text = reply.body.decode()
    document = served.get("/openapi.json").json
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<b>{method.upper()}</b> <code>{path}</code>" in text
    assert {route.path for route in all_routes(ui=False) if route.scope != "admin"} <= document["paths"].keys()
    for name, field in document["components"]["schemas"]["ChatRequest"]["properties"].items():
        assert f"<code>{name}</code>" in text or f"<code>{name} (required)</code>" in text, field
    anchors = set(re.findall(r'id="([^"]+)"', text))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= anchors
    assert "at least 1 at most" in text or "at least 1" in text


def test_the_page_needs_no_other_file(served: Served) -> None:
    reply = served.get("/docs")
    text = reply.body.decode()
    assert not re.search(r"<script|<img|<link|\ssrc=|\son\w+=|\sstyle=|https?://|url\(", text)
    assert text.count("<style>") == 1 and f"<style>{STYLE}</style>" in text
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert set(re.findall(r'href="(?!#)([^"]+)"', text)) == {"/openapi.json"}


def test_the_page_behind_a_proxy(async_llm: AsyncLLM) -> None:
    with Served(async_llm, root_path="/llm", no_ui=True, api_key=("secret",)) as server:
        text = server.get("/llm/docs/").body.decode()
        assert 'href="/llm/openapi.json"' in text and "<code>/</code>" not in text
