# SPDX-License-Identifier: Apache-2.0
"""The messages between a parent and an engine's process: MessagePack in frames over a socket. No pickle, so no code.

    frame     8 bytes of length, then that many bytes: a list of all messages that were pending
    parent    Start, then Add, Abort, Call, Stop, handled in order
    child     Progress, ModelOpened, Started first; Turn, Refused, Returned after each turn; Beat; Failed at the end

Both processes run on one machine from one installation: times are on its monotonic clock, and messages have no version.
"""

import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from jaxserve.config import ConfigError
from jaxserve.engine.capacity import Limits
from jaxserve.errors import CheckpointError, EngineError, JaxserveError, OverloadedError, RequestError
from jaxserve.types.metrics import EngineMetrics
from jaxserve.types.outputs import Update
from jaxserve.types.request import Abort, Request

LENGTH = struct.Struct("<Q")
# Far more than any step can produce; a greater length means that the stream is corrupt.
MOST_BYTES = 2**36
READ_AHEAD = 1 << 20

# The engine's methods that a parent may call, with the types of their results.
CALLS: Mapping[str, Any] = {
    **dict.fromkeys(("abort", "also_ends", "reset_prefix_cache", "start_profile", "wake"), None),
    "sleep": bool,
    "metrics": EngineMetrics,
    "stop_profile": Path,
}


class WireMessage(msgspec.Struct, array_like=True, tag=str.lower):
    pass


# --- from the parent ------------------------------------------------------------------------------------------------


class Start(WireMessage):
    config: dict[str, Any]  # the fields of an EngineConfig
    watchdog: float | None


class Add(WireMessage):
    request_id: str
    request: msgspec.Raw  # a Request, encoded separately: if it cannot be decoded, only this request is rejected
    prompt: bytes  # its prompt_token_ids if they are an int32 array: the engine need not visit each of them


class Call(WireMessage):
    number: int  # repeated in the Returned message
    name: str
    arguments: dict[str, Any]


class Stop(WireMessage):
    pass


# --- from the child -------------------------------------------------------------------------------------------------


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """An error to raise again in the parent."""

    kind: str
    problem: str
    hint: str
    field: str = ""


class Progress(WireMessage):
    what: str
    done: int
    total: int


class ModelOpened(WireMessage):
    """The model's properties, sent once its configuration is read and before anything is compiled."""

    folder: str | None  # the model's folder
    limits: Limits
    sampling_defaults: dict[str, Any]
    family: str
    layers: int
    dtype: str
    parameters: int  # the number of parameters, including padding
    weight_bytes: int  # per device


class Started(WireMessage):
    """The engine accepts requests from now on."""


class Turn(WireMessage):
    updates: list[Update]
    metrics: EngineMetrics


class Refused(WireMessage):
    request_id: str
    fault: Fault


class Returned(WireMessage):
    number: int
    result: msgspec.Raw = msgspec.Raw(b"\xc0")  # null
    fault: Fault | None = None


class Beat(WireMessage):
    """A heartbeat: seconds since the last turn ended, and whether there is work."""

    age: float
    working: bool


class Failed(WireMessage):
    """The last message of a process that fails."""

    fault: Fault


type FromParent = Start | Add | Abort | Call | Stop
type FromChild = Progress | ModelOpened | Started | Turn | Refused | Returned | Beat | Failed

_request = msgspec.msgpack.Decoder(Request)
_from_parent = msgspec.msgpack.Decoder(list[FromParent])
_from_child = msgspec.msgpack.Decoder(list[FromChild])


def _plain(value: object) -> object:
    """Convert values that users put into requests, and results of calls, to plain data."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, np.ndarray | np.generic):
        return cast(object, value.tolist())
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"a {type(value).__name__} cannot be sent")


def _made(kind: type, value: object) -> object:
    return kind(value)


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
encode: Callable[[object], bytes] = _encoder.encode


def frame(messages: Sequence[Any]) -> bytearray:
    """A frame of messages, plain or already encoded as msgspec.Raw."""
    made = bytearray(LENGTH.size)
    _encoder.encode_into(messages, made, LENGTH.size)
    LENGTH.pack_into(made, 0, len(made) - LENGTH.size)
    return made


def add_of(request: Request) -> bytes:
    """An encoded Add."""
    try:
        prompt: Any = request.prompt_token_ids
        if getattr(prompt, "dtype", None) != np.int32:
            return encode(Add(request.id, msgspec.Raw(encode(request)), b""))
        rest = replace(request, prompt_token_ids=())
        return encode(Add(request.id, msgspec.Raw(encode(rest)), np.ascontiguousarray(prompt, "<i4").tobytes()))
    except (OverflowError, UnicodeEncodeError, NotImplementedError) as error:
        problem = f"the request cannot be sent to the engine: {error}"
        raise RequestError("prompt", problem, "use numbers of at most 64 bits and valid Unicode") from None


def request_of(add: Add) -> Request:
    try:
        found = _request.decode(add.request)
        array: Any = np.frombuffer(add.prompt, "<i4")
        return replace(found, prompt_token_ids=array) if add.prompt else found
    except msgspec.ValidationError as error:
        raise RequestError("prompt", f"the engine cannot read the request: {error}", "correct the value") from None


def result_of(name: str, answer: Returned) -> Any:
    """The result of a call of this method; raises its error."""
    if answer.fault is not None:
        raise error_of(answer.fault)
    return msgspec.msgpack.decode(answer.result, type=CALLS[name], dec_hook=_made)


def check_call(name: str) -> None:
    if name not in CALLS:
        raise JaxserveError(f"an engine in another process has no {name!r}", f"known: {', '.join(CALLS)}")


# --- errors ---------------------------------------------------------------------------------------------------------

_KINDS: dict[str, type[JaxserveError]] = {
    kind.__name__: kind
    for kind in (CheckpointError, ConfigError, EngineError, JaxserveError, OverloadedError, RequestError)
}


def fault_of(error: BaseException) -> Fault:
    """The fault to send. An error that is not a JaxserveError becomes an EngineError of one line."""
    kind = next((base.__name__ for base in type(error).__mro__ if base.__name__ in _KINDS), "")
    if isinstance(error, JaxserveError) and kind:
        return Fault(kind, error.problem, error.hint, getattr(error, "field", ""))
    return Fault("EngineError", EngineError(f"{type(error).__name__}: {error}", "").problem, "see its log")


def error_of(fault: Fault) -> JaxserveError:
    kind = _KINDS[fault.kind]
    if issubclass(kind, RequestError):
        return kind(fault.field, fault.problem, fault.hint)
    return kind(fault.problem, fault.hint)


# --- the socket -----------------------------------------------------------------------------------------------------


class Receiver:
    """Reads messages from a socket. For one thread."""

    def __init__(self, end: socket.socket, *, of_parent: bool) -> None:
        self._file = end.makefile("rb", buffering=READ_AHEAD)
        self._decode = cast("Callable[[bytes], list[Any]]", (_from_parent if of_parent else _from_child).decode)

    def receive(self) -> list[Any] | None:
        """Wait for the next messages; None if the other end is closed."""
        [size] = LENGTH.unpack(self._read(LENGTH.size) or LENGTH.pack(0))
        if size > MOST_BYTES:
            raise EngineError(f"a message of {size} bytes was announced", "please report this bug")
        data = self._read(size) if size else b""
        return self._decode(data) if data else None

    def _read(self, size: int) -> bytes:
        """Read all bytes, or return none at the end. A killed process with unread data resets its sockets."""
        try:
            data = self._file.read(size)
        except ConnectionResetError:
            data = b""
        return data if len(data) == size else b""

    def close(self) -> None:
        self._file.close()
