# SPDX-License-Identifier: Apache-2.0
"""Model folders: shards and their index, what is rejected, and the error messages."""

import json
import os
from pathlib import Path

import pytest

from convert.files.safetensors import read_checkpoint
from tests.convert.crafted import blob, entry, refused


def write_index(folder: Path, weight_map: object, **more: object) -> None:
    text = json.dumps({"metadata": {"total_size": 2}, "weight_map": weight_map, **more})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "1.safetensors").write_bytes(blob({"a": entry(), "b": entry(offsets=[1, 2])}, b"00"))
    (tmp_path / "2.safetensors").write_bytes(blob({"c": entry()}, b"0"))
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    return tmp_path


def test_reads_shards_through_the_index(sharded: Path) -> None:
    files = {name: info.file.name for name, info in read_checkpoint(sharded).items()}
    assert files == {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}


def test_reads_a_folder_of_links_as_download_caches_make_it(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in list(sharded.glob("*.*")):
        (snapshot / file.name).symlink_to(f"../{file.name}")
    assert len(read_checkpoint(snapshot)) == 3


@pytest.mark.parametrize(
    "shard",
    [
        *(
            "../1.safetensors",
            "/etc/passwd",
            "/1.safetensors",
            "./1.safetensors",
            "x/1.safetensors",
        ),
        *("..", ".", "", "..\\1.safetensors", "C:1.safetensors", "1.bin", "1.safetensors\0", "\n"),
        *("\ud800.safetensors", 5, None, ["1.safetensors"], {}),
    ],
)
def test_rejects_a_shard_outside_the_folder(sharded: Path, shard: object) -> None:
    write_index(sharded, {"a": "1.safetensors", "b": shard})
    refused(sharded, "weight_map maps tensor 'b' to", "beside it")


def test_rejects_a_missing_shard(sharded: Path) -> None:
    (sharded / "2.safetensors").unlink()
    refused(sharded, "2.safetensors: cannot be read (no such file or directory)")


def test_rejects_a_damaged_shard(sharded: Path) -> None:
    with (sharded / "1.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    refused(sharded, "1.safetensors: tensor 'b' is truncated")


def test_rejects_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    (sharded / "2.safetensors").write_bytes(blob({}))
    refused(sharded, "tensor 'c' is not in '2.safetensors'")


def test_rejects_a_tensor_that_the_index_lacks(sharded: Path) -> None:
    write_index(sharded, {"a": "1.safetensors", "c": "2.safetensors"})
    refused(sharded, "tensor 'b' is in '1.safetensors', but the index does not list it there")


def test_rejects_a_tensor_in_two_shards(sharded: Path) -> None:
    (sharded / "2.safetensors").write_bytes(blob({"c": entry(), "a": entry(offsets=[1, 2])}, b"00"))
    refused(sharded, "tensor 'a' is in '2.safetensors', but the index does not list it there")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"{}", "weight_map"),
        (b'{"weight_map":[]}', "weight_map"),
        (b'{"weight_map":{}}', "non-empty"),
        (b'{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}', "'a' twice"),
        (b'{"weight_map":{"a":"x"},"weight_map":{"a":"x"}}', "'weight_map' twice"),
        (b"[" * 100_000, "brackets"),
        (b"[" * 999 + b"]" * 999, ""),
        (b'{"weight_map":' + b"[]," * 10**6, "brackets"),
        (b'{"metadata":' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_rejects_a_hostile_index(sharded: Path, text: bytes, complaint: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text)
    refused(sharded, "model.safetensors.index.json", complaint)


def test_rejects_an_index_over_the_limit(sharded: Path) -> None:
    with (sharded / "model.safetensors.index.json").open("wb") as file:
        file.truncate(10**9)  # sparse: takes no room
    refused(sharded, "expected at most")


def test_rejects_pickles_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    refused(tmp_path, "contains weights only in an unsupported format", "save the model as safetensors")
    refused(tmp_path / "pytorch_model.bin", "is a .bin file", "save the model as safetensors")


def test_rejects_folders_without_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, "contains no safetensors checkpoint")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(blob({}))
    refused(tmp_path, "model.safetensors.index.json", "download the index too")


def test_rejects_a_path_that_is_not_a_file(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such file")
    refused(tmp_path / "nul\0", "is not a file name")
    refused(tmp_path / ("x" * 5000), "file name too long")
    loop = tmp_path / "model.safetensors"
    loop.symlink_to(loop)
    refused(tmp_path, "too many levels of symbolic links")
    loop.unlink()
    loop.mkdir()
    refused(tmp_path, "is not a regular file")
    loop.rmdir()
    os.mkfifo(loop)
    refused(tmp_path, "is not a regular file")  # opening it would block


def test_header_limit_holds_for_a_sparse_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((10**11).to_bytes(8, "little"))
        file.truncate(10**12)
    refused(path, "expected at most 100000000")
