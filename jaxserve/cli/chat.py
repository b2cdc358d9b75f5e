# SPDX-License-Identifier: Apache-2.0
"""`jaxserve chat` and `jaxserve complete`: a running server in the terminal.

A text with -q, or from a pipe, is answered once; else there is a prompt. Ctrl-C stops an answer, Ctrl-D ends.
"""

import importlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

from jaxserve import exit_codes
from jaxserve.cli.client import DEFAULT_URL, Client, key_of_environment
from jaxserve.cli.terminal import safe
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags.parsing import Arg

HELP = "/reset forgets the conversation, /system TEXT begins a new one, /retry answers again, /exit or Ctrl-D ends"

type Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Talk(ABC):
    url: str = DEFAULT_URL
    """The server, with /v1 or without."""
    model_name: Annotated[str | None, Arg(options=("--model",))] = None
    """The model; the server's first if not given."""
    api_key: str | None = field(default=None, repr=False)
    """The server's key; JAXSERVE_API_KEY or OPENAI_API_KEY if not given."""
    quick: Annotated[str | None, Arg(options=("-q",))] = None
    """Answer this alone, and end."""
    stats: bool = False
    """After each answer: seconds to the first token, tokens, tokens per second."""
    max_tokens: int | None = None
    """The longest answer, in tokens; the server's default if not given."""
    temperature: float | None = None
    """0 takes the likeliest token always; the model's own default if not given."""
    top_p: float | None = None
    """Sample from the likeliest tokens that have this probability together."""
    seed: int | None = None
    """The same seed gives the same answer."""

    def run(self) -> int | None:
        client = Client(self.url, api_key=self.api_key or key_of_environment())
        session = Session(self, client, self.model_name or client.model())
        if self.quick is not None:
            session.once(self.quick)
        elif not sys.stdin.isatty():
            session.once(sys.stdin.buffer.read().decode(errors="replace").removesuffix("\n"))
        else:
            self.loop(session)

    def loop(self, session: "Session") -> None:
        with suppress(ImportError):
            importlib.import_module("readline")  # with it input() edits lines and remembers them
        print(f"{safe(session.model)} at {session.client.root}. {self.help_line()}", file=sys.stderr)
        while True:
            try:
                text = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nCtrl-D ends", file=sys.stderr)
                continue
            if text.strip() in ("/exit", "/quit"):
                return
            try:
                self.turn(session, text)
            except JaxserveError as error:
                print(exit_codes.error_line(error), file=sys.stderr)
            except KeyboardInterrupt:
                print("  (stopped)", file=sys.stderr)

    @abstractmethod
    def help_line(self) -> str: ...

    @abstractmethod
    def turn(self, session: "Session", text: str) -> None:
        """What a line at the terminal brings about."""

    @abstractmethod
    def request(self, session: "Session", text: str) -> tuple[str, dict[str, Any]]:
        """Path and body that ask for the answer to a text."""

    def sampling(self) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_p", "seed")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class Chat(Talk):
    """Talk to a running server."""

    system_prompt: str | None = None
    """What the model is told before the conversation."""

    def request(self, session: "Session", text: str) -> tuple[str, dict[str, Any]]:
        if not session.messages and self.system_prompt is not None:
            session.messages.append({"role": "system", "content": self.system_prompt})
        messages = [*session.messages, {"role": "user", "content": text}]
        return "/v1/chat/completions", {"messages": messages}

    def help_line(self) -> str:
        return HELP

    def turn(self, session: "Session", text: str) -> None:
        command, _, rest = text.strip().partition(" ")
        if not command:
            return
        if command == "/reset":
            session.messages.clear()
        elif command == "/system":
            session.messages[:] = [{"role": "system", "content": rest}]
        elif command == "/retry":
            if len(session.messages) < 2:
                raise JaxserveError("there is no answer yet", "ask something first")
            asked = session.messages[-2]["content"]
            del session.messages[-2:]
            session.say(asked)
        elif command.startswith("/") and command[1:].isalpha():
            print(HELP, file=sys.stderr)
        else:
            session.say(text)


@dataclass(frozen=True, kw_only=True)
class Complete(Talk):
    """Have a running server continue a text."""

    def request(self, session: "Session", text: str) -> tuple[str, dict[str, Any]]:
        return "/v1/completions", {"prompt": text}

    def help_line(self) -> str:
        return "Each line is continued; /exit or Ctrl-D ends"

    def turn(self, session: "Session", text: str) -> None:
        if text:
            session.say(text)


class Session:
    """A conversation with one model."""

    def __init__(self, talk: Talk, client: Client, model: str) -> None:
        self.talk, self.client, self.model = talk, client, model
        self.messages: list[Message] = []

    def once(self, text: str) -> None:
        if not text.strip():
            raise UsageError("there is nothing to answer", "give -q TEXT, or a text through a pipe")
        self.say(text)

    def say(self, text: str) -> None:
        """Prints the answer as it comes. What was said before an interruption is part of the conversation."""
        path, body = self.talk.request(self, text)
        body |= {"model": self.model, "stream_options": {"include_usage": True}, **self.talk.sampling()}
        began, times, said, usage = time.monotonic(), list[float](), "", dict[str, Any]()
        try:
            for event in self.client.stream(path, body):
                usage = event.get("usage") or usage
                for piece in _texts(event):
                    times.append(time.monotonic())
                    said += piece
                    print(safe(piece), end="", flush=True)
        finally:
            if said and not said.endswith("\n"):
                print(flush=True)
            if said:
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
        if self.talk.stats:
            print(_stats(began, times, usage), file=sys.stderr)


def _texts(event: dict[str, Any]) -> Iterator[str]:
    for choice in event.get("choices") or ():
        delta: Any = choice.get("delta")
        piece: Any = choice.get("text") if delta is None else delta.get("content")
        if piece:
            yield str(piece)


def _stats(began: float, times: list[float], usage: dict[str, Any]) -> str:
    tokens = usage.get("completion_tokens") or len(times)
    if not times:
        return f"{tokens} tokens, no text"
    took = times[-1] - times[0]
    rate = f", {(tokens - 1) / took:.1f} tokens/s" if took > 0 and tokens > 1 else ""
    return f"first token after {times[0] - began:.3f} s, {tokens} tokens{rate}"
