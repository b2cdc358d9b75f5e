# SPDX-License-Identifier: Apache-2.0
"""Random requests of every kind for a server, drawn from a seed, and the conditions that each answer must meet.

    half        one token
    a fifth     clients that leave before the end, streaming and not, at any moment
    a twentieth requests that must be rejected
    the rest    samples, log probabilities, penalties, stops, lists of prompts, chats, embeddings, tokens

Measures nothing. The prompts are short: any model with a context of 192 tokens, 400 token ids and two rows will do.
"""

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WORDS = tuple(
    re.findall(r"\w+", "the little dog found a red ball and asked her mother for water in the garden before night")
)
STORIES = ["Once upon a time there was a fox. ", "Sum of two and three: ", 'Give JSON: {"name": ', "Tell me of Anna. "]
CANARY = {"prompt": "one two three", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
LEFT = 0  # instead of a status, if the client left first


@dataclass(frozen=True)
class Ask:
    path: str
    body: Any  # bytes are sent unchanged
    status: int = 200
    leaves: float | None = None  # the client leaves after this many seconds
    method: str = "POST"


def ask(rng: random.Random) -> Ask:
    kind = rng.random()
    if kind < 0.5:
        return _one_token(rng)
    if kind < 0.7:
        return _left(rng)
    if kind < 0.75:
        return rng.choice(REFUSED)
    return rng.choice(VARIED)(rng)


def _text(rng: random.Random) -> str:
    """A text whose beginning may have been sent before."""
    words = rng.choices(WORDS, k=rng.randint(1, 8))
    return rng.choice([*STORIES, ""]) + " ".join(words)


def _ids(rng: random.Random) -> list[int]:
    shared = list(range(20, 20 + 8 * rng.randint(0, 6)))
    return shared + [rng.randrange(20, 400) for _ in range(rng.randint(1, 40))]


def _talk(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": _text(rng)}]


def _asked(rng: random.Random, **more: Any) -> Ask:
    """A prompt or a chat, streamed or not."""
    if rng.random() < 0.5:
        more |= {"stream": True}
        if rng.random() < 0.5:
            more |= {"stream_options": {"include_usage": True}}
    if rng.random() < 0.3:
        return Ask(CHAT, {"messages": _talk(rng), **more})
    return Ask(COMPLETIONS, {"prompt": _text(rng) if rng.random() < 0.6 else _ids(rng), **more})


def _one_token(rng: random.Random) -> Ask:
    return _asked(rng, max_tokens=1, temperature=rng.choice((0, 1)))


def _left(rng: random.Random) -> Ask:
    more = {"n": rng.randint(1, 2), "temperature": 1, "ignore_eos": True, "max_tokens": rng.randint(20, 100)}
    asked = _asked(rng, **more)
    return Ask(asked.path, asked.body, leaves=rng.choice((0.0, 0.02, 0.1, 0.5)) * rng.random())


# --- what is answered -----------------------------------------------------------------------------------------------


def _logprobs(rng: random.Random) -> Ask:
    asked = _asked(rng, max_tokens=8, n=rng.randint(1, 2), temperature=0.7)
    if asked.path == CHAT:
        return Ask(CHAT, asked.body | {"logprobs": True, "top_logprobs": 4})
    return Ask(COMPLETIONS, asked.body | {"logprobs": rng.randint(0, 5), "echo": rng.random() < 0.3})


def _controls(rng: random.Random) -> Ask:
    most: list[dict[str, Any]] = [
        {"seed": rng.randrange(100)},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
        {"logit_bias": {"30": 5, "40": -100}},
        {"allowed_token_ids": [30, 31, 32, 33]},
        {"bad_words": ["the", "dog"]},
        {"min_tokens": 4, "stop_token_ids": [25, 26]},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.05},
    ]
    chosen = {name: value for each in rng.sample(most, 2) for name, value in each.items()}
    return _asked(rng, max_tokens=rng.randint(4, 24), temperature=0.9, **chosen)


def _stops(rng: random.Random) -> Ask:
    return _asked(rng, max_tokens=32, temperature=1, stop=[" ", "e", "a"][: rng.randint(1, 3)])


VARIED: tuple[Callable[[random.Random], Ask], ...] = (
    _logprobs,
    _controls,
    _controls,
    _stops,
    lambda rng: _asked(rng, max_tokens=rng.randint(2, 48), temperature=1, n=2),
    lambda rng: _asked(rng, max_tokens=rng.randint(2, 48), cache_salt=rng.choice("ab")),
    lambda rng: Ask(COMPLETIONS, {"prompt": [_text(rng), _text(rng)], "max_tokens": 6, "stream": rng.random() < 0.5}),
    lambda rng: Ask(COMPLETIONS, {"prompt": _ids(rng), "max_tokens": 0, "echo": True, "logprobs": 1}),
    lambda rng: Ask(COMPLETIONS, {"prompt": _text(rng), "max_tokens": 3, "prompt_logprobs": 2}),
    lambda rng: Ask("/v1/embeddings", {"input": [_text(rng), _text(rng)]}),
    lambda rng: Ask("/tokenize", {"prompt": _text(rng)}),
    lambda rng: Ask("/tokenize", {"messages": _talk(rng)}),
    lambda rng: Ask("/detokenize", {"tokens": _ids(rng)}),
)

# --- what is refused ------------------------------------------------------------------------------------------------


def _refused(status: int = 400, path: str = COMPLETIONS, **more: Any) -> Ask:
    return Ask(path, {"prompt": "a", "max_tokens": 4, **more}, status)


REFUSED = (
    _refused(temperature=-1),
    _refused(top_p=2),
    _refused(n=0),
    _refused(prompt=""),
    _refused(prompt=[]),
    _refused(prompt=[2**30]),
    _refused(prompt=[20] * 100_000),
    _refused(max_tokens=2**30),
    _refused(logit_bias={str(2**30): 1}),
    _refused(allowed_token_ids=[]),
    _refused(suffix="x"),
    _refused(stream=True, seed="x"),
    _refused(404, model="another"),
    _refused(404, path="/v1/nothing"),
    Ask(CHAT, {"messages": []}, 400),
    Ask("/v1/embeddings", {"input": []}, 400),
    Ask(COMPLETIONS, b'{"prompt": "a"', 400),
    Ask(COMPLETIONS, b"\xff" * 64, 400),
    Ask(COMPLETIONS, None, 405, method="GET"),
)


# --- sending --------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """The outcome of all requests."""

    statuses: Counter[int] = field(default_factory=Counter[int])
    faults: list[str] = field(default_factory=list[str])


async def send(session: aiohttp.ClientSession, asked: Ask) -> tuple[int, bytes]:
    raw = asked.body if isinstance(asked.body, bytes) else json.dumps(asked.body).encode()
    headers = {"Content-Type": "application/json"}
    data = raw if asked.method == "POST" else None
    async with session.request(asked.method, asked.path, data=data, headers=headers) as answer:
        return answer.status, await answer.read()


async def send_and_check(session: aiohttp.ClientSession, asked: Ask, seen: Seen) -> None:
    """Sends a request and records what is wrong with the answer."""
    try:
        async with asyncio.timeout(asked.leaves):
            status, body = await send(session, asked)
    except TimeoutError:
        seen.statuses[LEFT] += 1
        return
    except aiohttp.ClientError as error:
        seen.faults.append(f"{shown(asked)}: {type(error).__name__}: {error}")
        return
    seen.statuses[status] += 1
    try:
        check(asked, status, body)
    except ValueError as error:
        seen.faults.append(f"{shown(asked)}: {error}: {body[-300:]!r}")


def shown(asked: Ask) -> str:
    return f"{asked.method} {asked.path} {str(asked.body)[:300]}"


def check(asked: Ask, status: int, body: bytes) -> None:
    """Raises a ValueError if the answer is wrong."""
    if status != asked.status:
        raise ValueError(f"status {status}, expected {asked.status}")
    if status != 200:
        if set(json.loads(body)["error"]) != {"message", "type", "param", "code"}:
            raise ValueError("not an error in OpenAI's format")
    elif asked.path in (COMPLETIONS, CHAT):
        (_check_stream if asked.body.get("stream") else _check_whole)(asked, body)


def choices(body: Mapping[str, Any]) -> int:
    prompt = body.get("prompt")
    return int(body.get("n", 1)) * (len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str) else 1)


def _check_whole(asked: Ask, body: bytes) -> None:
    answer = json.loads(body)
    _check_ends(asked, [(choice["index"], choice["finish_reason"]) for choice in answer["choices"]])
    most = choices(asked.body) * asked.body.get("max_tokens", 16)
    if not answer["usage"]["completion_tokens"] <= most:
        raise ValueError(f"more than the {most} requested tokens")


def events(body: bytes) -> list[Any]:
    """The events of a whole stream, without the [DONE]."""
    parts = [part.removeprefix(b"data: ") for part in body.split(b"\n\n")]
    if parts[-2:] != [b"[DONE]", b""]:
        raise ValueError("a stream without its final event")
    return [json.loads(part) for part in parts[:-2]]


def _check_stream(asked: Ask, body: bytes) -> None:
    found = events(body)
    if any("error" in event for event in found):
        raise ValueError("an error in the stream")
    ends = [(choice["index"], choice["finish_reason"]) for event in found for choice in event["choices"]]
    _check_ends(asked, [(index, reason) for index, reason in ends if reason is not None])


def _check_ends(asked: Ask, ends: list[tuple[int, str | None]]) -> None:
    if sorted(index for index, _ in ends) != list(range(choices(asked.body))):
        raise ValueError("not exactly one finish reason per choice")
    if not {reason for _, reason in ends} <= {"stop", "length"}:
        raise ValueError("a finish reason that was not requested")


async def canary(session: aiohttp.ClientSession, *, stream: bool) -> tuple[str, list[int]]:
    """The text and the tokens of a request whose answer never changes."""
    _, body = await send(session, Ask(COMPLETIONS, CANARY | {"stream": stream}))
    found = events(body) if stream else [json.loads(body)]
    parts = [choice for event in found for choice in event["choices"]]
    return "".join(part["text"] for part in parts), [token for part in parts for token in part["token_ids"]]


async def run(
    session: aiohttp.ClientSession, rng: random.Random, *, requests: int, clients: int, alone: tuple[str, list[int]]
) -> Seen:
    """Sends requests from concurrent clients, and meanwhile the canary's; `alone` is its answer on an idle server."""
    seen, left = Seen(), iter(range(requests))

    async def client(rng: random.Random) -> None:
        for _ in left:
            await send_and_check(session, ask(rng), seen)

    async def repeat_canary() -> None:
        stream = False
        while True:
            stream = not stream
            answer = await canary(session, stream=stream)
            if answer != alone:
                seen.faults.append(f"the canary's answer is {answer}, on an idle server {alone}")
            await asyncio.sleep(0.2)

    repeated = asyncio.create_task(repeat_canary())
    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(random.Random(f"{rng.random()} {number}")))
    repeated.cancel()
    fault = (await asyncio.gather(repeated, return_exceptions=True))[0]
    if isinstance(fault, Exception):
        seen.faults.append(f"the canary had no answer: {type(fault).__name__}: {fault}")
    return seen
