# SPDX-License-Identifier: Apache-2.0
"""GET /docs: the OpenAPI document as a page, in one response without scripts or other files."""

import base64
import functools
import hashlib
from collections.abc import Iterator
from html import escape
from typing import Any, cast

from aiohttp import web

from jaxserve.server.routes.openapi import shown_document
from jaxserve.server.routes.table import Route
from jaxserve.server.state import SERVING

type Shape = dict[str, Any]

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
section { border-top: 1px solid #8886; padding: .5rem 0 }
h2 { font-size: 1rem; margin: .5rem 0 } h2 b, code { font-family: ui-monospace, monospace }
h2 b { display: inline-block; min-width: 4.5em } summary { cursor: pointer; margin: .3rem 0 }
table { border-collapse: collapse; width: 100% } pre { overflow: auto; padding: .6rem; background: #8882 }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #8883 }
.quiet { opacity: .7 }
"""
HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


async def page(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    config, admin = serving.config, serving.access.administers
    body = _page(ui=not config.no_ui, admin=admin, root=config.root_path)
    return web.Response(body=body, content_type="text/html", charset="utf-8", headers=HEADERS)


@functools.cache
def _page(*, ui: bool, admin: bool, root: str) -> bytes:
    return html(shown_document(ui=ui, admin=admin, root=root), root).encode()


def html(document: Shape, root: str) -> str:
    """The page of an OpenAPI document."""
    version = document["info"]["version"]
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    links = " · ".join(f'<a href="#{operation["operationId"]}">{escape(path)}</a>' for path, _, operation in operations)
    schemas: Shape = document["components"]["schemas"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>jaxserve API</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><h1>jaxserve {escape(version)}: API</h1>",
        f'<p>The same as an <a href="{root}/openapi.json">OpenAPI document</a>, which needs the API key if one is set.'
        " Requests send it as <code>Authorization: Bearer KEY</code> or <code>X-Api-Key: KEY</code>.</p>",
        f'<p class="quiet">{links}</p>',
        *(_operation(path, method, operation, schemas) for path, method, operation in operations),
        "<h1>Objects</h1>",
        *(_object(name, schema) for name, schema in schemas.items()),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _operation(path: str, method: str, operation: Shape, schemas: Shape) -> str:
    key = "" if operation.get("security") else ' <span class="quiet">(no key)</span>'
    parts = [
        f'<section id="{operation["operationId"]}"><h2><b>{method.upper()}</b> <code>{escape(path)}</code>{key}</h2>'
    ]
    parts.append(f"<p>{escape(operation['summary'])}</p>")
    if parameters := operation.get("parameters"):
        rows = [
            _row(f"{each['name']} ({each['in']})", _type(each["schema"]), each.get("description", ""))
            for each in parameters
        ]
        parts.append(_details("Parameters", _table(rows)))
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body is not None:
        schema = schemas[_target(body)] if "$ref" in body else body
        parts.append(_details("Body", _fields(schema)))
    answers = [_row(status, "", each["description"]) for status, each in operation["responses"].items()]
    parts.append(_details("Responses", _table(answers)))
    return "\n".join([*parts, "</section>"])


def _object(name: str, schema: Shape) -> str:
    about = f"<p>{escape(schema['description'])}</p>" if "description" in schema else ""
    return f'<section id="schema-{escape(name)}"><h2><code>{escape(name)}</code></h2>{about}{_fields(schema)}</section>'


def _fields(schema: Shape) -> str:
    needed = schema.get("required", [])
    properties: Shape = schema.get("properties", {})
    return _table(
        [
            _row(f"{name} (required)" if name in needed else name, _type(each), each.get("description", ""))
            for name, each in sorted(properties.items(), key=lambda item: item[0] not in needed)
        ]
    )


def _details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _table(rows: list[str]) -> str:
    return f"<table>{''.join(rows)}</table>" if rows else '<p class="quiet">No fields.</p>'


def _row(name: str, kind: str, about: str) -> str:
    return f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{escape(about)}</td></tr>"


def _target(reference: Shape) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _type(schema: Shape) -> str:
    """A description of valid values, as HTML."""
    if "$ref" in schema:
        name = escape(_target(schema))
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        kinds = [_type(each) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds)) or "null"
    if "enum" in schema or "const" in schema:
        values: list[object] = schema.get("enum") or [schema["const"]]
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in values)
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return escape(" or ".join(each for each in cast("list[str]", kind) if each != "null"))
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(" ".join([str(kind), *_bounds(schema)]))


def _bounds(schema: Shape) -> Iterator[str]:
    for name, words in (
        ("minimum", "at least {}"),
        ("exclusiveMinimum", "above {}"),
        ("maximum", "at most {}"),
        ("exclusiveMaximum", "below {}"),
    ):
        value = schema.get(name)
        if value is not None and abs(value) < 2**31 - 1:
            yield words.format(value)


ROUTES = (Route("GET", "/docs", page, public=True, summary="This API as a page."),)
