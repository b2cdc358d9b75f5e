# SPDX-License-Identifier: Apache-2.0
"""The start-up banner: the server's URL, its model, and a curl command to try."""

import json
import shlex
import sys

from jaxserve import __version__
from jaxserve.errors import RequestError, one_line
from jaxserve.server.config import KEYS_VARIABLE, ServerConfig
from jaxserve.server.observe import logs
from jaxserve.server.state import Serving


def ready(serving: Serving, url: str, *, everywhere: bool) -> dict[str, str]:
    """The banner's names and values, in order. `everywhere`: the server listens on all addresses of the machine."""
    config, opened = serving.config, serving.engine.opened
    facts = {"model": ", ".join(serving.model_names)}
    if opened is not None:
        facts["kind"] = (
            f"{opened.family}, {opened.layers} layers, {_count(opened.parameters)} parameters, {opened.dtype}"
        )
        limits = opened.limits
        facts["limits"] = f"{limits.max_model_len} tokens per sequence, {limits.max_num_seqs} sequences at once"
    facts["api"] = f"{url}/v1" + (f" on the Unix socket {config.uds}" if config.uds else "")
    if everywhere:
        facts["host"] = f"{config.host}: reachable on all addresses of this machine"
    if not config.no_ui:
        facts["page"] = f"{url}/"
    facts["try"] = _curl(serving, url)
    return facts


def _count(number: int) -> str:
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def _curl(serving: Serving, url: str) -> str:
    """A curl command that works with this model."""
    body: dict[str, object] = {"model": serving.model_names[0]}
    if serving.tokenizer is None:
        path, body["prompt"] = "completions", [1, 2, 3]
    elif _chats(serving):
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello!"}]
    else:
        path, body["prompt"] = "completions", "Once upon a time"
    body["max_tokens"] = 32
    key = f' -H "Authorization: Bearer ${KEYS_VARIABLE}"' if serving.config.keyed else ""
    if serving.config.uds:
        key = f" --unix-socket {shlex.quote(serving.config.uds)}{key}"
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"


def _chats(serving: Serving) -> bool:
    if serving.tokenizer is None:
        return False
    try:
        serving.tokenizer.chat_text([{"role": "user", "content": "Hello!"}], chat_template=serving.chat_template)
    except RequestError:
        return False
    return True


def show(facts: dict[str, str], config: ServerConfig) -> None:
    if config.log_format == "json":
        logs.LOG.info("ready", extra={"fields": facts})
        return
    lines = [f"  {name:<6} {one_line(value, limit=4000)}" for name, value in facts.items()]
    print("\n".join(["", f"jaxserve {__version__} is ready", "", *lines, ""]), file=sys.stderr, flush=True)
