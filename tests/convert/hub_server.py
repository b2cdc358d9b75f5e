# SPDX-License-Identifier: Apache-2.0
"""A fake hub on 127.0.0.1: the part of its HTTP API that downloads use, with faults on demand.

Repositories are in memory. Safetensors files are served as the hub serves large files: by a redirect to another host,
here `localhost`, with headers for size and hash. xet is not supported.
"""

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
_API = re.compile(rf"/api/models/{_ID}/revision/(?P<revision>[^/]+)")
_RESOLVE = re.compile(rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_CDN = re.compile(r"/cdn/(?P<hash>[0-9a-f]{64})/(?P<file>.+)")


@dataclass(frozen=True)
class Asked:
    """A received request; `place` is api, resolve or cdn."""

    method: str
    place: str
    file: str
    revision: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """A fault: what to do, `times` times, instead of answering requests of this method for this place and file."""

    place: str
    file: str = ""
    method: str = "GET"
    times: int = 10**6
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])  # besides, or over, those of a good answer
    body: bytes | None = None  # instead of what would be sent
    cut: int | None = None  # close the connection after so many bytes
    hold: threading.Event | None = None  # after `cut` bytes, or before the answer, wait for this


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict[str, dict[str, bytes]])
    refs: dict[str, str] = field(default_factory=dict[str, str])


class _Server(ThreadingHTTPServer):
    hub: "Hub"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that leaves is no fault
            super().handle_error(request, client_address)


class Hub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[Asked] = []
        self.faults: list[Fault] = []
        self.on_listing: Callable[[], object] = lambda: None  # called after a listing has been answered
        self.listing: dict[str, Any] = {}  # put over the fields of a good listing
        self.size_in_listing: dict[str, int] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Generator["Hub"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            for fault in self.faults:
                if fault.hold:
                    fault.hold.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def commit(self, id: str, files: Mapping[str, bytes], *, ref: str = "main") -> str:
        """Create a commit of exactly these files and point `ref` to it."""
        repository = self.repositories.setdefault(id, Repository())
        commit = hashlib.sha1(repr((id, len(repository.commits), sorted(files.items()))).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs[ref] = commit
        return commit

    def fault(self, place: str, file: str = "", **how: Any) -> Fault:
        self.faults.append(Fault(place, file, **how))
        return self.faults[-1]

    def bodies(self) -> list[str]:
        """The files whose content was requested, in order."""
        return [one.file for one in self.asked if one.method == "GET" and one.place != "api" and not _redirects(one)]

    def revisions(self) -> set[str]:
        """The revisions at which files were requested."""
        return {one.revision for one in self.asked if one.place == "resolve"}


def _redirects(asked: Asked) -> bool:
    return asked.place == "resolve" and asked.file.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer takes 40 ms

    @property
    def hub(self) -> Hub:
        return cast(_Server, self.server).hub

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        places = {"api": _API, "cdn": _CDN, "resolve": _RESOLVE}
        place = next((place for place, pattern in places.items() if pattern.fullmatch(url.path)), None)
        if place is None:
            return self.answer(404, {}, b"no such page")
        match = places[place].fullmatch(url.path)
        assert match
        part = {name: unquote(text) for name, text in match.groupdict().items()}
        file, revision = part.get("file", ""), part.get("revision", part.get("hash", ""))
        asked = Asked(self.command, place, file, revision, {name.lower(): text for name, text in self.headers.items()})
        self.hub.asked.append(asked)
        for fault in self.hub.faults:
            if (fault.place, fault.method) == (place, self.command) and fault.file in ("", file) and fault.times > 0:
                fault.times -= 1
                return self.answer_wrong(fault, place, part, parse_qs(url.query))
        self.answer(*self.good(place, part, parse_qs(url.query)))
        if place == "api":
            self.hub.on_listing()

    def good(self, place: str, part: dict[str, str], query: dict[str, list[str]]) -> tuple[int, dict[str, str], bytes]:
        if place == "cdn":
            contents = [
                content
                for repository in self.hub.repositories.values()
                for files in repository.commits.values()
                for content in files.values()
                if hashlib.sha256(content).hexdigest() == part["hash"]
            ]
            return self.part_of(contents[0], {"ETag": '"of-the-cdn"'})
        repository = self.hub.repositories.get(part["id"])
        if repository is None:
            return _error(404, "RepoNotFound", "Repository not found")
        commit = repository.refs.get(part["revision"], part["revision"])
        if commit not in repository.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {part['revision']}")
        files = repository.commits[commit]
        if place == "api":
            return (
                200,
                {"Content-Type": "application/json"},
                json.dumps(self.listing(part["id"], commit, query)).encode(),
            )
        if part["file"] not in files:
            return _error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content = files[part["file"]]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if not part["file"].endswith(".safetensors"):
            return self.part_of(content, headers)
        sha256 = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256}"'}
        headers |= {"Location": f"http://localhost:{self.hub.port}/cdn/{sha256}/{part['file']}"}
        return 302, headers, b"moved"

    def listing(self, id: str, commit: str, query: dict[str, list[str]]) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for name, content in self.hub.repositories[id].commits[commit].items():
            sibling: dict[str, Any] = {"rfilename": name}
            if query.get("blobs"):
                size = self.hub.size_in_listing.get(name, len(content))
                sibling |= {"size": size, "blobId": hashlib.sha1(content).hexdigest()}
                if name.endswith(".safetensors"):
                    sibling["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 135}
            siblings.append(sibling)
        return {"id": id, "modelId": id, "sha": commit, "siblings": siblings, "private": False} | self.hub.listing

    def part_of(self, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not match:
            return 200, headers, content
        start = int(match[1])
        return 206, headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}, content[start:]

    def answer_wrong(self, fault: Fault, place: str, part: dict[str, str], query: dict[str, list[str]]) -> None:
        status, headers, body = self.good(place, part, query)
        if fault.status != 200:
            status, headers, body = fault.status, {}, b"out of order"
        if fault.hold and fault.cut is None:
            fault.hold.wait(30)
        body = body if fault.body is None else fault.body
        self.answer(status, headers | fault.headers, body, cut=fault.cut, hold=fault.hold)

    def answer(
        self,
        status: int,
        headers: dict[str, str],
        body: bytes,
        *,
        cut: int | None = None,
        hold: threading.Event | None = None,
    ) -> None:
        try:
            self.send_response(status)
            for name, text in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, text)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                if hold:
                    hold.wait(30)
                self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):  # whoever asked has left
            self.close_connection = True


def _error(
    status: int, code: str, text: str, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    named = {"X-Error-Code": code, "X-Error-Message": text, "Content-Type": "application/json", **(headers or {})}
    return status, named, json.dumps({"error": text}).encode()


def wait_for(condition: Any, *, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "this never came"
        threading.Event().wait(0.01)
