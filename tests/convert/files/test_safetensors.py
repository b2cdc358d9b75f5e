# SPDX-License-Identifier: Apache-2.0
"""The header reader against the safetensors library, and against hostile files."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from convert.files.header import BITS
from convert.files.safetensors import TensorInfo, read_checkpoint, read_header
from jaxserve.errors import CheckpointError
from tests.convert.crafted import blob, entry, one, refused


def test_agrees_with_the_library(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    dtypes = ["f2", "f4", "f8", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "?", "c8"]
    arrays = {f"t.{d}": np.arange(6).reshape(2, 3).astype(d) for d in dtypes}
    arrays |= {"scalar": np.float32(7), "empty": np.zeros((0, 5), "f4"), "größe": np.ones(1, "f4")}
    save_file({name: np.asarray(a) for name, a in arrays.items()}, path, metadata={"format": "np"})
    ours = read_checkpoint(tmp_path)
    raw = path.read_bytes()
    with safe_open(path, framework="np") as theirs:
        assert sorted(theirs.keys()) == sorted(ours)
        for name, info in ours.items():
            assert info.file == path
            assert list(info.shape) == theirs.get_slice(name).get_shape()
            assert info.dtype == theirs.get_slice(name).get_dtype()
            assert raw[info.start : info.stop] == theirs.get_tensor(name).tobytes()


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_knows_the_size_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    size = 8 * BITS[dtype] // 8
    file = blob({"a": entry(dtype, [2, 4], [0, size])}, bytes(size))
    assert deserialize(file)[0][1]["shape"] == [2, 4]
    path = tmp_path / "x.safetensors"
    path.write_bytes(file)
    start = len(file) - size
    assert read_header(path) == {"a": TensorInfo(dtype, (2, 4), start, len(file), path)}


def test_sees_every_dtype_of_the_library() -> None:
    with pytest.raises(SafetensorError) as caught:
        deserialize(one(dtype="NOPE"))
    listed = str(caught.value).split("expected one of")[1].split("at line")[0]
    assert {part.strip(" `") for part in listed.split(",")} == set(BITS)


FINE = {
    "no tensors": blob({}),
    "padded": blob(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}      ', b"\0"),
    "roomy": blob(b' { "a" : { "data_offsets" : [ 0 , 1 ] , "shape":[ ] , "dtype":"U8" } } ', b"\0"),
    "null metadata": blob({"__metadata__": None}),
    "escapes": blob(b'{"__metadata__":{"a":"\\u00e9 \\ud83d\\ude00 \\" {["}}'),
    "empty ones": blob(
        {"z": entry(shape=[0], offsets=[1, 1]), "a": entry(shape=[0, 9], offsets=[0, 0])} | {"m": entry()},
        b"\0",
    ),
    "unaligned": blob({"a": entry(), "b": entry("F32", [1], [1, 5])}, bytes(5)),
    "unordered": blob({"b": entry(offsets=[1, 2]), "a": entry()}, bytes(2)),
}


@pytest.mark.parametrize("file", FINE.values(), ids=FINE.keys())
def test_accepts_what_the_library_accepts(tmp_path: Path, file: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file)
    assert sorted(read_header(path)) == sorted(name for name, _ in deserialize(file))


HOSTILE = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "length past the end": (b"\xff\0\0\0\0\0\0\0{}", "only 2 bytes follow"),
    "length 2^64-1": (b"\xff" * 8 + b"{}", "at most 100000000"),
    "length over the limit": ((10**8 + 1).to_bytes(8, "little") + b"{}", "at most 100000000"),
    "zero length": (b"\0" * 8, "must be a JSON object"),
    "not JSON": (blob(b"hello"), "must be a JSON object"),
    "a pickle": (b"PK\x03\x04" + b"\0" * 40, "header of"),
    "an array": (blob([]), "must be a JSON object"),
    "a number": (blob(5), "must be a JSON object"),
    "cut off": (blob(b'{"a":{"dtype":"U8"'), "not well-formed"),
    "two objects": (blob(b"{}{}"), "has data after"),
    "trailing comma": (blob(b'{"__metadata__":{},}'), "not well-formed"),
    "comment": (blob(b"{/**/}"), "not well-formed"),
    "utf-16": (blob("{}".encode("utf-16")), "must be a JSON object"),
    "bad utf-8": (blob(b'{"\xff":{}}'), "not valid UTF-8"),
    "lone surrogate": (blob(b'{"\\ud800":{}}'), "not valid UTF-8"),
    "bad escape": (blob(b'{"\\x":{}}'), "not valid UTF-8"),
    "newline in a name": (blob(b'{"a\nb":{}}'), "not well-formed"),
    "escaped newline in a name": (blob({"a\nb\x1b[31m": {}}), "a\\nb\\x1b[31m"),
    "name of a megabyte": (blob({"a" * 10**6: {}}), "aaa…"),
    "name twice": (blob(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)), "'a' twice"),
    "field twice": (blob(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' twice"),
    "metadata twice": (blob(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "metadata a list": (blob({"__metadata__": []}), "__metadata__ must be"),
    "metadata not strings": (blob({"__metadata__": {"a": 1}}), "must be a string"),
    "metadata nested": (blob({"__metadata__": {"a": {}}}), "must be a string"),
    "entry a list": (blob({"a": [1]}), "tensor 'a' must be a JSON object"),
    "entry null": (blob({"a": None}), "tensor 'a' must be a JSON object"),
    "no dtype": (blob({"a": {"shape": [], "data_offsets": [0, 0]}}), "'a' has no dtype"),
    "no shape": (blob({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "'a' has no shape"),
    "no offsets": (blob({"a": {"dtype": "U8", "shape": []}}), "'a' has no data_offsets"),
    "unknown field": (blob({"a": {"stride": [1]}}), "unknown field 'stride'"),
    "unknown dtype": (one(dtype="F7"), "'a' has dtype 'F7', expected one of"),
    "lower-case dtype": (one(dtype="u8"), "'a' has dtype 'u8'"),
    "dtype a number": (one(dtype=8), "'a': dtype must be a string"),
    "dtype of wrong size": (one(dtype="F32"), "F32 of shape [1] needs 4 bytes"),
    "half a byte": (one(dtype="F4", shape=[1]), "F4 of shape [1] needs 0.5 bytes"),
    "negative dimension": (one(shape=[-1]), "'a': shape must be"),
    "two negative dimensions": (one(shape=[-1, -1]), "'a': shape must be"),
    "float dimension": (one(shape=[1.0]), "'a': shape must be"),
    "exponent dimension": (blob(b'{"a":{"shape":[1e0]}}'), "'a': shape must be"),
    "bool dimension": (one(shape=[True]), "'a': shape must be"),
    "string dimension": (one(shape=["1"]), "'a': shape must be"),
    "null dimension": (one(shape=[None]), "'a': shape must be"),
    "NaN dimension": (one(shape=[float("nan")]), "'a': shape must be"),
    "octal dimension": (blob(b'{"a":{"shape":[01]}}'), "'a': shape must be"),
    "shape a number": (one(shape=1), "'a': shape must be"),
    "nested shape": (one(shape=[[1]]), "'a': shape must be"),
    "65 dimensions": (one(shape=[1] * 65), "at most 64"),
    "dimension 2^63": (one(shape=[2**63]), "2^63-1"),
    "dimension 2^64+1": (one(shape=[2**64 + 1]), "2^63-1"),
    "product wraps to 1": (one(shape=[2**32, 2**32, 2**2]), "needs over 2^60 bytes"),
    "product of a thousand digits": (one(shape=[2**62] * 64), "needs over 2^60 bytes"),
    "5000 digits": (blob(b'{"a":{"shape":[1' + b"0" * 5000 + b"]}}"), "'a': shape must be"),
    "begin > end": (one(shape=[0], offsets=[1, 0]), "begin <= end"),
    "one offset": (one(offsets=[0]), "begin <= end"),
    "three offsets": (one(offsets=[0, 1, 1]), "begin <= end"),
    "negative offset": (one(offsets=[-1, 0]), "'a': data_offsets must be"),
    "huge offset": (one(offsets=[2**63 - 2, 2**63 - 1]), "leaves a gap"),
    "past the end": (one(shape=[2], offsets=[0, 2]), "'a' is truncated"),
    "far past the end": (one(shape=[2**60], offsets=[0, 2**60]), "'a' is truncated"),
    "hole in front": (one(offsets=[1, 2]), "'a' leaves a gap"),
    "hole between": (
        blob({"a": entry(), "b": entry(offsets=[2, 3])}, bytes(3)),
        "'b' leaves a gap before it: begins at data byte 2, expected 1",
    ),
    "overlap": (blob({"a": entry(), "b": entry()}, b"\0"), "'b' overlaps"),
    "overlap inside": (
        blob({"a": entry(shape=[3], offsets=[0, 3]), "b": entry(offsets=[1, 2])}, bytes(3)),
        "'b' overlaps",
    ),
    "empty tensor inside another": (
        blob({"a": entry(shape=[2], offsets=[0, 2]), "b": entry(shape=[0], offsets=[1, 1])}, b"00"),
        "'b' overlaps",
    ),
    "bytes left over": (blob({"a": entry()}, bytes(3)), "the last 2 bytes belong to no tensor"),
    "deep lists": (blob(b'{"a":{"shape":' + b"[" * 10**6), "'a': shape must be"),
    "deep objects": (blob(b'{"a":' * 10**6), "unknown field 'a'"),
}


@pytest.mark.parametrize(("file", "complaint"), HOSTILE.values(), ids=HOSTILE.keys())
def test_rejects_a_hostile_file(tmp_path: Path, file: bytes, complaint: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file)
    assert str(path) in refused(path, complaint)


@pytest.mark.parametrize(
    "filler",
    [
        b"[],",
        b"{},",
        b"1,",
        b"9999,",
        b'"",',
        b"[",
        b'{"a":',
        b'"\\u0041',
        b" ",
        b"\\\\",
        b'"a":"b",',
    ],
)
@pytest.mark.parametrize(
    "start",
    [b"{", b'{"a":{"shape":[', b'{"__metadata__":{"a":"', b'{"a":{"dtype":"'],
)
def test_time_and_memory_stay_in_proportion(tmp_path: Path, start: bytes, filler: bytes) -> None:
    path = tmp_path / "x.safetensors"
    text = start + filler * (2_000_000 // len(filler))
    path.write_bytes(blob(text))
    tracemalloc.start()
    began = time.perf_counter()
    try:
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(text)
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 2  # 10 ms here; a quadratic reader needs minutes


def test_many_tensors_are_read_quickly(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob({f"layers.{i}": entry(offsets=[i, i + 1]) for i in range(20_000)}, b"0" * 20_000))
    began = time.perf_counter()
    assert len(read_header(path)) == 20_000
    assert time.perf_counter() - began < 5  # 0.2 s here


# -- mutations

VALID = blob(
    {
        "__metadata__": {"format": "pt"},
        "model.embed": entry("BF16", [2, 4], [0, 16]),
        "model.norm": entry("F32", [4], [16, 32]),
        "fp4": entry("F4", [2, 3], [32, 35]),
    },
    bytes(35),
)


def both(file: bytes, path: Path) -> None:
    """Our reader rejects only with CheckpointErrors, and accepts only what the library accepts."""
    path.write_bytes(file)
    try:
        ours = read_header(path)
    except CheckpointError as error:
        assert str(error).isprintable()
        return
    theirs = dict(deserialize(file))
    assert ours.keys() == theirs.keys()
    for name, info in ours.items():
        assert (info.dtype, list(info.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert file[info.start : info.stop] == bytes(theirs[name]["data"])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


@given(st.data())
def test_random_bytes_in_a_valid_file(scratch: Path, data: st.DataObject) -> None:
    file = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(file) - 1))
        cut = data.draw(st.integers(0, 3))
        file[at : at + cut] = data.draw(st.binary(max_size=3) | st.sampled_from(SPICE))
    both(bytes(file), scratch)


SPICE = [
    b"-1",
    b"0",
    b"9" * 30,
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b'"',
    b"\\",
    b"null",
    b"true",
    b"1e9",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
SHAPE = st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**63, 2**64]), max_size=3)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*sorted(BITS), "I4"]) | JSON,
        "shape": SHAPE | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRY | JSON, max_size=3))
def test_random_headers(scratch: Path, content: dict[str, Any]) -> None:
    both(blob(content, bytes(32)), scratch)


@given(st.binary(max_size=60))
def test_random_files(scratch: Path, file: bytes) -> None:
    both(file, scratch)
