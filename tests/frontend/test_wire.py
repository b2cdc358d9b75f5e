# SPDX-License-Identifier: Apache-2.0
"""Messages between parent and child arrive unchanged, in whatever pieces the socket transfers them."""

import math
import socket
import struct
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.capacity import Limits
from jaxserve.errors import CheckpointError, EngineError, JaxserveError, OverloadedError, RequestError
from jaxserve.frontend import wire
from jaxserve.host import outbox
from jaxserve.types.metrics import EngineMetrics
from jaxserve.types.outputs import TokenLogprobs, Update
from jaxserve.types.request import Abort, Request
from jaxserve.types.sampling_params import RequestOutputKind, SamplingParams

texts = st.text(max_size=8)
tokens = st.integers(0, 2**31 - 1)
numbers = st.floats(allow_nan=False, width=64)
logprobs = st.builds(
    TokenLogprobs, tokens, numbers, tokens, st.lists(tokens, max_size=3), st.lists(numbers, max_size=3)
)
updates = st.builds(
    Update,
    request_id=texts,
    index=st.integers(0, 16383),
    token_ids=st.lists(tokens, max_size=4),
    logprobs=st.none() | st.lists(logprobs, max_size=3),
    prompt_logprobs=st.none() | st.lists(logprobs, max_size=3),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_reason=st.none() | tokens | texts,
    error=st.none() | texts,
    num_cached_tokens=tokens,
    policy_version=tokens,
    embedding=st.none() | st.binary(max_size=8),
    scheduled=st.none() | numbers,
)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    words = st.lists(st.text(min_size=1, max_size=5), max_size=3)
    low = draw(st.integers(0, 5))
    return SamplingParams(
        n=draw(st.integers(1, 4)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        repetition_penalty=draw(st.floats(0.01, 5)),
        temperature=draw(st.floats(0.01, 2)),
        top_p=draw(st.floats(0.01, 1)),
        top_k=draw(st.integers(-1, 2**31 - 1)),
        min_p=draw(st.floats(0, 1)),
        seed=draw(st.none() | st.integers(-(2**63), 2**64 - 1)),
        stop=draw(st.none() | st.text(min_size=1, max_size=5) | words),
        stop_token_ids=draw(st.none() | st.lists(tokens, max_size=3)),
        bad_words=draw(st.none() | words),
        ignore_eos=draw(st.booleans()),
        max_tokens=draw(st.none() | st.integers(max(low, 1), 2**31 - 1)),
        min_tokens=low,
        logprobs=draw(st.none() | st.integers(-1, 20) | st.booleans()),
        prompt_logprobs=draw(st.none() | st.integers(-1, 20)),
        skip_special_tokens=draw(st.booleans()),
        include_stop_str_in_output=draw(st.booleans()),
        output_kind=draw(st.sampled_from(RequestOutputKind)),
        logit_bias=draw(st.none() | st.dictionaries(tokens, st.floats(-200, 200), max_size=3)),
        allowed_token_ids=draw(st.none() | st.lists(tokens, min_size=1, max_size=3)),
        skip_reading_prefix_cache=draw(st.none() | st.booleans()),
    )


requests = st.builds(
    Request,
    id=texts,
    prompt_token_ids=st.lists(tokens, max_size=5),
    params=params() | st.just(SamplingParams(temperature=0)),
    bad_word_ids=st.lists(st.lists(tokens, max_size=3).map(tuple), max_size=2).map(tuple),
    priority=st.integers(-(2**63), 2**63 - 1),
    cache_salt=st.none() | texts,
    arrival=numbers,
    deadline=st.none() | numbers,
    score_only=st.booleans(),
    embed=st.booleans(),
)


@contextmanager
def pair() -> Generator[tuple[socket.socket, socket.socket]]:
    parent, child = socket.socketpair()
    with parent, child:
        yield parent, child


def through(messages: list[Any], *, of_parent: bool) -> list[Any]:
    """Send messages over a socket that transfers them in two pieces."""
    with pair() as (near, far):
        receiver = wire.Receiver(far, of_parent=of_parent)
        data = wire.frame(messages)
        near.sendall(data[: len(data) // 2])
        near.sendall(data[len(data) // 2 :])
        found = receiver.receive()
        receiver.close()
        assert found is not None
        return found


@given(requests)
def test_requests(request: Request) -> None:
    [add, abort] = through([msgspec.Raw(wire.add_of(request)), Abort("x", 3, "stop")], of_parent=True)
    assert add.request_id == request.id and abort == Abort("x", 3, "stop")
    assert wire.request_of(add) == request
    assert type(wire.request_of(add).params.stop) is tuple


def test_requests_of_numpy_values() -> None:
    request = Request(id="a", prompt_token_ids=np.arange(4, dtype=np.int32), params=SamplingParams(seed=np.int64(3)))  # pyright: ignore
    found = wire.request_of(through([msgspec.Raw(wire.add_of(request))], of_parent=True)[0])
    assert found.prompt_ids == [0, 1, 2, 3] and found.params == request.params
    assert isinstance(found.prompt_token_ids, np.ndarray) and type(found.prompt_ids[0]) is int


@pytest.mark.parametrize("fields", [{"cache_salt": "\ud800"}, {"priority": 2**64}, {"deadline": object()}])
def test_values_that_cannot_be_sent_raise_at_once(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="cannot be sent"):
        wire.add_of(Request(**{"id": "a", "prompt_token_ids": [1], **fields}))


@pytest.mark.parametrize("fields", [{"prompt_token_ids": ["1"]}, {"deadline": "soon"}, {"bad_word_ids": 3}])
def test_an_unreadable_request_fails_alone(fields: dict[str, Any]) -> None:
    bad = wire.add_of(Request(**{"id": "bad", "prompt_token_ids": [1], **fields}))
    good = wire.add_of(Request(id="good", prompt_token_ids=[1]))
    first, second = through([msgspec.Raw(bad), msgspec.Raw(good)], of_parent=True)
    with pytest.raises(RequestError, match="cannot read"):
        wire.request_of(first)
    assert wire.request_of(second).id == "good"


LISTS = {"finished": {"stop": 1}, "step_tokens": [1], "step_seconds": [0.25]}
COUNTS = {name: 1 for name in EngineMetrics.__slots__} | {"kv_usage": 0.5} | LISTS
METRICS = EngineMetrics(**COUNTS)  # pyright: ignore[reportArgumentType]


@given(st.lists(updates, max_size=3))
def test_turns(given: list[Update]) -> None:
    assert through([wire.Turn(given, METRICS), wire.Beat(1.5, True)], of_parent=False) == [
        wire.Turn(given, METRICS),
        wire.Beat(1.5, True),
    ]


def test_nan_and_infinity() -> None:
    entry = TokenLogprobs(1, -math.inf, 1, [2], [math.nan])
    [turn] = through([wire.Turn([Update(request_id="a", index=0, logprobs=[entry])], METRICS)], of_parent=False)
    [found] = turn.updates[0].logprobs
    assert found.logprob == -math.inf and math.isnan(found.top_logprobs[0])


def test_all_other_messages() -> None:
    limits = Limits(
        vocab_size=8,
        max_model_len=16,
        max_num_seqs=1,
        max_num_batched_tokens=8,
        block_size=8,
        num_blocks=9,
        max_logprobs=3,
        eos_token_ids=frozenset({1, 2}),
        windows=(None, 4),
    )
    said = [
        wire.Progress("loading", 1, 2),
        wire.ModelOpened("/x", limits, {"top_k": 3}, "llama", 2, "bfloat16", 10, 20),
        wire.Started(),
        wire.Refused("r", wire.Fault("RequestError", "p", "h", "f")),
        wire.Returned(3, msgspec.Raw(wire.encode({"a": 1}))),
        wire.Failed(wire.Fault("EngineError", "p", "h")),
    ]
    assert through(said, of_parent=False) == said
    config = EngineConfig(model="x", max_num_seqs=3)
    start, call, stop = through(
        [wire.Start(asdict(config), 2.5), wire.Call(1, "sleep", {"level": 1}), wire.Stop()], of_parent=True
    )
    assert EngineConfig(**start.config) == config and start.watchdog == 2.5
    assert call == wire.Call(1, "sleep", {"level": 1}) and stop == wire.Stop()


@pytest.mark.parametrize(
    "error",
    [
        RequestError("n", "n is 3", "give 1"),
        OverloadedError("prompt", "full", "later"),
        EngineError("broken", "restart"),
        CheckpointError("no file", "give one"),
        ConfigError("bad", "good"),
        JaxserveError("a", "b"),
    ],
)
def test_errors_keep_their_class(error: JaxserveError) -> None:
    found = wire.error_of(wire.fault_of(error))
    assert type(found) is type(error) and vars(found) == vars(error) and str(found) == str(error)


def test_other_errors_become_the_engines_in_one_line() -> None:
    class Own(OverloadedError):
        pass

    assert type(wire.error_of(wire.fault_of(Own("f", "p", "h")))) is OverloadedError
    found = wire.error_of(wire.fault_of(KeyError("a\n\x1b[31m\ud800" + 5000 * "x")))
    assert type(found) is EngineError and found.problem.startswith("KeyError: ")
    assert found.problem.isprintable() and len(found.problem) <= 2000


def test_results() -> None:
    def result(name: str, value: object) -> Any:
        return wire.result_of(name, wire.Returned(1, msgspec.Raw(wire.encode(value))))

    assert result("metrics", METRICS) == METRICS
    assert result("stop_profile", Path("/a/b")) == Path("/a/b")
    assert result("wake", None) is None
    with pytest.raises(RequestError):
        wire.result_of("wake", wire.Returned(1, fault=wire.Fault("RequestError", "p", "h", "f")))
    with pytest.raises(JaxserveError, match="no '__class__'"):
        wire.check_call("__class__")


# --- frames ---------------------------------------------------------------------------------------------------------


def test_frames_follow_one_another_and_end() -> None:
    with pair() as (near, far):
        receiver = wire.Receiver(far, of_parent=True)
        near.sendall(wire.frame([wire.Stop()]) + wire.frame([]) + wire.frame([wire.Stop()]) + b"\1\0\0")
        near.close()
        assert [receiver.receive() for _ in range(4)] == [[wire.Stop()], [], [wire.Stop()], None]
        receiver.close()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (struct.pack("<Q", wire.MOST_BYTES + 1), EngineError),
        (b"\xff" * 8, EngineError),
        (struct.pack("<Q", 3) + b"\xc1\xc1\xc1", msgspec.DecodeError),
        (struct.pack("<Q", 9) + b"\x91\x91\xa6pickle", msgspec.ValidationError),
    ],
)
def test_invalid_messages(data: bytes, error: type[Exception]) -> None:
    with pair() as (near, far):
        receiver = wire.Receiver(far, of_parent=True)
        near.sendall(data)
        with pytest.raises(error):
            receiver.receive()
        receiver.close()


# --- a parent that does not read ------------------------------------------------------------------------------------


def test_bytes_that_the_socket_does_not_take_are_sent_later() -> None:
    with pair() as (parent, child):
        box = outbox.Outbox(child)
        big = wire.Progress(50_000 * "x", 0, 0)
        for number in range(60):  # far more than a socket holds
            box.send(wire.Progress("small", number, 0), big)
        assert box.kept > 10**6
        receiver = wire.Receiver(parent, of_parent=False)
        reader = threading.Thread(target=box.finish, args=(5,))
        reader.start()
        for number in range(60):
            assert receiver.receive() == [wire.Progress("small", number, 0), big]
        reader.join()
        assert box.kept == 0
        receiver.close()


def test_a_child_waits_when_too_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MOST_KEPT", 10**6)
    with pair() as (parent, child):
        box = outbox.Outbox(child)
        box.wait()
        while box.kept <= 10**6:
            box.send(wire.Progress(50_000 * "x", 0, 0))
        waiting = threading.Thread(target=box.wait)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        receiver = wire.Receiver(parent, of_parent=False)
        while waiting.is_alive():
            receiver.receive()
        assert box.kept <= 10**6
        receiver.close()


def test_nothing_is_sent_to_a_parent_that_is_gone() -> None:
    with pair() as (parent, child):
        box = outbox.Outbox(child)
        while not box.kept:
            box.send(wire.Progress(50_000 * "x", 0, 0))
        parent.close()
        box.flush()
        box.send(wire.Started())
        box.finish(5)
        assert box.kept == 0
