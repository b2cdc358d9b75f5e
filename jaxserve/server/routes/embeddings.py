# SPDX-License-Identifier: Apache-2.0
"""POST /v1/embeddings, /pooling and /classify: what the model makes of each input's hidden states.

An embedding is pooled and normalized as the model's folder says; without `modules.json` it is the last token's hidden
state, normalized to unit length. A sequence-classification model gives probabilities of its labels.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from jaxserve.frontend.pooling import Classifier, Pooling
from jaxserve.frontend.prepare import Preparer
from jaxserve.server import params
from jaxserve.server.answers import vectors
from jaxserve.server.answers.replies import encode, json_response
from jaxserve.server.errors import bad_request
from jaxserve.server.params import Order
from jaxserve.server.protocol.completion import as_list
from jaxserve.server.protocol.embeddings import ClassifyRequest, EmbeddingRequest, PoolingRequest
from jaxserve.server.routes.table import Route
from jaxserve.server.state import RECORD, SERVING, Serving
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.request import Request


async def create(request: web.Request) -> web.Response:
    return await _answered(request, EmbeddingRequest, kind="embd", name="embedding")


async def pool(request: web.Request) -> web.Response:
    return await _answered(request, PoolingRequest, kind="pool", name="pooling")


async def classify(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    preparer = serving.check_ready().preparer
    body = await params.read(request, ClassifyRequest)
    classifier = classifier_of(serving)
    order = replace(params.order(request, body, kind="classify", add_special_tokens=True), embed=True)
    work = partial(serving.workers.run, request[RECORD].body_size)
    outputs = await vectors.run(request, await work(_prepared, preparer, body.input, order))

    def reply() -> web.Response:
        data = _classes(serving.pooling, classifier, outputs)
        return json_response(_listed(serving, body, order, data, outputs))

    return await work(reply)


async def _answered(
    request: web.Request, body_type: type[EmbeddingRequest | PoolingRequest], *, kind: str, name: str
) -> web.Response:
    """An answer with a vector for each input."""
    serving = request.app[SERVING]
    preparer = serving.check_ready().preparer
    body = await params.read(request, body_type)
    classifies = name == "pooling" and serving.pooling.classifier is not None
    if not classifies:
        serving.pooling.check_embeds()
    order = params.order(request, body, kind=kind, add_special_tokens=True)
    order = replace(order, embed=True, pool="last" if classifies else serving.pooling.pool)
    dimensions = serving.pooling.dimensions_of(body.dimensions, preparer.limits.hidden_size)
    work = partial(serving.workers.run, request[RECORD].body_size)
    outputs = await vectors.run(request, await work(_prepared, preparer, body.input, order))

    def reply() -> web.Response:
        pooling, found = serving.pooling, list[msgspec.Raw]()  # encoded one by one: other threads run in between
        for index, output in enumerate(outputs):
            hidden = vectors.hidden_of(output)
            vector = pooling.probabilities(hidden) if classifies else pooling.embedding(hidden, dimensions=dimensions)
            content = "embedding" if name == "embedding" else "data"
            item = {"object": name, "index": index, content: vectors.shown(vector, body.encoding_format)}
            found.append(msgspec.Raw(encode(item)))
        return json_response(_listed(serving, body, order, found, outputs))

    return await work(reply)


def _listed(
    serving: Serving,
    body: EmbeddingRequest | PoolingRequest | ClassifyRequest,
    order: Order,
    data: Sequence[dict[str, Any] | msgspec.Raw],
    outputs: list[RequestOutput],
) -> dict[str, Any]:
    return {
        "id": order.name,
        "object": "list",
        "created": int(time.time()),
        "model": params.model_name(serving, body),
        "data": data,
        "usage": vectors.usage(outputs),
    }


def classifier_of(serving: Serving) -> Classifier:
    found = serving.pooling.classifier
    if found is None:
        problem = "this model has no classification head"
        raise bad_request(None, problem, "serve a sequence-classification model, or use /v1/embeddings")
    return found


def _prepared(preparer: Preparer, inputs: str | list[str] | list[int] | list[list[int]], order: Order) -> list[Request]:
    prompts = as_list(inputs)
    if not prompts:
        raise bad_request("input", "input is an empty list", "send at least one item")
    return vectors.prepared(preparer, prompts, order, field="input")


def _classes(pooling: Pooling, classifier: Classifier, outputs: list[RequestOutput]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for index, output in enumerate(outputs):
        probabilities = pooling.probabilities(vectors.hidden_of(output))
        label = classifier.label(probabilities)
        count = len(classifier.labels)
        found.append({"index": index, "label": label, "probs": probabilities.tolist(), "num_classes": count})
    return found


ROUTES = (
    Route("POST", "/v1/embeddings", create, body=EmbeddingRequest, summary="Create embeddings."),
    Route("POST", "/pooling", pool, body=PoolingRequest, summary="Create embeddings, or probabilities of labels."),
    Route("POST", "/classify", classify, body=ClassifyRequest, summary="Probabilities of a classifier's labels."),
)
