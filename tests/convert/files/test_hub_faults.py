# SPDX-License-Identifier: Apache-2.0
"""From a name to a folder with failures: of the hub, the connection, the disk, or without a network."""

import errno
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.file_download
import huggingface_hub.utils
import pytest
from huggingface_hub import constants

from convert.files.hub import fetch
from tests.convert.crafted import one
from tests.convert.hub_server import Hub, wait_for
from tests.convert.repositories import ID, INDEX, SHARDS, SINGLE, SMALL, contents, refused

pytestmark = pytest.mark.usefixtures("hub")


# -- failures of the hub and of the way to it


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"status": 401, "headers": {"X-Error-Code": "RepoNotFound"}}, ["has no such model", "set HF_TOKEN"]),
        ({"status": 401, "headers": {"X-Error-Code": "GatedRepo"}}, ["is gated", "accept its license", "HF_TOKEN"]),
        ({"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, ["is gated", "/org/tiny, and set HF_TOKEN"]),
        ({"status": 401}, ["denied access to 'org/tiny' (status 401)", "HF_TOKEN"]),
        ({"status": 403}, ["denied access to 'org/tiny' (status 403)", "license"]),
        (
            {"status": 403, "headers": {"X-Error-Message": "Access to this resource is disabled."}},
            ["has been disabled"],
        ),
        ({"status": 429, "headers": {"Retry-After": "17"}}, ["rate limit exceeded", "wait 17 seconds", "HF_TOKEN"]),
        ({"status": 429, "headers": {"Retry-After": "Wed, 21 Oct"}}, ["wait a few minutes"]),
        ({"status": 500}, ["returned status 500 for 'org/tiny'", "try again later"]),
        ({"status": 503}, ["status 503", "HF_HUB_OFFLINE=1"]),
        ({"status": 418}, ["status 418", "HF_ENDPOINT"]),
        ({"body": b"<html>Please log in</html>"}, ["sent an invalid response", "proxy"]),
        ({"body": b"[]"}, ["sent an invalid response"]),
        ({"body": b'{"sha": 5}'}, ["sent an invalid response"]),
        ({"body": b'{"id": "x", "siblings": [{}]}'}, ["sent an invalid response"]),
        ({"body": b'{"id": "x", "siblings": [{"rfilename": "x", "size": "y"}]}'}, ["sent an invalid response"]),
        ({"cut": 0}, ["lost the connection", "HF_HUB_OFFLINE=1"]),
        ({"cut": 10}, ["lost the connection", "try again"]),
    ],
    ids=str,
)
def test_the_listing_fails(hub: Hub, cache: Path, how: dict[str, Any], expected: list[str]) -> None:
    hub.commit(ID, SINGLE)
    hub.fault("api", **how)
    refused(ID, *expected, cache_dir=cache)
    assert len(hub.asked) == 1


@pytest.mark.parametrize("commit", [None, "", "main", "../../x", "a" * 39, "A" * 40])
def test_the_hub_names_no_commit(hub: Hub, cache: Path, commit: str | None) -> None:
    hub.commit(ID, SINGLE)
    hub.listing["sha"] = commit
    refused(ID, "returned no valid commit for 'org/tiny'", cache_dir=cache)
    hub.commit(ID, SINGLE, ref="b" * 40)
    hub.listing["sha"] = "a" * 40
    refused(ID, "returned no valid commit", cache_dir=cache, revision="b" * 40)


def test_unknown_names(hub: Hub, cache: Path) -> None:
    refused("org/no-such", "'org/no-such' is not a local folder, and http", "has no such model", cache_dir=cache)
    hub.commit(ID, SINGLE)
    refused(ID, "'org/tiny' has no revision 'v9'", "/tree/main", cache_dir=cache, revision="v9")


def test_no_connection_to_the_hub(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(ID, SINGLE)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        refused(ID, "([errno 111] connection refused)", "HF_HUB_OFFLINE=1", cache_dir=cache)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    refused(ID, "cannot resolve http://hub.invalid", "check the network", cache_dir=cache)
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("http", "https"))
    refused(ID, "TLS connection to https://", "SSL_CERT_FILE", cache_dir=cache)
    for nonsense in ("hub.example", "ftp://hub.example", "http://"):
        monkeypatch.setenv("HF_ENDPOINT", nonsense)
        refused(ID, "is not a valid Hub URL", "check HF_ENDPOINT", cache_dir=cache)


def test_a_proxy_that_refuses(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub.close_session()  # the proxy is looked up when a session begins
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    refused(ID, "the proxy rejected the request for 'org/tiny'", "check HTTPS_PROXY", cache_dir=cache)


def test_a_hub_that_does_not_answer(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.commit(ID, SINGLE)
    hub.fault("api", hold=threading.Event())
    refused(ID, "timed out on 'org/tiny'", cache_dir=cache)


def test_an_invalid_token(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_größe")
    refused(ID, "contains non-ASCII characters", "check HF_TOKEN", cache_dir=cache)


@pytest.mark.parametrize(
    ("place", "how", "expected"),
    [
        ("resolve", {"method": "HEAD", "status": 500}, ["returned status 500 for 'model.safetensors' of 'org/tiny'"]),
        (
            "resolve",
            {"method": "HEAD", "status": 404, "headers": {"X-Error-Code": "EntryNotFound"}},
            ["lists", "have it"],
        ),
        ("resolve", {"method": "HEAD", "status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, ["is gated"]),
        (
            "resolve",
            {"method": "HEAD", "headers": {"X-Repo-Commit": "a" * 40}},
            ["has the wrong size after download from"],
        ),
        ("resolve", {"method": "HEAD", "headers": {"X-Linked-Size": "5"}}, ["differs from what"]),
        ("cdn", {"status": 500}, ["returned status 500 for 'model.safetensors' of 'org/tiny'", "try again later"]),
        ("cdn", {"status": 403}, ["denied access to 'model.safetensors'"]),
        ("cdn", {"body": b"short"}, ["differs from what", "try again"]),
        ("cdn", {"cut": 0}, ["the connection to http", "during 'model.safetensors' of 'org/tiny'"]),
    ],
    ids=str,
)
def test_a_file_fails(
    hub: Hub, cache: Path, naps: list[float], place: str, how: dict[str, Any], expected: list[str]
) -> None:
    hub.commit(ID, SINGLE)
    fault = hub.fault(place, "model.safetensors", **how)
    refused(ID, *expected, cache_dir=cache)
    refused(ID, "is not in the cache", "offline mode is on", cache_dir=cache, offline=True)
    assert not list(cache.rglob("*.incomplete"))
    fault.times = 0
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE


def test_a_small_file_fails(hub: Hub, cache: Path, naps: list[float]) -> None:
    commit = hub.commit(ID, SINGLE)
    fault = hub.fault("resolve", "tokenizer.json", status=500)
    refused(ID, "returned status 500 for 'tokenizer.json' of 'org/tiny'", cache_dir=cache)
    expected = "no 'config.json'"  # so that no folder without its tokenizer looks complete
    refused(ID, expected, cache_dir=cache, revision=commit, offline=True, weights=False)
    fault.times = 0
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE


def test_a_file_that_differs_from_the_listing(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SINGLE)
    hub.size_in_listing["model.safetensors"] = 10**4
    refused(ID, "has the wrong size after download from", ": expected 10000 bytes", cache_dir=cache)
    assert contents(next(cache.rglob("snapshots/*"))) == SMALL
    hub.size_in_listing.clear()
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE


def test_temporary_failures_are_retried(
    hub: Hub,
    cache: Path,
    naps: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10)  # a chunk that is cut is lost
    hub.commit(ID, SINGLE)
    hub.fault("resolve", "config.json", method="HEAD", status=503, times=2)
    hub.fault("cdn", status=429, headers={"Retry-After": "7"}, times=1)
    hub.fault("cdn", cut=20, times=2)
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE
    assert 8 in naps  # one more than was asked for
    ranges = [one.headers.get("range") for one in hub.asked if one.place == "cdn"]
    assert ranges == [None, None, "bytes=20-", "bytes=40-"]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("huggingface_hub").level == logging.WARNING


# -- the disk


def test_no_room(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(ID, SINGLE)
    hub.size_in_listing["model.safetensors"] = 5 * 10**9
    usage = shutil.disk_usage("/")._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(ID, "needs 5,000 MB more, and the cache", "has 1,000 MB free", "HF_HOME", cache_dir=cache)
    assert hub.bodies()[-1] == "config.json"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_the_disk_fills(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    hub.commit(ID, SINGLE)
    download = huggingface_hub.file_download.http_get

    def fills(url: str, file: Any, **options: Any) -> None:
        download(url, file, **options)
        if url.endswith("model.safetensors"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", fills)
    refused(ID, "the disk of the cache", "is full, so 'org/tiny' is incomplete", "free disk space", cache_dir=cache)
    assert contents(next(cache.rglob("snapshots/*"))) == SMALL
    assert not list(cache.rglob("*.incomplete"))


def test_a_cache_that_cannot_be_made(hub: Hub, tmp_path: Path) -> None:
    hub.commit(ID, SINGLE)
    (tmp_path / "file").write_bytes(b"")
    refused(ID, "cannot write to the cache", "check its permissions", cache_dir=tmp_path / "file/cache")
    if os.geteuid():  # nothing is forbidden to root
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(ID, "cannot write to the cache", "(permission denied)", cache_dir=tmp_path / "locked/cache")


# -- offline


@pytest.mark.parametrize("sharded", [False, True])
def test_offline(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    commit = hub.commit(ID, SMALL | INDEX | SHARDS if sharded else SINGLE)
    folder = fetch(ID, cache_dir=cache)
    hub.asked.clear()
    seen: list[Path] = []
    for revision in (None, "main", commit):
        assert fetch(ID, revision=revision, cache_dir=cache, offline=True, check=seen.append) == folder
    assert seen == [folder] * 3
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert fetch(ID, cache_dir=cache) == folder
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert fetch(ID, cache_dir=cache) == folder
    assert hub.asked == []


def test_offline_without(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SINGLE)
    refused(ID, f"'org/tiny' is not in the cache {cache}, and offline mode is on", cache_dir=cache, offline=True)
    folder = fetch(ID, cache_dir=cache)
    hub.asked.clear()
    refused(ID, "'org/tiny' at 'v2' is not in the cache", cache_dir=cache, revision="v2", offline=True)
    refused(ID, "is not in the cache", cache_dir=cache, revision="a" * 40, offline=True)
    for text in ("", "main", "../../../x", "\xff"):
        (folder.parents[1] / "refs/main").write_text(text)
        refused(ID, "is not in the cache", cache_dir=cache, offline=True)
    assert hub.asked == []


def test_offline_and_incomplete(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SMALL | INDEX | SHARDS)
    fetch(ID, cache_dir=cache, weights=False)
    refused(ID, "is incomplete in the cache", "no 'model.safetensors'", cache_dir=cache, offline=True)
    folder = fetch(ID, cache_dir=cache, weights=False, offline=True)
    assert contents(folder) == SMALL
    fetch(ID, cache_dir=cache)
    for shard in SHARDS:
        (folder / shard).unlink()
    message = refused(ID, "(no 'model-00001-of-00002.safetensors', 'model-00002", cache_dir=cache, offline=True)
    assert message.endswith("download it once while online")
    (folder / "config.json").unlink()
    refused(ID, "(no 'config.json')", cache_dir=cache, weights=False, offline=True)


def test_a_failed_update_leaves_the_old_commit_in_use(hub: Hub, cache: Path, naps: list[float]) -> None:
    hub.commit(ID, SINGLE)
    folder = fetch(ID, cache_dir=cache)
    hub.commit(ID, SMALL | {"model.safetensors": one(dtype="I8")})
    fault = hub.fault("cdn", status=500)
    refused(ID, "status 500", cache_dir=cache)
    assert fetch(ID, cache_dir=cache, offline=True) == folder
    fault.times = 0
    assert fetch(ID, cache_dir=cache) == fetch(ID, cache_dir=cache, offline=True) != folder


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_download_looks_incomplete(hub: Hub, cache: Path, how: signal.Signals) -> None:
    commit = hub.commit(ID, SINGLE)
    fault = hub.fault("cdn", cut=20, hold=threading.Event())
    script = "import sys, pathlib, convert.files.hub as hub; hub.fetch('org/tiny', cache_dir=pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(cache.parent / "home")}
    with subprocess.Popen([sys.executable, "-c", script, cache], env=environment, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: any(one.place == "cdn" for one in hub.asked))
        wait_for(lambda: list(cache.rglob("*.incomplete")))
        process.send_signal(how)
        process.wait(10)
    assert bool(list(cache.rglob("*.incomplete"))) == (how == signal.SIGKILL)
    refused(ID, "is not in the cache", cache_dir=cache, offline=True)
    refused(ID, "no 'model.safetensors'", cache_dir=cache, revision=commit, offline=True)
    fault.times = 0
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE
