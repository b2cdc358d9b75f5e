# SPDX-License-Identifier: Apache-2.0
"""`jaxserve chat` and `complete` against a fake server; terminals are real pseudo-terminals."""

import os
import pty
import re
import select
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from jaxserve.cli.client import key_for
from jaxserve.cli.terminal import safe
from tests.cli.conftest import Command, one_error
from tests.cli.fake_server import KEY, FakeServer, running

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
JAXSERVE = str(Path(sysconfig.get_path("scripts")) / "jaxserve")


def test_one_shot(command: Command, server: FakeServer) -> None:
    said = command("chat", "--url", server.url, "-q", "Hi", "--max-tokens", "5", "--system-prompt", "Be brief")
    assert said == (0, "Hello wörld!\n", "")
    [body] = server.bodies(CHAT)
    assert body["messages"] == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert (body["model"], body["max_tokens"], body["stream"]) == ("fake", 5, True)
    assert "temperature" not in body


def test_complete_from_a_pipe(command: Command, server: FakeServer) -> None:
    said = command("complete", "--url", server.url.removesuffix("/v1"), "--stats", stdin="Once upon\n")
    assert (said.code, said.out) == (0, "Hello wörld!\n")
    assert re.fullmatch(r"first token after [\d.]+ s, 4 tokens(, [\d.]+ tokens/s)?\n", said.err)
    assert server.bodies(COMPLETE)[0]["prompt"] == "Once upon"


def test_an_empty_pipe(command: Command, server: FakeServer) -> None:
    one_error(command("chat", "--url", server.url), 2, "the text is empty")


@pytest.mark.parametrize("source", ["flag", "file", "JAXSERVE_API_KEY", "OPENAI_API_KEY"])
def test_keys(
    command: Command, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, source: str
) -> None:
    server.needs_key = True
    one_error(command("chat", "--url", server.url, "-q", "Hi"), 1, "Unauthorized", "--api-key")
    (tmp_path / "keys").write_text(f"# mine\n{KEY} name=me\nother\n")
    if source.isupper():
        monkeypatch.setenv(source, KEY if source == "OPENAI_API_KEY" else f"{KEY},other")
    words = {"flag": ["--api-key", KEY], "file": ["--api-key-file", str(tmp_path / "keys")]}.get(source, [])
    assert command("chat", "--url", server.url, "-q", "Hi", *words).code == 0


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("localhost:8000", True),
        ("http://[::1]:8000", True),
        ("https://api.openai.com/v1", True),
        ("http://api.openai.com/v1", False),  # not encrypted
        ("https://api.openai.com.attacker.example", False),
        ("https://models.example/v1", False),
        ("http://192.0.2.1:8000", False),
        ("https://api.openai.com@models.example/v1", False),
        ("http://127.0.0.1.attacker.example", False),
        ("unix:/run/a.sock", True),
    ],
)
def test_openai_s_key_is_sent_to_openai_and_to_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch, url: str, sent: bool
) -> None:
    monkeypatch.delenv("JAXSERVE_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    assert key_for(url, key=None, file=None) == ("sk-openai" if sent else None)
    monkeypatch.setenv("JAXSERVE_API_KEY", "sk-ours")  # is meant for any server
    assert key_for(url, key=None, file=None) == "sk-ours"
    assert key_for(url, key="sk-given", file=None) == "sk-given"


def test_key_files_of_clients(command: Command, server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none\n")
    for file, part in (("empty", "contains no key"), ("none", "cannot read the key file")):
        one_error(command("chat", "--url", server.url, "-q", "Hi", "--api-key-file", tmp_path / file), 2, part)
    words = ("--api-key", "a", "--api-key-file", tmp_path / "empty")
    one_error(command("bench", "serve", "--url", server.url, *words), 2, "both set")


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (503, "loading"),
        (404, "replied"),
        ("late", "the engine failed"),
        ("cut", "ended early"),
        ("junk", "ended early"),
    ],
)
def test_faults_of_the_server(command: Command, server: FakeServer, fault: int | str, part: str) -> None:
    server.faults[CHAT] = fault
    said = command("chat", "--url", server.url, "-q", "Hi")
    assert said.code == 1
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and part in said.err


@pytest.mark.parametrize(
    ("status", "message", "problem", "hint"),
    [
        (
            403,
            "Profiling is disabled. Start the server with --profile-dir X.",
            "Profiling is disabled",
            "Start the server with",
        ),
        (400, "n is 9.5. At most 4. Lower it.", "n is 9.5. At most 4", "Lower it"),
        (400, "n is 9.5.", "n is 9.5.", "change the request"),
        (403, "This host is not allowed.", "This host is not allowed.", "set --api-key, or"),
        (404, 'There is no "a. b".', 'There is no "a. b".', "check --url"),
        (404, "The model `a. b. c` does not exist.", "The model `a. b. c` does not exist.", "check --url"),
        (500, "It broke.", "It broke.", "see the server log"),
    ],
)
def test_the_hint_of_the_server_is_shown(
    command: Command, server: FakeServer, *, status: int, message: str, problem: str, hint: str
) -> None:
    server.faults[CHAT], server.message = status, message
    said = command("chat", "--url", server.url, "-q", "Hi")
    one_error(said, 1, f"error: the server replied: {problem}  hint: {hint}")


@pytest.mark.parametrize("form", ["unix:{}", "unix://{}"])
def test_a_server_on_a_unix_socket(command: Command, tmp_path: Path, form: str) -> None:
    path, fake = tmp_path / "a.sock", FakeServer()
    with running(fake, path=str(path)):
        for name in ("chat", "complete"):
            said = command(name, "--url", form.format(path), "-q", "hello")
            assert (said.code, said.out) == (0, "Hello wörld!\n")
        words = ("bench", "serve", "--url", form.format(path), "--num-prompts", "2", "--random-input-len", "3")
        assert command(*words).code == 0
    assert len(fake.bodies("/v1/completions")) == 4
    one_error(command("chat", "--url", f"unix:{tmp_path}/b.sock", "-q", "x"), 1, f"cannot connect to unix:{tmp_path}/b")
    one_error(command("chat", "--url", "unix:", "-q", "x"), 2, "has no path", "unix:/run")


def test_no_server(command: Command) -> None:
    one_error(command("chat", "--url", "http://127.0.0.1:9", "-q", "Hi"), 1, "cannot connect", "jaxserve run")
    one_error(command("chat", "--url", "ftp://x", "-q", "Hi"), 2, "not a server URL")
    one_error(command("chat", "--url", "http://x:y", "-q", "Hi"), 2, "not a server URL")
    one_error(command("chat", "--url", "http://x", "-q", "Hi", "--api-key", "k\r\nX: y"), 2, "an HTTP header cannot")


def test_model_output_cannot_control_the_terminal(command: Command, server: FakeServer) -> None:
    server.pieces = ("\x1b[2J\x1b]0;gotcha\x07", "a\tb\nc\r", "\x9b31m", "‮abc", "é✓")
    out = command("chat", "--url", server.url, "-q", "Hi").out
    assert out == "\\x1b[2J\\x1b]0;gotcha\\x07a\tb\nc\\r\\x9b31m\\u202eabcé✓\n"
    assert safe("".join(map(chr, range(32)))).count("\\x") == 29


class Terminal:
    """Run the command in a new pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self._end, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            [JAXSERVE, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment
        )
        os.close(theirs)
        self.seen, self._at = "", 0

    def until(self, text: str) -> None:
        """Wait until `text` appears after the text of the previous call."""
        end = time.monotonic() + 20
        while (place := self.seen.find(text, self._at)) < 0:
            ready, _, _ = select.select([self._end], [], [], max(0, end - time.monotonic()))
            assert ready, self.seen
            self.seen += os.read(self._end, 4096).decode(errors="replace")
        self._at = place + len(text)

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def close(self) -> int:
        try:
            return self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._end)


def test_a_conversation(server: FakeServer) -> None:
    terminal = Terminal("chat", "--url", server.url)
    try:
        terminal.until("> ")
        terminal.type("one\n")
        terminal.until("Hello wörld!\r\n> ")
        terminal.type("two\n")
        terminal.until("Hello wörld!\r\n> ")
        terminal.type("/reset\n")
        terminal.until("> ")
        terminal.type("/system Be rude\n")
        terminal.until("> ")
        terminal.type("three\n")
        terminal.until("Hello wörld!\r\n> ")
        server.faults[CHAT] = 400
        terminal.type("four\n")
        terminal.until("error: ")
        terminal.until("> ")
        terminal.type("/nonsense\n")
        terminal.until("/retry")
        terminal.until("> ")  # before it reads a line a terminal would keep the end for itself
        terminal.type("\x04")
    finally:
        code = terminal.close()
    assert code == 0
    first, second, third, fourth = (
        [(each["role"], each["content"]) for each in body["messages"]] for body in server.bodies(CHAT)
    )
    answer = ("assistant", "Hello wörld!")
    assert first == [("user", "one")]
    assert second == [("user", "one"), answer, ("user", "two")]
    assert third == [("system", "Be rude"), ("user", "three")]
    assert fourth == [("system", "Be rude"), ("user", "three"), answer, ("user", "four")]


def test_ctrl_c_stops_the_answer_and_not_the_command(server: FakeServer) -> None:
    server.pieces, server.pause = ("word ",) * 1000, 0.02
    terminal = Terminal("chat", "--url", server.url)
    try:
        terminal.until("> ")
        terminal.type("one\n")
        terminal.until("word word")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("(stopped)")
        server.pieces, server.pause = ("done",), 0
        terminal.type("two\n")
        terminal.until("done")
        terminal.type("/exit\n")
    finally:
        code = terminal.close()
    assert code == 0
    assert server.bodies(CHAT)[1]["messages"][1]["content"].startswith("word word")


def test_ctrl_c_of_one_shot(server: FakeServer) -> None:
    server.pieces, server.pause = ("word ",) * 1000, 0.02
    terminal = Terminal("chat", "--url", server.url, "-q", "Hi")
    try:
        terminal.until("word word")
        terminal.process.send_signal(signal.SIGINT)
    finally:
        code = terminal.close()
    assert code == 130
    assert "Traceback" not in terminal.seen
