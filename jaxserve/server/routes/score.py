# SPDX-License-Identifier: Apache-2.0
"""POST /score and /rerank: how well texts belong together.

A model with one score reads both texts in one prompt, by its chat template if that knows the roles `query` and
`document`, else one after the other. Any other model embeds each text, and the score is the cosine of both embeddings.
"""

import time
from dataclasses import replace
from functools import partial
from typing import Any

from aiohttp import web

from jaxserve.errors import RequestError
from jaxserve.frontend.pooling import Pairs, cosines, pair_prompt, paired, texts_of
from jaxserve.frontend.prepare import Preparer
from jaxserve.server import params
from jaxserve.server.answers import vectors
from jaxserve.server.answers.replies import json_response
from jaxserve.server.errors import bad_request
from jaxserve.server.params import Order
from jaxserve.server.protocol.embeddings import Document, RerankRequest, ScoreRequest
from jaxserve.server.routes.table import Route
from jaxserve.server.state import RECORD, SERVING, Serving
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.request import Request


async def score(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    serving.check_ready()
    body = await params.read(request, ScoreRequest)
    pairs = paired(_listed(body.text_1 or body.queries), _listed(body.text_2 or body.documents))
    order = replace(params.order(request, body, kind="score", add_special_tokens=True), embed=True)
    scores, outputs = await _scored(request, pairs, order, names=("text_1", "text_2"))
    return json_response(
        {
            "id": order.name,
            "object": "list",
            "created": int(time.time()),
            "model": params.model_name(serving, body),
            "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)],
            "usage": vectors.usage(outputs),
        }
    )


async def rerank(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    serving.check_ready()
    body = await params.read(request, RerankRequest)
    texts = [each.text if isinstance(each, Document) else each for each in body.documents]
    order = replace(params.order(request, body, kind="rerank", add_special_tokens=True), embed=True)
    scores, outputs = await _scored(
        request, [(body.query, text) for text in texts], order, names=("query", "documents")
    )
    best = sorted(range(len(texts)), key=lambda index: -scores[index])
    results: list[dict[str, Any]] = []
    for index in best[: body.top_n or None]:
        document = {} if body.return_documents is False else {"document": {"text": texts[index]}}
        results.append({"index": index, **document, "relevance_score": scores[index]})
    model = params.model_name(serving, body)
    return json_response({"id": order.name, "model": model, "usage": vectors.usage(outputs), "results": results})


def _listed(texts: str | list[str] | None) -> list[str]:
    return texts if isinstance(texts, list) else [texts or ""]


async def _scored(
    request: web.Request, pairs: Pairs, order: Order, *, names: tuple[str, str]
) -> tuple[list[float], list[RequestOutput]]:
    """The score of each pair. `names`: the fields of its texts."""
    serving = request.app[SERVING]
    preparer, pooling = serving.check_ready().preparer, serving.pooling
    work = partial(serving.workers.run, request[RECORD].body_size)
    if pooling.classifier is not None:
        if not pooling.classifier.scores:
            problem = f"this model assigns {len(pooling.classifier.labels)} labels, and no score"
            raise bad_request(None, problem, "use /classify")
        asked = await work(_of_pairs, serving, preparer, pairs, order, names[1])
        outputs = await vectors.run(request, asked)
        return [float(pooling.probabilities(vectors.hidden_of(output))[0]) for output in outputs], outputs
    pooling.check_embeds()
    order = replace(order, pool=pooling.pool)
    outputs = await vectors.run(request, await work(_of_texts, preparer, pairs, order, names))
    embeddings = [pooling.embedding(vectors.hidden_of(output)) for output in outputs]
    return cosines(pairs, dict(zip(texts_of(pairs), embeddings, strict=True))), outputs


def _of_texts(preparer: Preparer, pairs: Pairs, order: Order, names: tuple[str, str]) -> list[Request]:
    places: dict[str, tuple[str, int | None]] = {}  # where each text is first
    alone = len({first for first, _ in pairs}) == 1  # a query for many documents
    for index, pair in enumerate(pairs):
        for name, text in zip(names, pair, strict=True):
            if not text:
                raise bad_request(name, f"{name} has an empty text", "remove it")
            single = len(pairs) == 1 or (alone and name == names[0])
            places.setdefault(text, (name, None if single else index))
    texts = texts_of(pairs)
    return vectors.prepared(preparer, texts, order, field=names[1], places=[places[text] for text in texts])


def _of_pairs(serving: Serving, preparer: Preparer, pairs: Pairs, order: Order, field: str) -> list[Request]:
    tokenizer = serving.tokenizer
    if tokenizer is None:
        raise bad_request(None, "this server has no tokenizer", "start the server with --tokenizer")
    template = serving.chat_template
    try:
        ids = [pair_prompt(tokenizer, query, document, chat_template=template) for query, document in pairs]
    except RequestError as error:
        raise RequestError(field, error.problem, error.hint) from None
    return vectors.prepared(preparer, ids, order, field=field)


_SCORE = "Score pairs of texts."
_RERANK = "Sort documents by their relevance to a query."

ROUTES = (
    Route("POST", "/score", score, body=ScoreRequest, summary=_SCORE),
    Route("POST", "/v1/score", score, body=ScoreRequest, summary=_SCORE),
    Route("POST", "/rerank", rerank, body=RerankRequest, summary=_RERANK),
    Route("POST", "/v1/rerank", rerank, body=RerankRequest, summary=_RERANK),
    Route("POST", "/v2/rerank", rerank, body=RerankRequest, summary=_RERANK),
)
