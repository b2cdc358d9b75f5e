# SPDX-License-Identifier: Apache-2.0
"""The page over HTTP: all files exist, none needs another host, the policy is strict. These tests need no browser."""

import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from jaxserve.server.routes import playground
from jaxserve.server.routes.table import all_routes
from tests.ui.fake_server import FakeServer

STATIC = Path(playground.__file__).parents[1] / "static"


@pytest.fixture
def sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in STATIC.iterdir()}


def test_every_file_is_served_and_every_one_that_is_named_exists(sources: dict[str, str]) -> None:
    assert sorted(playground.FILES.values()) == sorted(sources)
    named = re.findall(r"""["']static/([\w.]+)["']""", sources["index.html"])
    for name, text in sources.items():
        if name.endswith(".js"):
            named += re.findall(r'from "\./([\w.]+)"', text)
    assert named and {f"/static/{name}" for name in named} < playground.FILES.keys()
    routes = playground.ROUTES
    assert all(route.public and route.method == "GET" for route in routes)


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(sources: dict[str, str]) -> None:
    html = sources["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", html))
    for name, text in sources.items():
        urls = [url for url in re.findall(r"https?://[^\s\"')]+", text) if url != "http://www.w3.org/2000/svg"]
        assert not urls, name
        assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function)", text), (
            name
        )


def test_every_element_that_a_script_asks_for_is_on_the_page(sources: dict[str, str]) -> None:
    there = re.findall(r'id="([\w-]+)"', sources["index.html"])
    assert len(there) == len(set(there))
    wanted = {name for text in sources.values() for name in re.findall(r'\$\("([\w-]+)"\)', text)}
    assert wanted and wanted <= set(there)
    for target in re.findall(r'(?:for|aria-controls|aria-labelledby)="([\w-]+)"', sources["index.html"]):
        assert target in there


async def test_headers_and_revalidation(server: FakeServer) -> None:
    async with aiohttp.ClientSession(server.url) as session:
        for path, name in playground.FILES.items():
            async with session.get(path) as answer:
                assert answer.status == 200
                assert await answer.read() == (STATIC / name).read_bytes()
                check_headers(answer.headers)
                assert answer.content_type == playground.TYPES[name.rpartition(".")[2]]
                tag = answer.headers["ETag"]
            for known, status in (
                (tag, 304),
                (f"W/{tag}", 304),
                (f'"other", {tag}', 304),
                ('"other"', 200),
                ("x", 200),
            ):
                async with session.get(path, headers={"If-None-Match": known}) as again:
                    assert again.status == status, known
                    assert (await again.read() == b"") == (status == 304)
                    check_headers(again.headers)
                    assert again.headers["ETag"] == tag


def check_headers(headers: Any) -> None:
    policy = dict(part.split(maxsplit=1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data:"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("ui", [True, False])
def test_the_page_can_be_left_out(ui: bool) -> None:
    paths = {route.path for route in all_routes(ui=ui)}
    assert (playground.FILES.keys() <= paths) is ui
    assert ui or not playground.FILES.keys() & paths
