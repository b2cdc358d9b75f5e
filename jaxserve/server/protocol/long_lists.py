# SPDX-License-Identifier: Apache-2.0
"""Reads long lists of token ids from a body, piece by piece.

pydantic converts a whole body in one call, in which no other Python thread runs: half a million ids would stop all
streams for a tenth of a second. A field with the note LONG_IDS is read here instead, and pydantic sees a list of the
same shape with one id.
"""

from collections.abc import Mapping

import msgspec
from pydantic.fields import FieldInfo

PIECE = 2**15  # bytes


class LongIds:
    """Annotates a field that may be a list of token ids, or a list of such lists."""


LONG_IDS = LongIds()

type Ids = list[int] | list[list[int]]

_ids = msgspec.json.Decoder(list[int])
_lists = msgspec.json.Decoder(list[msgspec.Raw])
_body = msgspec.json.Decoder(dict[str, msgspec.Raw])


def taken_out(raw: bytes, fields: Mapping[str, FieldInfo]) -> tuple[bytes, dict[str, Ids]]:
    """The body with one id in place of each long list, and the lists by field. Faults are left for pydantic to find."""
    names = [name for name, field in fields.items() if LONG_IDS in field.metadata]
    taken: dict[str, Ids] = {}
    if not names:
        return raw, taken
    try:
        body = _body.decode(raw)
        for name in names:
            value = body.get(name)
            if value is not None and len(memoryview(value)) > PIECE and (found := _read(bytes(value))) is not None:
                body[name], taken[name] = found
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return raw, {}
    return (msgspec.json.encode(body), taken) if taken else (raw, taken)


def _read(value: bytes) -> tuple[msgspec.Raw, Ids] | None:
    """What stands for the list, and the list; None if it is no list of ids."""
    inside = value[1:64].lstrip()
    if value[:1] != b"[" or not inside:
        return None
    if inside[:1] == b"[":
        parts = _lists.decode(value)
        return msgspec.Raw(b"[" + b",".join([b"[0]"] * len(parts)) + b"]"), [_flat(bytes(part)) for part in parts]
    if inside[:1].isdigit() or inside[:1] == b"-":
        return msgspec.Raw(b"[0]"), _flat(value)
    return None


def _flat(value: bytes) -> list[int]:
    """The ids of a list. Raises a DecodeError for anything else."""
    if len(value) <= PIECE:
        return _ids.decode(value)
    made: list[int] = []
    begin, last = 1, len(value) - 1  # inside the brackets
    while begin < last:
        end = value.find(b",", begin + PIECE, last)
        end = last if end < 0 else end
        made += _ids.decode(b"[%b]" % value[begin:end])
        begin = end + 1
    return made
