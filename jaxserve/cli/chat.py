# SPDX-License-Identifier: Apache-2.0
"""`jaxserve chat` and `jaxserve complete`: use a running server from the terminal.

A text from -q or a pipe gets one answer; otherwise there is a prompt. Ctrl-C stops an answer, Ctrl-D quits.
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
from jaxserve.cli.client import DEFAULT_URL, KEY_FILE_HELP, KEY_HELP, URL_HELP, Client, key_for
from jaxserve.cli.terminal import safe
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags.setting import Setting, flags_of

SHORTEST = 0.02  # seconds between the first and the last text, for a rate
SAMPLING = "Sampling"  # group of the flags that are sent as fields of the same name
HELP = "/reset clears the conversation, /system TEXT starts a new one, /retry answers again, /exit or Ctrl-D quits"

type Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Talk(ABC):
    url: Annotated[str, Setting(URL_HELP)] = DEFAULT_URL
    model_name: Annotated[
        str | None, Setting("Model name (default: the first model of the server).", spellings=("--model",))
    ] = None
    api_key: Annotated[str | None, Setting(KEY_HELP)] = field(default=None, repr=False)
    api_key_file: Annotated[str | None, Setting(KEY_FILE_HELP, metavar="FILE")] = None
    quick: Annotated[str | None, Setting("Answer this text and exit.", spellings=("-q",), empty=True)] = None
    stats: Annotated[bool, Setting("After each answer, print time to first token, tokens and tokens per second.")] = (
        False
    )
    max_tokens: Annotated[
        int | None, Setting("Maximum number of tokens to generate (default: the server's).", SAMPLING)
    ] = None
    temperature: Annotated[
        float | None,
        Setting("Sampling temperature; 0 always takes the most likely token (default: the model's).", SAMPLING),
    ] = None
    top_p: Annotated[
        float | None,
        Setting(
            "Sample from the most likely tokens whose probabilities add up to this (default: the model's).", SAMPLING
        ),
    ] = None
    seed: Annotated[int | None, Setting("Sampling seed, for reproducible answers.", SAMPLING)] = None

    def run(self) -> int | None:
        client = Client(self.url, api_key=key_for(self.url, key=self.api_key, file=self.api_key_file))
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
        print(f"{safe(session.model)} at {session.client.name}. {self.help_line()}", file=sys.stderr)
        while True:
            try:
                text = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nPress Ctrl-D to quit", file=sys.stderr)
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
        """Handles a line typed at the prompt."""

    @abstractmethod
    def request(self, session: "Session", text: str) -> tuple[str, dict[str, Any]]:
        """Path and body of the request for a text."""

    def sampling(self) -> dict[str, Any]:
        given = {flag.name: getattr(self, flag.name) for flag in flags_of(type(self)) if flag.group == SAMPLING}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Chat(Talk):
    """Chat with a running server."""

    system_prompt: Annotated[str | None, Setting("System prompt of the conversation.", empty=True)] = None

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
                raise JaxserveError("there is no answer to retry", "send a message first")
            asked = session.messages[-2]["content"]
            del session.messages[-2:]
            session.say(asked)
        elif command.startswith("/") and command[1:].isalpha():
            print(HELP, file=sys.stderr)
        else:
            session.say(text)


@dataclass(frozen=True, kw_only=True)
class Complete(Talk):
    """Complete a text with a running server."""

    def request(self, session: "Session", text: str) -> tuple[str, dict[str, Any]]:
        return "/v1/completions", {"prompt": text}

    def help_line(self) -> str:
        return "Each line is completed; /exit or Ctrl-D quits"

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
            raise UsageError("the text is empty", "pass one with -q TEXT, or on standard input")
        self.say(text)

    def say(self, text: str) -> None:
        """Prints the answer as it arrives. An interrupted answer stays in the conversation."""
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
    rate = f", {(tokens - 1) / took:.1f} tokens/s" if took >= SHORTEST and tokens > 1 else ""
    return f"first token after {times[0] - began:.3f} s, {tokens} tokens{rate}"
