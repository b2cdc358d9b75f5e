# SPDX-License-Identifier: Apache-2.0
"""Serves the page at /: its few files, from memory, under a policy that lets it talk to this server and nothing else.

It is open to all, as a browser has no key when it opens a page; what the page asks of the API needs one. `static/` has
the page itself. Nothing here knows the engine.
"""

import hashlib
from importlib.resources import files

from aiohttp import ETag, web

from jaxserve.server.routes.table import Handler, Route

# Nothing inline, nothing from elsewhere, nothing evaluated; text that a model writes can never become markup.
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
    # A browser asks each time whether its copy is still good: an upgrade must not mix old files and new.
    "Cache-Control": "no-cache",
}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SCRIPTS = ("app.js", "api.js", "chat.js", "completion.js", "dom.js", "engine.js", "markdown.js", "store.js")
FILES = {"/": "index.html", **{f"/static/{name}": name for name in ("style.css", "icon.svg", *SCRIPTS)}}


def _serve(name: str) -> Handler:
    """Reads the file now: one that is missing stops the start, not a visitor."""
    body = (files("jaxserve.server") / "static" / name).read_bytes()
    tag = ETag(hashlib.sha256(body).hexdigest()[:32])
    content_type = TYPES[name.rpartition(".")[2]]

    async def page(request: web.Request) -> web.StreamResponse:
        # By value: a proxy that compresses marks the tag as weak.
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
