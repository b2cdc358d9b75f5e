# SPDX-License-Identifier: Apache-2.0
"""POST /tokenize and /detokenize: text or messages to token ids, and back."""

from aiohttp import web

from jaxserve.errors import RequestError
from jaxserve.frontend.prepare import Preparer
from jaxserve.server import params
from jaxserve.server.answers.replies import json_response
from jaxserve.server.errors import bad_request
from jaxserve.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from jaxserve.server.routes.chat import prompt_text
from jaxserve.server.routes.table import Route
from jaxserve.server.state import RECORD, SERVING, Serving
from jaxserve.text.tokenizer import Encoded, Tokenizer

# Tokenizing this much takes a second or more. Clients send longer texts in pieces.
MAX_CHARACTERS = 2**20


async def tokenize(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    preparer = serving.check_ready().preparer
    body = await params.read(request, TokenizeRequest)
    size, tokenizer = request[RECORD].body_size, _tokenizer(serving)
    encoded = await serving.workers.run(size, _encoded, serving, tokenizer, body)
    strings, limit = bool(body.return_token_strs), preparer.limits.max_model_len
    return await serving.workers.run_alone(size, _tokens, tokenizer, encoded, strings=strings, limit=limit)


async def detokenize(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    preparer = serving.check_ready().preparer
    body = await params.read(request, DetokenizeRequest)
    return await serving.workers.run(request[RECORD].body_size, _text, serving, preparer, body.tokens)


def _tokenizer(serving: Serving) -> Tokenizer:
    if serving.tokenizer is None:
        raise bad_request(None, "this server has no tokenizer", "start the server with --tokenizer")
    return serving.tokenizer


def _encoded(serving: Serving, tokenizer: Tokenizer, body: TokenizeRequest) -> Encoded:
    field = "messages" if body.prompt is None else "prompt"
    text = prompt_text(serving, body) if body.prompt is None else body.prompt
    if len(text) > MAX_CHARACTERS:
        problem = f"{field} has {len(text)} characters"
        raise bad_request(field, problem, f"send at most {MAX_CHARACTERS} per request")
    special = body.prompt is not None if body.add_special_tokens is None else body.add_special_tokens
    try:
        return tokenizer.encoded(text, add_special_tokens=special)
    except RequestError as error:
        raise RequestError(field, error.problem, error.hint) from None


def _tokens(tokenizer: Tokenizer, encoded: Encoded, *, strings: bool, limit: int) -> web.Response:
    ids = encoded.ids
    names = [tokenizer.token_text(token) for token in ids] if strings else None
    return json_response({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names})


def _text(serving: Serving, preparer: Preparer, ids: list[int]) -> web.Response:
    tokenizer = _tokenizer(serving)
    most = max(MAX_CHARACTERS // 8, preparer.limits.max_model_len)
    if len(ids) > most:
        raise bad_request("tokens", f"tokens has {len(ids)} ids", f"send at most {most} per request")
    known = max(tokenizer.vocab_size, preparer.limits.vocab_size)
    bad = next((token for token in ids if not 0 <= token < known), None)
    if bad is not None:
        shown = bad if abs(bad) < 2**64 else "with more than 64 bits"
        problem = f"tokens contains id {shown}, but valid ids are 0 to {known - 1}"
        raise bad_request("tokens", problem, "send token ids of this model")
    return json_response({"prompt": tokenizer.decode(ids, skip_special_tokens=False)})


ROUTES = (
    Route("POST", "/tokenize", tokenize, body=TokenizeRequest, summary="Tokenize a text or a conversation."),
    Route("POST", "/detokenize", detokenize, body=DetokenizeRequest, summary="Convert token ids to text."),
)
