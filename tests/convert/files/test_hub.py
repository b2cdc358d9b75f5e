# SPDX-License-Identifier: Apache-2.0
"""From a name to a folder, against a fake hub: which files, which commit, and which names are rejected."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.file_download
import huggingface_hub.utils
import pytest
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from convert.files.hub import fetch
from convert.files.safetensors import read_checkpoint
from jaxserve.errors import CheckpointError
from tests.convert.hub_server import Hub
from tests.convert.repositories import ID, INDEX, JUNK, MODULES, SHARDS, SINGLE, SMALL, WEIGHTS, contents, refused

pytestmark = pytest.mark.usefixtures("hub")


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


def test_folders_without_a_model(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    refused("file", "is a file, not a model folder", "name the folder")
    refused("./file", "is a file")
    refused("empty", "has no config.json")
    for path in ("./absent", "/absent", "~/absent", "a/b/c", "org/tiny/", "C:\\models\\x", "file/x/y", "../x"):
        refused(path, "does not exist", "check the path, or name a Hub model as org/name")
    refused("https://huggingface.co/org/tiny", "does not exist", "name a Hub model as org/name")
    refused("./loop", "(too many levels")
    refused("./nul\0", "cannot read folder")
    refused("/" + "x" * 5000, "(file name too long)")
    assert hub.asked == []


@pytest.mark.parametrize("source", ["/no/such/model", "no way", "./gone"])
def test_a_wrong_path_is_found_before_anything_heavy_is_imported(source: str) -> None:
    script = (
        "import sys\n"
        "from convert.files.hub import fetch\n"
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
def test_rejects_invalid_hub_ids(hub: Hub, source: str) -> None:
    refused(source, "neither a local folder nor a valid Hub ID", "name a Hub model as org/name")
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
def test_rejects_invalid_revisions(hub: Hub, revision: str) -> None:
    for offline in (False, True):
        refused(ID, "is not a valid revision", revision=revision, offline=offline)
    assert hub.asked == []


# -- downloads


def test_downloads_only_what_is_needed(hub: Hub, cache: Path) -> None:
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


def test_a_single_file_takes_precedence_over_an_index(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SINGLE | INDEX | SHARDS)
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE


def test_downloads_what_makes_embeddings_of_hidden_states(hub: Hub, cache: Path) -> None:
    hub.commit(ID, JUNK | SINGLE | MODULES)
    assert contents(fetch(ID, cache_dir=cache)) == SINGLE | MODULES
    assert hub.bodies()[-2:] == ["config.json", "model.safetensors"]
    hub.commit("org/foreign", SMALL | MODULES | {"pytorch_model.bin": b""})
    refused("org/foreign", "has no model.safetensors", "only 'pytorch_model.bin'", cache_dir=cache)


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


def test_the_token_is_sent_only_to_the_hub(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_no_progress_without_a_terminal(hub: Hub, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
    """The fake hub has no xet, so this test makes the calls that huggingface_hub makes while downloading with it."""
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
def test_rejects_an_index_that_leads_elsewhere(hub: Hub, cache: Path, shard: object) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    hub.commit(ID, SMALL | {"model.safetensors.index.json": index, str(shard): b"x"})
    refused(ID, "expected the plain name of a .safetensors file beside it", cache_dir=cache)
    assert sorted(hub.bodies()) == sorted([*SMALL, *INDEX])
    refused(ID, "expected the plain name", cache_dir=cache, revision=_only_commit(hub), offline=True)


def _only_commit(hub: Hub) -> str:
    (commit,) = hub.repositories[ID].commits
    return commit


def test_rejects_an_index_of_missing_shards(hub: Hub, cache: Path) -> None:
    hub.commit(ID, SMALL | INDEX)
    refused(ID, "has no 'model-00001-of-00002.safetensors', 'model-00002", "which its", "lists", cache_dir=cache)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"pytorch_model.bin": b""}, ["only 'pytorch_model.bin'", "refs/pr/N", "save_pretrained"]),
        ({"a-Q4.gguf": b"", "b-Q8.gguf": b""}, ["only 'a-Q4.gguf'", "that the GGUF files were made from"]),
        ({"consolidated.safetensors": b""}, ["only 'consolidated.safetensors'", "contains safetensors weights"]),
        ({"model-00001-of-00002.safetensors": b""}, ["no model.safetensors.index.json"]),
        ({"README.md": b""}, ["no other weights"]),
    ],
)
def test_rejects_a_repository_without_safetensors(
    hub: Hub, cache: Path, files: dict[str, bytes], expected: list[str]
) -> None:
    hub.commit(ID, SMALL | files)
    refused(ID, "has no model.safetensors", *expected, cache_dir=cache)
    assert hub.bodies() == []


def test_rejects_a_repository_without_a_config(hub: Hub, cache: Path) -> None:
    hub.commit(ID, {"model.safetensors": WEIGHTS})
    refused(ID, "has no config.json", cache_dir=cache)
    assert hub.bodies() == []
