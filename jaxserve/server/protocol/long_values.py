# SPDX-License-Identifier: Apache-2.0
"""Reads long texts and long lists of token ids from a body, piece by piece.

pydantic converts a whole body in one call, in which no other Python thread runs: half a million ids or 30 MB of text
would stop all streams for a tenth of a second. A field with the note LONG is read here instead, and pydantic sees a
value of the same shape with one id or letter.
"""

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.fields import FieldInfo

PIECE = 2**15  # bytes
TEXT_PIECE = 2**18
LONG_TEXT = 2**16  # bytes of a text within a message that is read here
WINDOW = 8  # more than the bytes of an escape


class Long:
    """Annotates a field that may be a text, a list of texts, a list of token ids, or a list of such lists."""


class LongMessages:
    """Annotates a list of messages."""


LONG, LONG_MESSAGES = Long(), LongMessages()

Value = str | list[str] | list[int] | list[list[int]]
Texts = dict[tuple[int, int | None], str]  # by the place of a message, and of the part of its content
Taken = dict[str, Value | Texts]

_ids = msgspec.json.Decoder(list[int])
_listed = msgspec.json.Decoder(list[msgspec.Raw])
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_objects = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_text = msgspec.json.Decoder(str)


def taken_out(raw: bytes, fields: Mapping[str, FieldInfo]) -> tuple[bytes, Taken]:
    """The body with a short value in place of each long one, and the long ones by field. Long texts of unknown fields
    are dropped. Faults are left for pydantic to find."""
    try:
        return _taken_out(raw, fields)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return raw, {}


def _taken_out(raw: bytes, fields: Mapping[str, FieldInfo]) -> tuple[bytes, Taken]:
    body, taken, changed = _object.decode(raw), Taken(), False
    for name, value in body.items():
        if len(memoryview(value)) <= PIECE:
            continue
        notes: Collection[Any] = fields[name].metadata if name in fields else ()
        found: tuple[msgspec.Raw, Value | Texts] | None = None
        if name not in fields and bytes(memoryview(value)[:1]) == b'"':
            body[name], changed = msgspec.Raw(b"0"), True
        elif LONG in notes:
            found = _read(bytes(value))
        elif LONG_MESSAGES in notes:
            found = _messages(value)
        if found is not None:
            body[name], taken[name] = found
            changed = True
    return (msgspec.json.encode(body), taken) if changed else (raw, taken)


def put_back[B: BaseModel](body: B, taken: Taken) -> B:
    """The body with what was taken out."""
    values: dict[str, Any] = {}
    for name, value in taken.items():
        values[name] = _with_texts(getattr(body, name), value) if isinstance(value, dict) else value
    return body.model_copy(update=values) if values else body


def _read(value: bytes) -> tuple[msgspec.Raw, Value] | None:
    """What stands for the value, and the value; None if it is neither texts nor ids."""
    if value[:1] == b'"':
        return msgspec.Raw(b'"x"'), text(value)
    inside = value[1:64].lstrip()
    if value[:1] != b"[" or not inside:
        return None
    if inside[:1] == b'"':
        return _texts(value)
    if inside[:1] == b"[":
        parts = _listed.decode(value)
        return msgspec.Raw(b"[" + b",".join([b"[0]"] * len(parts)) + b"]"), [_flat(bytes(part)) for part in parts]
    if inside[:1].isdigit() or inside[:1] == b"-":
        return msgspec.Raw(b"[0]"), _flat(value)
    return None


def _texts(value: bytes) -> tuple[msgspec.Raw, Value] | None:
    parts = [bytes(part) for part in _listed.decode(value)]
    if any(part[:1] != b'"' for part in parts):
        return None
    return msgspec.Raw(b"[" + b",".join([b'"x"'] * len(parts)) + b"]"), [text(part) for part in parts]


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


def text(value: bytes) -> str:
    """A text from its JSON. Raises a DecodeError for anything else."""
    if len(value) <= TEXT_PIECE:
        return _text.decode(value)
    made: list[str] = []
    begin, last = 1, len(value) - 1  # inside the quotation marks
    while begin < last:
        end = _cut(value, begin, last)
        made.append(_text.decode(b'"%b"' % value[begin:end]))
        begin = end
    return "".join(made)


def _cut(value: bytes, begin: int, last: int) -> int:
    """Where to end the piece that begins here: not within a character, nor between the two escapes of one."""
    near = begin + TEXT_PIECE
    while near < last:
        escape = value.find(b"\\", near, near + WINDOW)
        if escape < 0:  # what began before has ended
            near += WINDOW
            while near < last and value[near] & 0xC0 == 0x80:
                near += 1
            break
        before = value[begin:escape]
        escaped = (len(before) - len(before.rstrip(b"\\"))) % 2
        if not escaped and value[escape + 1 : escape + 4].lower() not in (b"udc", b"udd", b"ude", b"udf"):
            near = escape
            break
        near = escape + 1
    return min(near, last)


# --- messages -------------------------------------------------------------------------------------------------------


def _messages(value: msgspec.Raw) -> tuple[msgspec.Raw, Texts] | None:
    messages, taken = _objects.decode(value), Texts()
    for place, message in enumerate(messages):
        content = message.get("content")
        if content is None or len(memoryview(content)) <= LONG_TEXT:
            continue
        first = memoryview(content)[:1].tobytes()
        if first == b'"':
            taken[place, None], message["content"] = text(bytes(content)), msgspec.Raw(b'"x"')
        elif first == b"[":
            message["content"] = _parts(content, place, taken)
    return (msgspec.Raw(msgspec.json.encode(messages)), taken) if taken else None


def _parts(content: msgspec.Raw, place: int, taken: Texts) -> msgspec.Raw:
    parts = _objects.decode(content)
    for index, part in enumerate(parts):
        long = part.get("text")
        if long is not None and len(memoryview(long)) > LONG_TEXT and bytes(memoryview(long)[:1]) == b'"':
            taken[place, index], part["text"] = text(bytes(long)), msgspec.Raw(b'"x"')
    return msgspec.Raw(msgspec.json.encode(parts))


def _with_texts(messages: list[Any], texts: Texts) -> list[Any]:
    messages = list(messages)
    for (place, index), content in texts.items():
        if index is None:
            update: Any = content
        else:
            update = list(messages[place].content)
            update[index] = update[index].model_copy(update={"text": content})
        messages[place] = messages[place].model_copy(update={"content": update})
    return messages
