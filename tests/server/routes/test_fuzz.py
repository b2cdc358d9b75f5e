# SPDX-License-Identifier: Apache-2.0
"""Bodies drawn from the OpenAPI document, and bodies close to them: none causes a server error."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.routes.checks import Canary, check_error
from tests.server.routes.served import Served

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize")
SMALL = 8  # what lists and texts have at most


def drawn(schema: dict[str, Any], parts: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a JSON schema, for the kinds of schema that pydantic writes."""
    if "$ref" in schema:
        return drawn(parts[schema["$ref"].rpartition("/")[2]], parts)
    if "anyOf" in schema:
        return st.one_of([drawn(each, parts) for each in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            low, high = schema.get("minimum"), schema.get("maximum", schema.get("exclusiveMaximum", 2**63 + 1) - 1)
            near = st.integers(max(low if low is not None else -3, -3), min(high, 12)) if high >= -3 else st.nothing()
            return near | st.integers(low, high)
        case "number":
            return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=SMALL)
        case "array":
            return st.lists(drawn(schema.get("items", {}), parts), min_size=schema.get("minItems", 0), max_size=3)
        case "object" if "properties" in schema:
            members, needed = schema["properties"], schema.get("required", [])
            return st.tuples(
                st.fixed_dictionaries({name: drawn(members[name], parts) for name in needed}),
                _some({name: drawn(each, parts) for name, each in members.items() if name not in needed}),
            ).map(lambda both: {**both[1], **both[0]})
        case "object":
            values = schema.get("additionalProperties")
            inner = drawn(values if isinstance(values, dict) else {}, parts)
            return st.dictionaries(st.text(max_size=SMALL), inner, max_size=3)
        case _:
            return st.none() | st.booleans() | st.integers() | st.text(max_size=SMALL)


@st.composite
def _some(draw: st.DrawFn, more: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    """Some of the optional members."""
    names = draw(st.lists(st.sampled_from(sorted(more)), max_size=4, unique=True)) if more else []
    return {name: draw(more[name]) for name in names}


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=SMALL) | st.lists(st.integers())


def bodies(page: dict[str, Any]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """A path and a body: valid by its schema, or with one invalid member."""
    parts, found = page["components"]["schemas"], list[st.SearchStrategy[tuple[str, dict[str, Any]]]]()
    for path, methods in page["paths"].items():
        if path in PATHS:
            content = methods["post"]["requestBody"]["content"]
            body = drawn(content["application/json"]["schema"], parts)
            names = sorted(parts[content["application/json"]["schema"]["$ref"].rpartition("/")[2]]["properties"])
            wrong = st.dictionaries(st.sampled_from([*names, "more"]), ANYTHING, min_size=1, max_size=1)
            near = st.tuples(body, wrong).map(lambda both: {**both[0], **both[1]})
            found.append(st.tuples(st.just(path), body.map(bounded) | near))
    assert len(found) == len(PATHS)
    return st.one_of(found)


def bounded(body: dict[str, Any]) -> dict[str, Any]:
    """Set the served model and small lengths: long answers find no more faults."""
    limits: dict[str, Any] = {"model": "tiny"} if isinstance(body.get("model"), str | None) else {}
    if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 2:
        limits["max_tokens"] = 2
    return {**body, **limits}


def test_no_body_causes_a_server_error(served: Served) -> None:
    page = served.send("GET", "/openapi.json").json

    @settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
    @given(bodies(page))
    def fuzz(sent: tuple[str, dict[str, Any]]) -> None:
        path, body = sent
        reply = served.post(path, json.dumps(body).encode("utf-8", "surrogatepass"))
        assert reply.status < 500, reply.body
        assert str(reply.status) in page["paths"][path]["post"]["responses"]
        if reply.status != 200:
            check_error(reply, reply.status)
        elif reply.headers["content-type"].startswith("text/event-stream"):
            *chunks, done = reply.events
            assert done == "[DONE]" and not any("error" in chunk for chunk in chunks)

    with Canary(served):
        fuzz()
    assert served.in_flight() == 0
