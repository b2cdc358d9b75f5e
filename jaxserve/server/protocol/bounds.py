# SPDX-License-Identifier: Apache-2.0
"""Limits the size of a body before it is parsed into objects, during much of which no other Python thread runs.

pydantic collects every fault of an object before it fails: half a million unknown keys would take two seconds.
"""

from collections.abc import Collection
from functools import cache

import msgspec

from jaxserve.server.errors import ApiError, bad_request

# Every value of a body becomes a Python object. This many take up to 0.2 s and are enough for 1024 prompts of 500 ids.
MAX_VALUES = 2**19
MAX_KEYS = 1024  # of the body, and of an object within it
MAX_NESTED_KEYS = 2**14  # of all unknown fields, or of an object, with those of the objects within it
SMALL = 2**16  # bytes; smaller bodies need no check

_Object = dict[str, msgspec.Raw]


def check(raw: bytes, fields: Collection[str]) -> str | None:
    """Return the body's first unknown key, if any. Raises an ApiError for a body that is too large.

    Invalid JSON passes; the parser rejects it.
    """
    if len(raw) < SMALL:
        return None
    values = sum(raw.count(mark) for mark in (b",", b"[", b"{")) if len(raw) > MAX_VALUES else 0
    if values > MAX_VALUES:
        raise ApiError(
            400, f"The body has about {values} values, above the limit of {MAX_VALUES}. Send less per request."
        )
    unknown: str | None = None
    try:
        if _keys(raw) > MAX_NESTED_KEYS:
            _check_unknown(raw, fields)
        body = msgspec.json.decode(raw, type=_Object)
        if len(body) > MAX_KEYS:
            raise bad_request(None, "the body has too many keys", f"use at most {MAX_KEYS}")
        for name, value in body.items():
            _check_inside(name, value)
            if name not in fields and unknown is None:
                unknown = name
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return unknown


def _check_unknown(raw: bytes, fields: Collection[str]) -> None:
    """Reject a body with very many unknown keys without making an object of each."""
    known = msgspec.structs.asdict(_known(frozenset(fields)).decode(raw))
    inside = sum(_keys(bytes(value)) for value in known.values() if isinstance(value, msgspec.Raw))
    if _keys(raw) - inside > MAX_NESTED_KEYS:
        raise bad_request(None, "the body has too many keys", f"use at most {MAX_KEYS}")


@cache
def _known(fields: frozenset[str]) -> msgspec.json.Decoder[msgspec.Struct]:
    """Decodes the known fields of a body and skips the rest."""
    members = [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in sorted(fields)]
    return msgspec.json.Decoder(msgspec.defstruct("Known", members))


def _keys(raw: bytes) -> int:
    """The number of keys in a body as programs write it, with no space before the colon."""
    return raw.count(b'":') - raw.count(b'\\":')


def _check_inside(name: str, value: msgspec.Raw) -> None:
    match memoryview(value)[:1].tobytes():
        case b"{":
            few = _keys(bytes(value)) <= MAX_NESTED_KEYS
            objects = [msgspec.json.decode(value, type=_Object)] if few else []
        case b"[" if name == "messages":
            few, objects = True, msgspec.json.decode(value, type=list[_Object])
        case _:
            return
    if not few or any(len(each) > MAX_KEYS for each in objects):
        raise bad_request(name, f"{name} has an object with too many keys", f"use at most {MAX_KEYS}")
