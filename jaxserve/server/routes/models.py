# SPDX-License-Identifier: Apache-2.0
"""GET /v1/models and /v1/models/NAME: the model names that requests can use."""

from typing import Any

from aiohttp import web

from jaxserve.server.answers.replies import json_response
from jaxserve.server.errors import ApiError
from jaxserve.server.routes.table import Route
from jaxserve.server.state import SERVING, Serving


async def listed(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    return json_response({"object": "list", "data": [_card(serving, name) for name in serving.model_names]})


async def one(request: web.Request) -> web.Response:
    serving, name = request.app[SERVING], "/".join(request.match_info.values())
    if name not in serving.model_names:
        shown = "".join(c if c.isprintable() else "?" for c in name[:80])
        raise ApiError(404, f"The model `{shown}` does not exist.", param="model")
    return json_response(_card(serving, name))


def _card(serving: Serving, name: str) -> dict[str, Any]:
    longest = None if serving.client is None else serving.client.preparer.limits.max_model_len
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "jaxserve",
        "root": serving.model_names[0],
        "parent": None,
        "max_model_len": longest,
        "permission": [],
    }


ROUTES = (
    Route("GET", "/v1/models", listed, summary="List the served models."),
    Route("GET", "/v1/models/{name}", one, summary="Describe a served model."),
    Route("GET", "/v1/models/{owner}/{name}", one, summary="Describe a served model whose name is a Hub ID."),
)
