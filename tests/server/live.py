# SPDX-License-Identifier: Apache-2.0
"""The real server in a separate process, under `python -O`, with a tiny model; and low-level clients.

    with live(model, server={"api_key": ["secret"]}) as server:
        server.post("/v1/completions", {"prompt": "a", "max_tokens": 4}).json

`fake="slow=0.05"` uses the engine without a model of fake_engine.py, which starts at once and has no tokenizer.
`slow=0.05` makes each step of the real engine so much longer.
"""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.fast import XLA_FLAGS, programs
from tests.golden import load
from tests.golden.load import TOKENIZERS

ROOT = Path(__file__).parents[2]
VOCABULARY = 426  # of the byte-level tokenizer
ENGINE: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "block_size": 8,
    "num_blocks": 129,
    "warmup": False,  # of 35 programs most tests need three
}
PATIENCE = 60.0  # seconds, for what takes some


def write_model(folder: Path) -> Path:
    """A llama of two layers with a vocabulary, a tokenizer and a chat template."""
    golden = load.read("llama-gqa-tied")
    config = {**golden.config, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    shapes = golden.tensors | {"model.embed_tokens.weight": (VOCABULARY, config["hidden_size"])}
    tensors = {name: load.weights.tensor(golden.seed, name, shape, golden.rules) for name, shape in shapes.items()}
    load.write_folder(folder, config, tensors, "float32", 1)
    for file in (TOKENIZERS / "byte-level").iterdir():
        shutil.copy(file, folder)
    return folder


class Reply:
    """A complete response."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object; checks that it has the right shape and reveals nothing about the machine."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str) and error["message"]
        text = self.body.decode()
        assert not re.search(r"0x[0-9a-f]{6,}|/home|/usr|/tmp|/work|File \"|Traceback", text), text
        return error

    @property
    def events(self) -> list[Any]:
        items = self.body.decode().split("\n\n")
        data = [item.removeprefix("data: ") for item in items if item and not item.startswith(":")]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


class Client:
    """An HTTP client of a server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = PATIENCE,
    ) -> Reply:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as connection:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, headers=_headers(headers))

    def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return self.send("POST", path, raw, {"Content-Type": "application/json", **_headers(headers)})

    def complete(self, max_tokens: int = 4, **more: Any) -> Reply:
        return self.post("/v1/completions", {"prompt": "the", "max_tokens": max_tokens, "ignore_eos": True, **more})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def raw(self, data: bytes) -> Reply:
        """The response to these bytes, until the server closes the connection or the response is complete."""
        with self.connect() as sock:
            sock.sendall(data)
            return answer(sock, data.split(b" ", 1)[0].decode("latin-1"))

    def open_stream(self, max_tokens: int = 200, **more: Any) -> socket.socket:
        """A streamed completion, of which nothing has been read yet."""
        body = {"prompt": "the", "max_tokens": max_tokens, "ignore_eos": True, "stream": True, **more}
        sock = self.connect()
        sock.sendall(post("/v1/completions", json.dumps(body).encode()))
        return sock

    def metrics(self) -> dict[str, float]:
        """The metrics by name and labels, without the labels that all of them have."""
        text = self.get("/metrics").body.decode()
        values: dict[str, float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = re.sub(r'(engine|model_name)="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")
                values[name] = float(value)
        return values

    def wait_idle(self, seconds: float = PATIENCE) -> None:
        """Wait until no request has a row or a block."""

        def idle() -> bool:
            now = self.metrics()
            counts = now["jaxserve:num_requests_running"], now["jaxserve:num_requests_waiting"]
            return (*counts, now['jaxserve:kv_blocks{state="used"}']) == (0, 0, 0)

        wait(idle, seconds)


class Live(Client):
    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        super().__init__(0)
        self.process, self._log = process, log
        self.engine = ENGINE

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_listening(self) -> None:
        def listening() -> bool:
            found = re.search(r"listening on https?://\S+?:(\d+)[, ]", self.log)
            self.port = int(found[1]) if found else 0
            assert self.port or self.process.poll() is None, self.log
            return bool(self.port)

        wait(listening)

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log
            try:
                return self.get("/health").status == 200
            except ConnectionError:  # it has just ended
                return False

        wait(ready, 2 * PATIENCE)

    def child(self) -> int:
        """The engine's process."""
        me = str(self.process.pid)
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    stat = (folder / "stat").read_text()
                except OSError:
                    continue
                if stat.rpartition(")")[2].split()[1] == me:
                    return int(folder.name)
        raise AssertionError("there is no child")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_exit(self, seconds: float = PATIENCE) -> int:
        return self.process.wait(seconds)


def _headers(given: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): text for name, text in given.items()}


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers)
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body


def answer(sock: socket.socket, method: str = "GET") -> Reply:
    reader = http.client.HTTPResponse(sock, method=method)
    with closing(reader):
        reader.begin()
        return Reply(reader.status, {k.lower(): v for k, v in reader.getheaders()}, reader.read())


def wait(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def closed(sock: socket.socket, seconds: float = PATIENCE) -> bool:
    """Whether the other end closes in time; data before that is dropped."""
    sock.settimeout(seconds)
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def gone(pid: int) -> bool:
    """Whether the process does not exist or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@contextmanager
def started(
    model: Path,
    *,
    engine: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    fake: str | None = None,
    slow: float | None = None,
) -> Generator[Live]:
    """A newly started server process; checks that nothing of it is left afterwards."""
    python, command = [sys.executable, "-O", "-m"], None
    options = {"model": str(model), "compilation_cache_dir": programs(), **ENGINE, **(engine or {})}
    if fake is not None:
        command = [*python, "tests.server.fake_engine", fake]
        options["skip_tokenizer_init"] = True
    elif slow is not None:
        command = [*python, "tests.server.slow_engine", str(slow)]
    given = {
        "engine": options,
        "server": {"port": 0, "served_model_name": ["tiny"], **(server or {})},
        "command": command,
    }
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("JAXSERVE_")}
    env = {**inherited, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*python, "tests.server.launch", json.dumps(given)],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            yield Live(process, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            # The child ends with its parent. Whatever would not is of the same session.
            wait(lambda: not _session(process.pid), 10)


def _session(leader: int) -> list[int]:
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(folder.name))
    return found


@contextmanager
def live(model: Path, **options: Any) -> Generator[Live]:
    """A server that is ready. SIGTERM must end it with exit code 0, unless the test has ended it."""
    with started(model, **options) as server:
        server.wait_listening()
        server.wait_ready()
        yield server
        if server.process.poll() is None:
            server.signal(signal.SIGTERM)
            assert server.wait_exit(20) == 0, server.log
