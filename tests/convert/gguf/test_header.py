# SPDX-License-Identifier: Apache-2.0
"""The header reader against the package `gguf`, and against hostile files."""

import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.files.safetensors import read_checkpoint
from convert.gguf.header import MAX_ITEMS, read
from jaxserve.errors import CheckpointError
from tests.convert.crafted import refused
from tests.convert.gguf.crafted import ARRAY, BOOL, STRING, UINT32, blob, pair, tensor, text, typed


def test_agrees_with_the_package(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    pairs = {
        "a.uint8": (writer.add_uint8, 200),
        "a.int8": (writer.add_int8, -3),
        "a.uint16": (writer.add_uint16, 60000),
        "a.int16": (writer.add_int16, -300),
        "a.uint32": (writer.add_uint32, 2**32 - 1),
        "a.int32": (writer.add_int32, -(2**31)),
        "a.uint64": (writer.add_uint64, 2**64 - 1),
        "a.int64": (writer.add_int64, -(2**63)),
        "a.float32": (writer.add_float32, 0.5),
        "a.float64": (writer.add_float64, 0.1),
        "a.bool": (writer.add_bool, True),
        "a.text": (writer.add_string, "größer"),
        "a.texts": (writer.add_array, ["a", "", "é"]),
        "a.numbers": (writer.add_array, [1, -2, 3]),
        "a.reals": (writer.add_array, [0.5, -1.5]),
        "a.flags": (writer.add_array, [True, False]),
    }
    for key, (add, value) in pairs.items():
        add(key, value)
    arrays = {
        f"t{i}": np.arange(3 * 4 * 5, dtype=np.float32).reshape(shape)
        for i, shape in enumerate([(60,), (3, 20), (3, 4, 5)])
    }
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    quantized = gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read(path)
    assert {key: value for key, value in header.pairs.items() if key in pairs} == {
        key: value for key, (_, value) in pairs.items()
    }
    raw = path.read_bytes()
    theirs = {each.name: each for each in gguf.GGUFReader(path).tensors}
    assert header.tensors.keys() == theirs.keys()
    for name, info in header.tensors.items():
        assert info.file == path and info.dtype == theirs[name].tensor_type.name
        assert list(info.shape) == theirs[name].shape.tolist()[::-1]
        assert raw[info.start : info.stop] == theirs[name].data.tobytes()
    assert read_checkpoint(path) == header.tensors == read_checkpoint(tmp_path)


F32 = tensor("a", [8], 0, 0)
EIGHT = bytes(32)
FINE = {
    "empty": blob(),
    "version 2": blob(version=2),
    "alignment": blob({"general.alignment": 64}, [F32], EIGHT, alignment=64),
    "a gap": blob(tensors=[F32, tensor("b", [8], 0, 64)], data=bytes(96)),
    "unordered": blob(tensors=[tensor("b", [8], 0, 32), F32], data=bytes(64)),
    "data after": blob(tensors=[F32], data=bytes(999)),
}


@pytest.mark.parametrize("file", FINE.values(), ids=FINE.keys())
def test_accepts(tmp_path: Path, file: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(file)
    read(path)


HUGE = 2**63 + 5
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the magic number at byte 0 needs 4 bytes"),
    "another format": (b"PK\x03\x04" + bytes(50), "is not a GGUF file"),
    "version 1": (blob(version=1), "has GGUF version 1, expected 2 or 3"),
    "big endian": (blob(version=3 << 24), "written on a big-endian machine"),
    "huge tensor count": (blob(counts=(HUGE, 0)), f"claims {HUGE} tensors"),
    "huge pair count": (blob(counts=(0, HUGE)), f"claims {HUGE} key-value pairs"),
    "a few too many tensors": (blob(counts=(2, 0), tensors=[F32], data=bytes(64)), "dimensions"),
    "truncated pair": (blob([text("k" * 40)[:-9]], counts=(0, 1), alignment=1), "needs 40 bytes"),
    "huge key": (blob([struct.pack("<Q", HUGE), bytes(20)], counts=(0, 1)), f"has {HUGE} bytes, expected at most"),
    "key twice": (blob([pair("k", *typed(1)), pair("k", *typed(2))]), "has the key 'k' twice"),
    "key of no text": (blob([pair(b"\xff", *typed(1))]), "is not valid UTF-8"),
    "unknown type": (blob([pair("k", 13, bytes(8))]), "the value of 'k' has the unknown type 13"),
    "huge text": (blob([pair("k", STRING, struct.pack("<Q", 2**40))]), "has 1099511627776 bytes"),
    "a text of no text": (blob([pair("k", STRING, text(b"\xc3\x28"))]), "the value of 'k' at byte"),
    "huge array": (blob([pair("k", ARRAY, struct.pack("<IQ", UINT32, HUGE))]), f"has {HUGE} items"),
    "an array beyond the file": (blob([pair("k", ARRAY, struct.pack("<IQ", UINT32, MAX_ITEMS))]), "needs"),
    "texts beyond the file": (blob([pair("k", ARRAY, struct.pack("<IQ", STRING, MAX_ITEMS))]), "needs"),
    "nested arrays": (blob([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(40))]), "an array of type 9"),
    "half a boolean": (blob([pair("k", BOOL, b"\2")]), "is not a boolean"),
    "tensor twice": (blob(tensors=[F32, F32], data=EIGHT), "has the tensor 'a' twice"),
    "no dimensions": (blob(tensors=[tensor("a", [], 0, 0)], data=EIGHT), "has 0 dimensions"),
    "many dimensions": (
        blob(tensors=[text("a") + struct.pack("<I", 2**31) + bytes(30)]),
        "dimensions, expected 1 to 4",
    ),
    "zero size": (blob(tensors=[tensor("a", [0], 0, 0)], data=EIGHT), "has shape [0]"),
    "huge shape": (blob(tensors=[tensor("a", [2**62, 2**62], 0, 0)], data=EIGHT), "is truncated"),
    "no multiple of the block": (blob(tensors=[tensor("a", [33, 2], 2, 0)], data=bytes(99)), "multiple of 32 values"),
    "another quantization": (blob(tensors=[tensor("a", [256], 23, 0)], data=bytes(999)), "is stored as IQ4_XS"),
    "no format": (blob(tensors=[tensor("a", [256], 999, 0)], data=bytes(999)), "is stored as number 999"),
    "unaligned": (blob(tensors=[tensor("a", [8], 0, 4)], data=bytes(99)), "expected multiples of 32"),
    "overlap": (blob(tensors=[F32, tensor("b", [8], 0, 0)], data=bytes(99)), "tensor 'b' overlaps"),
    "truncated": (blob(tensors=[F32], data=bytes(31)), "tensor 'a' is truncated"),
    "huge offset": (blob(tensors=[tensor("a", [8], 0, 2**64 - 32)], data=EIGHT), "tensor 'a' is truncated"),
    "no alignment": (blob({"general.alignment": 0}), "has the alignment 0"),
    "odd alignment": (blob({"general.alignment": 24}), "has the alignment 24"),
    "alignment of a text": (blob({"general.alignment": "32"}), "has the alignment '32'"),
    "terminal codes": (blob(tensors=[tensor("\x1b[2J\n", [8], 999, 0)], data=EIGHT), r"\x1b[2J\n"),
}


@pytest.mark.parametrize(("file", "fault"), HOSTILE.values(), ids=HOSTILE.keys())
def test_rejects(tmp_path: Path, file: bytes, fault: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(file)
    tracemalloc.start()
    begun = time.monotonic()
    refused(path, str(path), fault)
    assert time.monotonic() - begun < 2
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_rejects_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "no such file")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    refused(tmp_path / "loop.gguf", "loop.gguf")


SAMPLE = blob(
    {"general.architecture": "llama", "a.list": ["x", "yz"], "a.flag": True, "a.numbers": [1, 2, 3], "a.real": 0.5},
    [F32, tensor("b", [32, 2], 2, 32)],
    bytes(32 + 36),
)


@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(SAMPLE))
)
def test_any_bytes_give_a_header_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], size: int
) -> None:
    data = bytearray(SAMPLE)
    for at, value in changes:
        data[at] = value
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(data[: size or len(data)])
    try:
        read(path)
    except CheckpointError as error:
        assert str(error).isprintable()
