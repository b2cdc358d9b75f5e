# SPDX-License-Identifier: Apache-2.0
"""From a name to a folder, against a stand-in of the hub: which files, which commit, and every way to fail."""

import errno
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.file_download
import huggingface_hub.utils
import pytest
from huggingface_hub import constants
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from convert.hub import fetch
from convert.safetensors import read_checkpoint
from jaxserve.errors import CheckpointError
from tests.convert.crafted import one
from tests.convert.hub_server import Hub, wait_for

ID = "org/tiny"
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"model_max_length": 8}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}
WEIGHTS = one()
SINGLE = {**SMALL, "model.safetensors": WEIGHTS}
SHARDS = {f"model-0000{n}-of-00002.safetensors": one(dtype=kind) for n, kind in ((1, "U8"), (2, "I8"))}
MAP = dict(zip("ab", SHARDS, strict=True))
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": MAP}).encode()}
JUNK = {
    **{name: b"import os" for name in ("modeling_tiny.py", "README.md", ".gitattributes", "LICENSE", "logo.png")},
    **{name: b"PK" for name in ("pytorch_model.bin", "consolidated.00.pth", "tiny.gguf", "onnx/model.onnx")},
    **{name: b"PK" for name in ("original/params.json", "consolidated.safetensors", "onnx/model.safetensors")},
    **{
        name: b""
        for name in ("additional_chat_templates/x/y.jinja", "sub/config.json", "tokenizer.py", "../config.json")
    },
}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    """A hub of its own for each test; nothing of the user's home, and no host but this one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it would ask the real hub for a list
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "home/tokens"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    resolve = socket.getaddrinfo

    def only_here(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("127.0.0.1", "localhost"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    with Hub().running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long huggingface_hub would have slept between tries."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def refused(source: str, *expected: str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        fetch(source, **options)
    message = str(caught.value)
    assert message.isprintable(), "more than one line, or something a terminal would obey"
    assert len(message) < 1500 and message.count("; ") == 1
    for part in expected:
        assert part in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- folders


def test_a_folder_is_itself(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "org/tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(str(model)) == model
    assert fetch("~/org/tiny") == model
    for source in ("org/tiny", "./org/tiny", "org/tiny/", "../" + tmp_path.name + "/org/tiny"):
        assert fetch(source, offline=True).resolve() == model
    seen: list[Path] = []
    assert fetch(str(model), check=seen.append) == seen[0]
    refused("org/tiny", "has no revisions", revision="main")
    assert hub.asked == []


def test_what_is_no_model_folder(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    refused("file", "is a file, not a model folder", "name the folder")
    refused("./file", "is a file")
    refused("empty", "has no config.json")
    for path in ("./absent", "/absent", "~/absent", "a/b/c", "org/tiny/", "C:\\models\\x", "file/x/y", "../x"):
        refused(path, "there is no folder", "check the path, or name a hub model as org/name")
    refused("https://huggingface.co/org/tiny", "there is no folder", "name a hub model as org/name")
    refused("./loop", "cannot be read (too many levels")
    refused("./nul\0", "cannot be read")
    refused("/" + "x" * 5000, "cannot be read (file name too long)")
    assert hub.asked == []


@pytest.mark.parametrize("source", ["/no/such/model", "no way", "./gone"])
def test_a_wrong_path_is_told_before_anything_heavy_is_imported(source: str) -> None:
    script = (
        "import sys\n"
        "from convert.hub import fetch\n"
        "try: fetch(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__)\n"
        "heavy = {'jax', 'jaxlib', 'numpy', 'huggingface_hub', 'transformers', 'httpx2', 'tqdm'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    result = subprocess.run([sys.executable, "-c", script, source], capture_output=True, text=True, check=True)
    assert result.stdout == "CheckpointError\n[]\n"


BAD_IDS = [
    *("", " ", "a b", "org/na me", "org/tiny\n", "-x", "x-", "org/.hidden", "org/x.", "x..y", "a--b", "org/tiny.git"),
    *("org/tiny:Q4", "org/tiny@main", "größe", "x" * 97, "org/" + "x" * 97, "nul\0", "\x1b[2J", "org?/x", "org/%2e"),
]


@pytest.mark.parametrize("source", BAD_IDS, ids=ascii)
def test_refuses_what_is_no_hub_id(hub: Hub, source: str) -> None:
    refused(source, "neither a folder here nor a possible name of a hub model", "name a hub model as org/name")
    assert hub.asked == []


@pytest.mark.parametrize("source", ["gpt2", "org/x", "O_r.g-1/Na.me_2-3", "x" * 96, "_a_/_"])
def test_accepts_hub_ids(hub: Hub, cache: Path, source: str) -> None:
    hub.commit(source, SINGLE)
    assert contents(fetch(source, cache_dir=cache)) == SINGLE


BAD_REVISIONS = [
    "",
    "..",
    "../main",
    "a/../b",
    "/main",
    "main/",
    "a//b",
    "a b",
    "-x",
    ".x",
    "a/.b",
    "x\n",
    "?",
    "x" * 300,
]


@pytest.mark.parametrize("revision", BAD_REVISIONS)
def test_refuses_what_is_no_revision(hub: Hub, revision: str) -> None:
    for offline in (False, True):
        refused(ID, "cannot be a revision", revision=revision, offline=offline)
    assert hub.asked == []


# -- downloads


def test_downloads_what_is_needed_and_nothing_else(hub: Hub, cache: Path) -> None:
    commit = hub.commit(ID, JUNK | SINGLE)
    folder = fetch(ID, cache_dir=cache)
    assert folder.name == commit
    assert contents(folder) == SINGLE
    assert sorted(hub.bodies()) == sorted(SINGLE)
    assert hub.bodies()[-2:] == ["config.json", "model.safetensors"]
    assert list(read_checkpoint(folder)) == ["a"]
    hub.asked.clear()
    assert fetch(ID, cache_dir=cache) == folder
    assert [one.place for one in hub.asked] == ["api"]


def test_downloads_the_shards_that_the_index_names(hub: Hub, cache: Path) -> None:
    hub.commit(ID, JUNK | SMALL | INDEX | SHARDS | {"model-00003-of-00002.safetensors": WEIGHTS})
    assert contents(fetch(ID, cache_dir=cache)) == SMALL | INDEX | SHARDS
    assert hub.bodies()[-3:] == [*INDEX, *SHARDS]


def test_a_single_file_goes_before_an_index(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SINGLE | INDEX | SHARDS)
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_can_wait(hub: Hub, cache: Path, sharded: bool) -> None:
    hub.commit(ID, SMALL | INDEX | SHARDS if sharded else SINGLE)
    assert contents(fetch(ID, cache_dir=cache, weights=False)) == SMALL

    def unsupported(folder: Path) -> None:
        assert contents(folder) == SMALL
        raise CheckpointError("unsupported", "choose another")

    refused(ID, "unsupported; choose another", cache_dir=cache, check=unsupported)
    assert sorted(hub.bodies()) == sorted(SMALL)


def test_a_repository_without_weights_still_has_a_tokenizer(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SMALL | JUNK)
    assert contents(fetch(ID, cache_dir=cache, weights=False)) == SMALL


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/3", "feature/größe+1"])
def test_every_file_is_of_one_commit(hub: Hub, cache: Path, revision: str | None) -> None:
    ref = revision or "main"
    hub.commit(ID, {"config.json": b"other"}, ref="elsewhere")
    commit = hub.commit(ID, SMALL | INDEX | SHARDS, ref=ref)
    # The branch moves on as soon as it has been looked at.
    hub.on_listing = lambda: hub.commit(ID, {"config.json": b"newer"}, ref=ref)
    folder = fetch(ID, revision=revision, cache_dir=cache)
    assert hub.revisions() == {commit}
    assert [one.revision for one in hub.asked if one.place == "api"] == [ref]
    assert contents(folder) == SMALL | INDEX | SHARDS
    assert fetch(ID, revision=revision, cache_dir=cache, offline=True) == folder


def test_a_commit_can_be_named(hub: Hub, cache: Path) -> None:
    commit = hub.commit(ID, SINGLE)
    hub.commit(ID, {"config.json": b"newer"})
    assert fetch(ID, revision=commit, cache_dir=cache).name == commit
    assert hub.revisions() == {commit}
    assert not list(cache.rglob("refs/*"))


def test_the_cache_is_that_of_huggingface_hub(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit(ID, SINGLE)
    assert fetch(ID) == tmp_path / "home/hub/models--org--tiny/snapshots" / commit
    found = huggingface_hub.try_to_load_from_cache(ID, "config.json")
    assert isinstance(found, str) and Path(found).read_bytes() == SINGLE["config.json"]


def test_two_commits_share_what_they_have_in_common(hub: Hub, cache: Path) -> None:
    first = fetch(ID, cache_dir=cache) if hub.commit(ID, SINGLE) else None
    hub.asked.clear()
    hub.commit(ID, SINGLE | {"config.json": b'{"model_type": "gpt2"}'})
    second = fetch(ID, cache_dir=cache)
    assert first and first != second
    assert hub.bodies() == ["config.json"]


def test_the_token_goes_to_the_hub_alone(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.commit(ID, SINGLE)
    fetch(ID, cache_dir=cache)
    sent = {one.place: one.headers.get("authorization") for one in hub.asked}
    assert sent == {"api": "Bearer hf_secret", "resolve": "Bearer hf_secret", "cdn": None}
    assert all(one.headers["user-agent"].startswith("jaxserve/") for one in hub.asked if one.place == "api")


def test_a_file_cut_short_in_the_cache_is_fetched_again(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SINGLE)
    folder = fetch(ID, cache_dir=cache)
    os.truncate(folder / "model.safetensors", 3)
    hub.asked.clear()
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE
    assert hub.bodies() == ["model.safetensors"]


def test_four_at_once(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SMALL | INDEX | SHARDS)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: fetch(ID, cache_dir=cache), range(4)))
    assert len(set(folders)) == 1
    assert contents(folders[0]) == SMALL | INDEX | SHARDS
    assert logging.getLogger("huggingface_hub").level == logging.WARNING


def test_a_cache_that_cannot_be_written_still_serves(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(ID, SINGLE)
    folder = fetch(ID, cache_dir=cache)

    def read_only(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        for name in ("mkdir", "write_text", "unlink"):
            patch.setattr(Path, name, read_only)
        assert fetch(ID, cache_dir=cache) == folder


# -- progress


def test_silence_where_there_is_no_terminal(hub: Hub, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.commit(ID, SINGLE)
    fetch(ID, cache_dir=cache)
    assert capfd.readouterr() == ("", "")


def test_progress_on_stderr(hub: Hub, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.commit(ID, SMALL | INDEX | SHARDS)
    fetch(ID, cache_dir=cache, progress=True)
    out, err = capfd.readouterr()
    size = sum(map(len, SHARDS.values()))
    assert out == ""
    assert "org/tiny weights: 100%" in err and f"{size}/{size}" in err
    fetch(ID, cache_dir=cache, progress=True)
    assert capfd.readouterr() == ("", "")


def test_progress_of_xet_is_one_bar(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has no xet, so what huggingface_hub does with it while downloading is done by hand here."""
    hub.commit(ID, SINGLE)
    counted: list[float] = []
    monkeypatch.setattr(huggingface_hub.utils.tqdm, "update", lambda _, count: counted.append(count))

    def by_xet(url: str, file: Any, *, tqdm_class: type, **_: Any) -> None:
        file.write(WEIGHTS if url.endswith("model.safetensors") else SMALL[url.split(f"/{_only_commit(hub)}/")[1]])
        with XetDownloadProgressReporter(reconstruction_desc="", log_level=30, tqdm_class=tqdm_class) as reporter:
            done = dict.fromkeys(
                ("total_bytes", "total_bytes_completed", "total_transfer_bytes_completed"), file.tell()
            )
            rates = dict.fromkeys(("total_bytes_completion_rate", "total_transfer_bytes_completion_rate"), 1.0)
            reporter.update_progress(SimpleNamespace(**done, **rates))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", by_xet)
    assert contents(fetch(ID, cache_dir=cache, progress=True)) == SINGLE
    assert sum(counted) == sum(map(len, SINGLE.values()))


def test_progress_on_a_terminal(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(ID, SINGLE)
    shown: list[str] = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "write", shown.append)
    fetch(ID, cache_dir=cache, progress=False)
    assert shown == []
    shutil.rmtree(cache)
    fetch(ID, cache_dir=cache)
    assert any("org/tiny weights" in text for text in shown)


# -- hostile and useless repositories


@pytest.mark.parametrize(
    "shard",
    [
        "../../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "C:x.safetensors",
        "..\\x.safetensors",
        "x.bin",
        5,
    ],
)
def test_refuses_an_index_that_leads_elsewhere(hub: Hub, cache: Path, shard: object) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    hub.commit(ID, SMALL | {"model.safetensors.index.json": index, str(shard): b"x"})
    refused(ID, "expected the plain name of a .safetensors file beside it", cache_dir=cache)
    assert sorted(hub.bodies()) == sorted([*SMALL, *INDEX])
    refused(ID, "expected the plain name", cache_dir=cache, revision=_only_commit(hub), offline=True)


def _only_commit(hub: Hub) -> str:
    (commit,) = hub.repositories[ID].commits
    return commit


def test_refuses_an_index_of_shards_that_are_not_there(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SMALL | INDEX)
    refused(ID, "lacks 'model-00001-of-00002.safetensors', 'model-00002", "which its", "names", cache_dir=cache)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"pytorch_model.bin": b""}, ["only 'pytorch_model.bin'", "refs/pr/N", "save_pretrained"]),
        ({"a-Q4.gguf": b"", "b-Q8.gguf": b""}, ["only 'a-Q4.gguf'", "that the GGUF files were made from"]),
        ({"consolidated.safetensors": b""}, ["only 'consolidated.safetensors'", "weights as safetensors"]),
        ({"model-00001-of-00002.safetensors": b""}, ["no model.safetensors.index.json"]),
        ({"README.md": b""}, ["no other weights"]),
    ],
)
def test_refuses_a_repository_without_safetensors(
    hub: Hub, cache: Path, files: dict[str, bytes], expected: list[str]
) -> None:
    hub.commit(ID, SMALL | files)
    refused(ID, "has no model.safetensors", *expected, cache_dir=cache)
    assert hub.bodies() == []


def test_refuses_a_repository_without_a_config(hub: Hub, cache: Path) -> None:
    hub.commit(ID, {"model.safetensors": WEIGHTS})
    refused(ID, "has no config.json", cache_dir=cache)
    assert hub.bodies() == []


# -- failures of the hub and of the way to it


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"status": 401, "headers": {"X-Error-Code": "RepoNotFound"}}, ["no such model at http", "set HF_TOKEN"]),
        ({"status": 401, "headers": {"X-Error-Code": "GatedRepo"}}, ["is gated", "accept its licence", "HF_TOKEN"]),
        ({"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, ["is gated", "/org/tiny, and set HF_TOKEN"]),
        ({"status": 401}, ["refuses access to 'org/tiny' (status 401)", "HF_TOKEN"]),
        ({"status": 403}, ["refuses access to 'org/tiny' (status 403)", "licence"]),
        (
            {"status": 403, "headers": {"X-Error-Message": "Access to this resource is disabled."}},
            ["has been disabled"],
        ),
        ({"status": 429, "headers": {"Retry-After": "17"}}, ["asked too often", "wait 17 seconds", "HF_TOKEN"]),
        ({"status": 429, "headers": {"Retry-After": "Wed, 21 Oct"}}, ["wait some minutes"]),
        ({"status": 500}, ["answers 'org/tiny' with status 500", "try again later"]),
        ({"status": 503}, ["status 503", "HF_HUB_OFFLINE=1"]),
        ({"status": 418}, ["status 418", "HF_ENDPOINT"]),
        ({"body": b"<html>Please log in</html>"}, ["does not answer as a hub does", "proxy"]),
        ({"body": b"[]"}, ["does not answer as a hub does"]),
        ({"body": b'{"sha": 5}'}, ["does not answer as a hub does"]),
        ({"body": b'{"id": "x", "siblings": [{}]}'}, ["does not answer as a hub does"]),
        ({"body": b'{"id": "x", "siblings": [{"rfilename": "x", "size": "y"}]}'}, ["does not answer as a hub does"]),
        ({"cut": 0}, ["broke off", "HF_HUB_OFFLINE=1"]),
        ({"cut": 10}, ["broke off", "run it again"]),
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
    refused(ID, "names no commit for 'org/tiny'", cache_dir=cache)
    hub.commit(ID, SINGLE, ref="b" * 40)
    hub.listing["sha"] = "a" * 40
    refused(ID, "names no commit", cache_dir=cache, revision="b" * 40)


def test_unknown_names(hub: Hub, cache: Path) -> None:
    refused("org/no-such", "there is no folder 'org/no-such' here and no such model at http", cache_dir=cache)
    hub.commit(ID, SINGLE)
    refused(ID, "'org/tiny' has no revision 'v9'", "/tree/main", cache_dir=cache, revision="v9")


def test_no_road_to_the_hub(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(ID, SINGLE)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        refused(ID, "cannot be reached ([errno 111] connection refused)", "HF_HUB_OFFLINE=1", cache_dir=cache)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    refused(ID, "the address of http://hub.invalid cannot be found", "check the network", cache_dir=cache)
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("http", "https"))
    refused(ID, "no secure connection to https://", "SSL_CERT_FILE", cache_dir=cache)
    for nonsense in ("hub.example", "ftp://hub.example", "http://"):
        monkeypatch.setenv("HF_ENDPOINT", nonsense)
        refused(ID, "is not the address of a hub", "check HF_ENDPOINT", cache_dir=cache)


def test_a_proxy_that_refuses(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub.close_session()  # the proxy is looked up when a session begins
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    refused(ID, "the proxy does not let 'org/tiny' through", "check HTTPS_PROXY", cache_dir=cache)


def test_a_hub_that_does_not_answer(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.commit(ID, SINGLE)
    hub.fault("api", hold=threading.Event())
    refused(ID, "did not answer in time for 'org/tiny'", cache_dir=cache)


def test_a_token_that_is_none(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_größe")
    refused(ID, "cannot be written in ASCII", "check HF_TOKEN", cache_dir=cache)


@pytest.mark.parametrize(
    ("place", "how", "expected"),
    [
        ("resolve", {"method": "HEAD", "status": 500}, ["'model.safetensors' of 'org/tiny' with status 500"]),
        (
            "resolve",
            {"method": "HEAD", "status": 404, "headers": {"X-Error-Code": "EntryNotFound"}},
            ["lists", "have it"],
        ),
        ("resolve", {"method": "HEAD", "status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, ["is gated"]),
        ("resolve", {"method": "HEAD", "headers": {"X-Repo-Commit": "a" * 40}}, ["did not arrive as", "lists it"]),
        ("resolve", {"method": "HEAD", "headers": {"X-Linked-Size": "5"}}, ["arrived with another size than"]),
        ("cdn", {"status": 500}, ["'model.safetensors' of 'org/tiny' with status 500", "try again later"]),
        ("cdn", {"status": 403}, ["refuses access to 'model.safetensors'"]),
        ("cdn", {"body": b"short"}, ["arrived with another size than", "run it again"]),
        ("cdn", {"cut": 0}, ["the connection to http", "broke off at 'model.safetensors' of 'org/tiny'"]),
    ],
    ids=str,
)
def test_a_file_fails(
    hub: Hub, cache: Path, naps: list[float], place: str, how: dict[str, Any], expected: list[str]
) -> None:
    hub.commit(ID, SINGLE)
    fault = hub.fault(place, "model.safetensors", **how)
    refused(ID, *expected, cache_dir=cache)
    refused(ID, "is not in the cache", "this is offline", cache_dir=cache, offline=True)
    assert not list(cache.rglob("*.incomplete"))
    fault.times = 0
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE


def test_a_small_file_fails(hub: Hub, cache: Path, naps: list[float]) -> None:
    commit = hub.commit(ID, SINGLE)
    fault = hub.fault("resolve", "tokenizer.json", status=500)
    refused(ID, "'tokenizer.json' of 'org/tiny' with status 500", cache_dir=cache)
    expected = "no 'config.json'"  # so that no folder without its tokenizer looks complete
    refused(ID, expected, cache_dir=cache, revision=commit, offline=True, weights=False)
    fault.times = 0
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE


def test_not_what_was_listed(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SINGLE)
    hub.size_in_listing["model.safetensors"] = 10**4
    refused(ID, "did not arrive as", "lists it: expected 10000 bytes", cache_dir=cache)
    assert contents(next(cache.rglob("snapshots/*"))) == SMALL
    hub.size_in_listing.clear()
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE


def test_passing_failures_are_waited_for(
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
    refused(ID, "the disk of the cache", "is full, 'org/tiny' is incomplete", "free some space", cache_dir=cache)
    assert contents(next(cache.rglob("snapshots/*"))) == SMALL
    assert not list(cache.rglob("*.incomplete"))


def test_a_cache_that_cannot_be_made(hub: Hub, tmp_path: Path) -> None:
    hub.commit(ID, SINGLE)
    (tmp_path / "file").write_bytes(b"")
    refused(ID, "the cache", "cannot be written (", "check its permissions", cache_dir=tmp_path / "file/cache")
    if os.geteuid():  # nothing is forbidden to root
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(ID, "cannot be written (permission denied)", cache_dir=tmp_path / "locked/cache")


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
    refused(ID, f"'org/tiny' is not in the cache {cache}, and this is offline", cache_dir=cache, offline=True)
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
    message = refused(ID, "offline: no 'model-00001-of-00002.safetensors', 'model-00002", cache_dir=cache, offline=True)
    assert message.endswith("fetch it once while not offline")
    (folder / "config.json").unlink()
    refused(ID, "offline: no 'config.json'", cache_dir=cache, weights=False, offline=True)


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
    script = "import sys, pathlib, convert.hub as hub; hub.fetch('org/tiny', cache_dir=pathlib.Path(sys.argv[1]))"
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
