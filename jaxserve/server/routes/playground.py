# SPDX-License-Identifier: Apache-2.0
"""Serves the playground page at / from memory, under a Content-Security-Policy that allows only this server.

The files in `static/` need no API key, because a browser sends none when it opens a page; the page's API calls do.
"""

import hashlib
from importlib.resources import files

from aiohttp import ETag, web

from jaxserve.server.routes.table import Handler, Route

# No inline code, no other origin, no eval. Trusted types: model output can never become markup.
POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        *("require-trusted-types-for 'script'", "trusted-types 'none'"),
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Browsers revalidate each time, so that an upgrade never mixes old and new files.
    "Cache-Control": "no-cache",
}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SCRIPTS = ("app.js", "api.js", "chat.js", "completion.js", "dom.js", "engine.js", "markdown.js", "store.js")
FILES = {"/": "index.html", **{f"/static/{name}": name for name in ("style.css", "icon.svg", *SCRIPTS)}}


def _serve(name: str) -> Handler:
    """Read the file now, so that a missing one fails at start-up."""
    body = (files("jaxserve.server") / "static" / name).read_bytes()
    tag = ETag(hashlib.sha256(body).hexdigest()[:32])
    content_type = TYPES[name.rpartition(".")[2]]

    async def page(request: web.Request) -> web.StreamResponse:
        # Compare values only: a compressing proxy marks the tag as weak.
        if tag.value in (known.value for known in request.if_none_match or ()):
            response = web.Response(status=304, headers=HEADERS)
        else:
            response = web.Response(body=body, content_type=content_type, charset="utf-8", headers=HEADERS)
        response.etag = tag
        return response

    return page


ROUTES = tuple(
    Route("GET", path, _serve(name), public=True, summary=f"The playground: {name}.") for path, name in FILES.items()
)
