# SPDX-License-Identifier: Apache-2.0
"""Access control: every route with and without keys, foreign hosts and pages, and attempts to bypass it."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.server.http.api_keys import SCOPES
from jaxserve.server.routes.table import Route, all_routes
from tests.server.live import answer
from tests.server.shell import Shell

KEY = "correct horse"
ROUTES = all_routes(ui=True)
PUBLIC = {"/health", "/live", "/ping", "/", "/docs"}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Shell]:
    with Shell(api_key=(KEY, "second")) as server:
        yield server


@pytest.fixture(scope="module")
def keyless() -> Iterator[Shell]:
    with Shell() as server:
        yield server


@pytest.fixture(scope="module")
def everywhere() -> Iterator[Shell]:
    with Shell(host="0.0.0.0", allowed_hosts=("models.example",)) as server:
        yield server


def path_of(route: Route) -> str:
    return route.path.replace("{", "").replace("}", "")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_requires_a_key(keyed: Shell, route: Route) -> None:
    public = route.path in PUBLIC or route.path.startswith("/static/")
    assert route.public == public
    path = path_of(route)
    for header in (
        None,
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer schlüssel",
        "Bearer \udcff\udcfe",
        f"Bearer {KEY},second",
    ):
        raw: dict[str, Any] = {} if header is None else {"Authorization": header.encode("utf-8", "surrogateescape")}
        reply = keyed.send(route.method, path, b"{}", {"Content-Type": "application/json", **raw})
        if public:
            assert reply.status in (200, 503), header
        else:
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key"), header
            assert reply.headers["www-authenticate"] == "Bearer"
    for header in (f"Bearer {KEY}", "bearer second", f"BEARER  {KEY} "):
        reply = keyed.send(route.method, path, b"{}", {"Content-Type": "application/json", "Authorization": header})
        assert reply.status != 401, header


def test_a_key_in_x_api_key_is_accepted(keyed: Shell) -> None:
    """Clients of Anthropic's API send it there; some send a placeholder in Authorization beside it."""
    for headers in ({"X_Api_Key": KEY}, {"X_Api_Key": "second"}, {"X_Api_Key": KEY, "Authorization": "Bearer none"}):
        assert keyed.get("/version", **headers).status == 200, headers
    for headers in ({"X_Api_Key": ""}, {"X_Api_Key": "wrong"}, {"X_Api_Key": f"Bearer {KEY}"}):
        assert keyed.get("/version", **headers).status == 401, headers


def test_unknown_routes_require_a_key_too(keyed: Shell) -> None:
    for method, path in (("GET", "/nothing"), ("PUT", "/health"), ("DELETE", "/v1/models"), ("OPTIONS", "/metrics")):
        assert keyed.send(method, path).status == 401
    assert keyed.get("/nothing", Authorization=f"Bearer {KEY}").error["type"] == "NotFoundError"


@pytest.mark.parametrize(
    "line",
    [
        "GET //version HTTP/1.1\r\nHost: localhost",
        "GET ///version HTTP/1.1\r\nHost: localhost",
        "GET /%76ersion HTTP/1.1\r\nHost: localhost",
        "GET /health/../version HTTP/1.1\r\nHost: localhost",
        "GET /health/%2e%2e/version HTTP/1.1\r\nHost: localhost",
        "GET /health/..;/version HTTP/1.1\r\nHost: localhost",
        "GET /version/ HTTP/1.1\r\nHost: localhost",
        "GET /version?/health HTTP/1.1\r\nHost: localhost",
        "GET /version#/health HTTP/1.1\r\nHost: localhost",
        "GET /version;/health HTTP/1.1\r\nHost: localhost",
        "GET http://x/version HTTP/1.1\r\nHost: localhost",
        "GET http://x/health/../version HTTP/1.1\r\nHost: localhost",
        "GET /version HTTP/1.1\r\nHost: localhost/health?",
        "GET /version HTTP/1.1\r\nHost: localhost/health#",
        "GET /version HTTP/1.1\r\nHost: localhost#/health",
        "GET /version HTTP/1.1\r\nHost: user@localhost",
        "GET /version HTTP/1.1\r\nHost: localhost\r\nHost: /health",
        "GET /version HTTP/1.1\r\nHost: localhost\r\nX-Original-URL: /health",
        "GET /version HTTP/1.1\r\nHost: localhost\r\nX-HTTP-Method-Override: HEAD",
        "HEAD /version HTTP/1.1\r\nHost: localhost",
        "GET /version HTTP/1.0",
        "GET \\version HTTP/1.1\r\nHost: localhost",
        "OPTIONS /version HTTP/1.1\r\nHost: localhost\r\nOrigin: http://a\r\nAccess-Control-Request-Method: GET",
        "CONNECT localhost:80 HTTP/1.1\r\nHost: localhost",
        "GET /version HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade",
    ],
)
def test_keys_cannot_be_bypassed(keyed: Shell, line: str) -> None:
    reply = keyed.raw(f"{line}\r\nConnection: close\r\n\r\n".encode())
    assert reply.status in (400, 401, 403, 404), reply.body


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]", "[::1]:8000", "LOCALHOST", ""])
def test_our_names(keyless: Shell, host: str) -> None:
    # An empty one is HTTP/1.0's, which no browser speaks.
    expected = 200 if host else 403
    assert keyless.raw(f"GET /version HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).status == expected


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("attacker.example", 403),
        ("127.0.0.1.attacker.example", 403),
        ("localhost.attacker.example:8000", 403),
        ("attacker.example:8000", 403),
        ("localhost/health?", 400),
        ("localhost#", 400),
        ("a b", 400),
        ("localhost:8000:9000", 400),
        ("localhost:", 400),
    ],
)
def test_foreign_names(keyless: Shell, host: str, status: int) -> None:
    for path in ("/version", "/health", "/"):
        reply = keyless.raw(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert reply.status == status
        assert reply.error


def test_allowed_hosts() -> None:
    with Shell(allowed_hosts=("Models.Example",)) as server:
        assert server.get("/version", Host="models.example:443").status == 200
        assert server.get("/version", Host="localhost").status == 200
        assert server.get("/version", Host="other.example").status == 403
    with Shell(allowed_hosts=("*",)) as server:
        assert server.get("/version", Host="other.example").status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("192.0.2.7:8000", 200),
        ("[2001:db8::1]:8000", 200),
        ("localhost:8000", 200),
        ("models.example", 200),
        ("attacker.example:8000", 403),  # whose name now leads here
        ("192.0.2.7.attacker.example", 403),
        ("3221225991", 403),
        ("0xc0.0.2.7", 403),
        ("192.0.2", 403),
    ],
)
def test_a_rebound_name_does_not_reach_a_server_on_all_addresses(everywhere: Shell, host: str, status: int) -> None:
    reply = everywhere.get("/version", Host=host, Origin=f"http://{host}")
    assert reply.status == status
    if status == 403:
        assert "--allowed-hosts" in reply.error["message"]
    # A key is enough: the page does not have it.
    with Shell(host="0.0.0.0", api_key=(KEY,)) as server:
        assert server.get("/version", Host=host, Authorization=f"Bearer {KEY}").status == 200


@pytest.mark.parametrize(
    "origin", ["http://attacker.example", "null", "https://localhost.attacker.example", "http://localhost:1"]
)
def test_foreign_pages_are_rejected(keyless: Shell, origin: str) -> None:
    # text/plain: what a browser sends anywhere without asking first.
    for method, path in (("POST", "/v1/completions"), ("POST", "/sleep"), ("GET", "/version")):
        reply = keyless.send(method, path, b"{}", {"Origin": origin, "Content-Type": "text/plain"})
        assert reply.status == 403
        assert reply.error["type"] == "PermissionDeniedError"
        assert "access-control-allow-origin" not in reply.headers


def test_pages_of_other_sites_cannot_embed_what_the_server_has(keyless: Shell) -> None:
    """Browsers send no Origin for images and scripts. A link to the server may be followed."""
    for mode in ("no-cors", "same-origin", ""):
        headers = {"Sec-Fetch-Site": "cross-site", **({"Sec-Fetch-Mode": mode} if mode else {})}
        assert keyless.send("GET", "/v1/models", headers=headers).status == 403
    for site, mode in (("cross-site", "navigate"), ("same-origin", "no-cors"), ("none", "navigate")):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
        assert keyless.send("GET", "/version", headers=headers).status == 200
    with Shell(allowed_origins=("*",)) as server:
        assert server.send("GET", "/version", headers={"Sec-Fetch-Site": "cross-site"}).status == 200


def test_our_own_page_is_allowed(keyless: Shell) -> None:
    for origin, host in (
        (f"http://127.0.0.1:{keyless.port}", f"127.0.0.1:{keyless.port}"),
        ("https://localhost", "localhost:443"),  # behind a proxy that speaks TLS
        ("http://localhost", "localhost"),
    ):
        assert keyless.get("/version", Origin=origin, Host=host).status == 200


def test_a_key_is_enough_for_any_page(keyed: Shell) -> None:
    """A page must have been given the key: only a browser's stored credentials could be misused."""
    reply = keyed.get("/version", Origin="http://other.example", Authorization=f"Bearer {KEY}")
    assert reply.status == 200
    assert "access-control-allow-origin" not in reply.headers


def preflight(
    server: Shell, origin: str, method: str = "POST", headers: str = "authorization, content-type"
) -> tuple[int, dict[str, str]]:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": headers,
    }
    reply = server.send("OPTIONS", "/v1/chat/completions", headers=asked)
    return reply.status, {name: text for name, text in reply.headers.items() if name.startswith("access-control")}


def test_cors_is_off(keyless: Shell) -> None:
    status, headers = preflight(keyless, "http://a.example")
    assert (status, headers) == (403, {})


def test_cors_for_named_pages() -> None:
    with Shell(api_key=(KEY,), allowed_origins=("http://a.example",), allow_credentials=True) as server:
        status, headers = preflight(server, "http://a.example")
        assert status == 204
        assert headers["access-control-allow-origin"] == "http://a.example"
        assert headers["access-control-allow-methods"] == "POST"
        assert headers["access-control-allow-headers"] == "authorization, content-type"
        assert headers["access-control-allow-credentials"] == "true"
        assert preflight(server, "http://b.example") == (401, {})
        answered = server.get("/version", Origin="http://a.example", Authorization=f"Bearer {KEY}")
        assert answered.headers["access-control-allow-origin"] == "http://a.example"
        assert answered.headers["vary"] == "Origin"
        # The page may read why it was refused, too.
        refused = server.get("/version", Origin="http://a.example")
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "http://a.example")


def test_cors_limits() -> None:
    with Shell(allowed_origins=("*",), allowed_methods=("GET",), allowed_headers=("X-One",)) as server:
        assert preflight(server, "http://a", "POST", "") == (403, {"access-control-allow-origin": "*"})
        assert preflight(server, "http://a", "GET", "x-one")[0] == 204
        assert preflight(server, "http://a", "GET", "x-one, x-two")[0] == 403


def test_the_answer_is_the_same_for_all_wrong_keys(keyed: Shell) -> None:
    replies = [keyed.get("/version", Authorization=f"Bearer {key}") for key in ("", "a", KEY[:-1], "x" * 4000)]
    assert len({reply.body for reply in replies}) == 1


def test_a_body_is_not_read_without_a_key(keyed: Shell) -> None:
    with keyed.connect() as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert answer(sock).status == 401


# --- scopes ---------------------------------------------------------------------------------------------------------

ADMIN = [route for route in ROUTES if route.scope == "admin"]
KEYS = "sk-app name=app\nsk-scrape scope=metrics\nsk-ops scope=admin"


def test_routes_for_administration() -> None:
    assert {route.path for route in ADMIN} == {
        *("/start_profile", "/stop_profile", "/reset_prefix_cache", "/sleep", "/wake_up", "/abort_requests"),
    }


@pytest.mark.parametrize("source", ["flags", "file"])
def test_what_a_scope_allows(tmp_path: Path, source: str) -> None:
    (tmp_path / "keys").write_text(KEYS)
    (tmp_path / "some").write_text(KEYS.rpartition("\n")[0])
    file = dict(api_key_file=str(tmp_path / "keys"))
    flags = dict(api_key_file=str(tmp_path / "some"), admin_api_key=("sk-ops",))
    with Shell(host="0.0.0.0", **(file if source == "file" else flags)) as server:
        for route in ROUTES:
            needed = SCOPES.index(route.scope)
            for rank, secret in enumerate(("sk-scrape", "sk-app", "sk-ops")):
                headers = {"Content-Type": "application/json", "Authorization": f"Bearer {secret}"}
                reply = server.send(route.method, path_of(route), b"{}", headers)
                assert (reply.status == 403) == (not route.public and rank < needed), (route.path, secret)
                if reply.status == 403:
                    assert reply.error["code"] == "insufficient_permissions"
                    assert "sk-" not in reply.error["message"]
            if route.scope == "admin":
                assert server.send(route.method, path_of(route), b"{}").status == 401


def test_administration_exists_only_where_no_stranger_can_reach_it(keyless: Shell) -> None:
    """Or where the operator wants it: with an admin key, or with a flag."""
    exist = dict[str, bool]()
    for name, settings in {
        "loopback": {},
        "loopback with a key": dict(api_key=(KEY,)),
        "everywhere": dict(host="0.0.0.0"),
        "everywhere with a key": dict(host="0.0.0.0", api_key=(KEY,)),
        "one address": dict(host="192.0.2.1", api_key=(KEY,)),
        "with the flag": dict(host="0.0.0.0", api_key=(KEY,), enable_admin_routes=True),
        "with a key for it": dict(host="0.0.0.0", admin_api_key=(KEY,)),
    }.items():
        with Shell(**settings) as server:
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
            replies = [server.send(route.method, route.path, b"{}", headers) for route in ADMIN]
            assert len({reply.status == 404 for reply in replies}) == 1
            exist[name] = replies[0].status != 404
            assert exist[name] or "--admin-api-key" in replies[0].error["message"]
            described = server.get("/openapi.json", Authorization=f"Bearer {KEY}").json["paths"]
            assert {route.path in described for route in ADMIN} == {exist[name]}
            assert server.get("/is_sleeping", Authorization=f"Bearer {KEY}").status == 200
    assert exist == {
        "loopback": True,
        "loopback with a key": True,
        "everywhere": False,
        "everywhere with a key": False,
        "one address": False,
        "with the flag": True,
        "with a key for it": True,
    }


def test_keys_for_administration_do_not_close_the_api() -> None:
    with Shell(admin_api_key=("root",)) as server:
        assert server.get("/version").status == 200
        assert server.get("/version", Authorization="Bearer anything").status == 200
        assert server.post("/sleep", {}).status == server.post("/sleep", {}, Authorization="Bearer x").status == 401
        assert server.post("/sleep", {}, Authorization="Bearer root").status == 503  # there is no engine
        assert server.get("/version", Origin="http://attacker.example").status == 403


def test_refusals_are_logged_with_the_key_s_name(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("jaxserve.server")
    logger.propagate = True
    with Shell(api_key=("sk-app",), admin_api_key=("root",)) as server, caplog.at_level(logging.INFO, logger.name):
        assert server.post("/abort_requests", {}, Authorization="Bearer sk-app").status == 403
        assert server.post("/abort_requests", {}, Authorization="Bearer sk-other").status == 401
        assert server.post("/v1/completions", {}, Authorization="Bearer root").status == 503
    lines = [vars(entry)["fields"] for entry in caplog.records if "fields" in vars(entry)]
    assert [(line["status"], line["key"]) for line in lines] == [(403, "key-1"), (401, None), (503, "admin-1")]


def test_names_of_keys_are_counted(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-app name=app")
    with Shell(api_key=("first",), api_key_file=str(tmp_path / "keys")) as server:
        for key in ("sk-app", "sk-app", "first", "wrong"):
            server.post("/v1/completions", {}, Authorization=f"Bearer {key}")
        text = server.get("/metrics", Authorization="Bearer first").body.decode()
    shown = r'jaxserve:key_requests_total\{engine="0",key="(.*)",model_name="tiny",status="503"\} (.*)'
    assert {key: float(count) for key, count in re.findall(shown, text)} == {"app": 2, "key-1": 1}
    assert "sk-app" not in text and "wrong" not in text
