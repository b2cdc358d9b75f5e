# SPDX-License-Identifier: Apache-2.0
"""Masks that depend on the last token: every token obeys them, and the devices do not wait for the host that computes
them."""

from typing import Any

import numpy as np
import pytest

from jaxserve.engine.schedule.masks import Words
from jaxserve.sampling.control_row import mask_words
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import VOCABULARY, Driver, Stream, Streams, logits_of

PROMPT = [11, 42, 7, 42, 88, 5, 11, 60, 23, 9]


def permitted(output: list[int]) -> np.ndarray:
    """A bool per token: which ones may follow depends on the last token and on how many there are."""
    last = output[-1] if output else 1
    return (np.arange(VOCABULARY) + last + len(output)) % 4 == 0


class ByLastToken:
    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def allowed(self, output: list[int]) -> Words:
        self.asked.append(list(output))
        bits = np.zeros(32 * mask_words(VOCABULARY), np.bool_)
        bits[:VOCABULARY] = permitted(output)
        return np.packbits(bits, bitorder="little").view(np.int32)


def requests() -> dict[str, dict[str, Any]]:
    return {
        "greedy": dict(temperature=0, max_tokens=14),
        "random": dict(seed=5, top_k=9, max_tokens=12),
        "samples": dict(seed=6, n=2, max_tokens=9),
        "penalized": dict(seed=7, repetition_penalty=1.4, logprobs=2, max_tokens=11),
        "free": dict(seed=8, max_tokens=13),  # without masks, beside them
    }


def run(driver: Driver, *names: str) -> Streams:
    for name, params in requests().items():
        if names and name not in names:
            continue
        request = Request(id=name, prompt_token_ids=PROMPT, params=SamplingParams(ignore_eos=True, **params))
        driver.streams |= {(name, index): Stream() for index in range(request.params.n)}
        driver.engine.add(request, masked_by=None if name == "free" else ByLastToken())
    return driver.finish()


def check(streams: Streams) -> None:
    for (name, _), stream in streams.items():
        assert stream.finish_reason == "length"
        for count, token in enumerate(stream.tokens):
            assert name == "free" or permitted(stream.tokens[:count])[token], (name, stream.tokens)


def test_every_token_obeys() -> None:
    """Overlapped or not, alone or in a batch, preempted or not."""
    overlapped = run(Driver())
    check(overlapped)
    tokens = {name: stream.tokens for name, stream in overlapped.items()}
    for driver in (Driver(async_scheduling=False), Driver(spare=14), Driver(budget=4)):
        found = run(driver)
        assert {name: stream.tokens for name, stream in found.items()} == tokens
    for name in requests():
        found = run(Driver(), name)
        assert all(stream.tokens == tokens[key] for key, stream in found.items()), name


def test_greedy_text_is_the_likeliest_that_is_permitted() -> None:
    [stream] = run(Driver(), "greedy").values()
    expected: list[int] = []
    for _ in range(14):
        logits = logits_of([*PROMPT, *expected])[-1]
        expected.append(int(np.where(permitted(expected), logits, -np.inf).argmax()))
    assert stream.tokens == expected


def test_the_devices_never_wait_for_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's model is launched before the step before it is read."""
    driver, events = Driver(), list[tuple[str, int]]()
    runner, messages = driver.runner, list[Any]()
    for name in ("launch_model", "launch_head", "read"):
        usual = getattr(runner, name)

        def noted(first: Any, *rest: Any, name: str = name, usual: Any = usual) -> Any:
            message = getattr(first, "message", first)
            if name == "launch_model":
                messages.append(message)
            [number] = [at for at, each in enumerate(messages) if each is message]
            events.append((name, number))
            return usual(first, *rest)

        monkeypatch.setattr(runner, name, noted)
    run(driver, "greedy", "random")
    place = {event: at for at, event in enumerate(events)}
    steps = len(messages)
    assert steps > 12
    for step in range(1, steps):
        assert place["launch_model", step] < place["read", step - 1] < place["launch_head", step]


def test_a_mask_that_fails_ends_its_request(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(ByLastToken):
        def allowed(self, output: list[int]) -> Words:
            if len(output) == 3:
                raise ValueError("no grammar")
            return super().allowed(output)

    driver = Driver()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for name, masks in (("broken", Broken()), ("fine", ByLastToken())):
        driver.streams[name, 0] = Stream()
        driver.engine.add(Request(id=name, prompt_token_ids=PROMPT, params=params), masked_by=masks)
    found = driver.finish()
    assert (found["broken", 0].finish_reason, len(found["broken", 0].tokens)) == ("error", 3)
    assert "its mask failed: ValueError: no grammar" in (found["broken", 0].error or "")
    assert (found["fine", 0].finish_reason, len(found["fine", 0].tokens)) == ("length", 8)
    assert "no grammar" in capsys.readouterr().err


def test_a_mask_that_permits_nothing_ends_its_request() -> None:
    class Nothing:
        def allowed(self, output: list[int]) -> Words:
            return np.zeros(mask_words(VOCABULARY), np.int32)

    driver = Driver()
    driver.streams["a", 0] = Stream()
    driver.engine.add(Request(id="a", prompt_token_ids=PROMPT), masked_by=Nothing())
    stream = driver.finish()["a", 0]
    assert stream.finish_reason == "error" and "masks left no token" in (stream.error or "")
