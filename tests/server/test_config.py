# SPDX-License-Identifier: Apache-2.0
"""Settings of the server, checks before anything is loaded, and the contents of the log."""

import io
import json
import logging
import signal
import socket
import ssl
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.errors import JaxserveError
from jaxserve.flags.setting import flags_of
from jaxserve.server import lifecycle
from jaxserve.server.config import ServerConfig
from jaxserve.server.http import listening
from jaxserve.server.observe import logs
from jaxserve.server.observe.histogram import Histogram, token_counts
from jaxserve.server.observe.request_record import RequestRecord
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.server import live as living
from tests.server.fake_engine import FakeEngine


@pytest.mark.parametrize(
    "bad",
    [
        {"host": ""},
        {"port": -1},
        {"port": 65536},
        {"port": True},
        {"port": "8000"},
        {"api_key": "one"},
        {"api_key": ("one", "")},
        {"api_key": (5,)},
        {"served_model_name": 5},
        {"allowed_origins": None},
        {"no_ui": 1},
        {"log_format": "xml"},
        {"log_level": "INFO"},
        {"metrics_prefix": "a:b"},
        {"metrics_prefix": "7a"},
        {"request_timeout": 0},
        {"shutdown_timeout": -1},
        {"stream_timeout": float("nan")},
        {"keep_alive_timeout": float("inf")},
        {"header_timeout": 0},
        {"watchdog_timeout": None},
        {"tokenizer_workers": 1},
        {"max_body_bytes": 0},
        {"ssl_keyfile": "key.pem"},
        {"enable_log_outputs": True},
        {"allow_credentials": True, "allowed_origins": ("*",)},
        {"chat_template": ""},
        {"rate_limit": "rpm"},
        {"rate_limit": "rpm=5;tpm=6"},
        {"rate_limit": "rpm=5,rpm=6"},
        {"rate_limit": "rpd=5"},
        {"rate_limit": "concurrent=-1"},
        {"rate_limit": ""},
    ],
)
def test_bad_values_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**bad)
    assert next(iter(bad)) in caught.value.problem


def test_unknown_names() -> None:
    with pytest.raises(JaxserveError, match="did you mean port"):
        ServerConfig(prot=8000)  # pyright: ignore[reportCallIssue]


def test_every_setting_is_explained_and_used() -> None:
    source = Path(lifecycle.__file__).parent
    code = "\n".join(path.read_text() for path in source.rglob("*.py"))
    explained = {flag.name for flag in flags_of(ServerConfig) if flag.help}
    for field in fields(ServerConfig):
        assert field.name in explained
        assert f".{field.name}" in code, f"{field.name} does nothing"


def test_keys_come_from_the_environment_and_are_not_shown() -> None:
    config = ServerConfig().with_environment({"JAXSERVE_API_KEY": "sk-one, sk-two,"})
    assert config.api_key == ("sk-one", "sk-two")
    assert "sk-one" not in repr(config)
    assert ServerConfig(api_key=("mine",)).with_environment({"JAXSERVE_API_KEY": "other"}).api_key == ("mine",)
    assert ServerConfig(api_key_file="file").with_environment({"JAXSERVE_API_KEY": "other"}).api_key == ()
    config = ServerConfig(api_key=("mine",)).with_environment({"JAXSERVE_ADMIN_API_KEY": "r00t"})
    assert (config.api_key, config.admin_api_key, config.keyed) == (("mine",), ("r00t",), True)
    assert not ServerConfig(admin_api_key=("r00t",)).keyed and "r00t" not in repr(config)
    with pytest.raises(ConfigError) as caught:
        ServerConfig(api_key=("secret", ""))
    assert "secret" not in str(caught.value)


def test_chat_templates(tmp_path: Path) -> None:
    assert ServerConfig(chat_template="{{ messages }}").template() == "{{ messages }}"
    (tmp_path / "t.jinja").write_text("hällo {{ x }}", encoding="utf-8")
    assert ServerConfig(chat_template=str(tmp_path / "t.jinja")).template() == "hällo {{ x }}"
    for name in ("none.jinja", ".", "bad.jinja"):
        (tmp_path / "bad.jinja").write_bytes(b"\xff\xfe\xfd")
        with pytest.raises(ConfigError, match="cannot read the chat template"):
            ServerConfig(chat_template=str(tmp_path / name)).template()


# --- sockets --------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, **settings: Any) -> str:
    """The output of a start with a missing model, which must not have been looked up."""
    engine = EngineConfig(model=str(tmp_path / "none"))
    with pytest.raises(JaxserveError) as caught:
        lifecycle.serve(engine, ServerConfig(**settings), command=["/bin/false"])
    return str(caught.value)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = refused(tmp_path, port=port)
        assert (
            text
            == f"127.0.0.1 port {port} is already in use; choose another --port, or stop the process that listens there"
        )
        assert "in use" in refused(tmp_path, host="localhost", port=port)


def test_hosts_of_other_machines(tmp_path: Path) -> None:
    assert "cannot resolve host" in refused(tmp_path, host="no.such.host.invalid", port=0)
    assert "cannot resolve host" in refused(tmp_path, host="a" * 300, port=0)
    assert "cannot listen on 192.0.2.1" in refused(tmp_path, host="192.0.2.1", port=0)


def test_certificates(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN NONSENSE-----")
    for name in (str(garbage), str(tmp_path / "none.pem")):
        assert "cannot load the TLS certificate" in refused(tmp_path, ssl_certfile=name, port=0)
    made = certificate(tmp_path)
    context = listening.tls(ServerConfig(ssl_certfile=str(made[0]), ssl_keyfile=str(made[1])))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    locked = tmp_path / "locked.pem"
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:x", "-in", str(made[1]), "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    assert "cannot load" in refused(tmp_path, ssl_certfile=str(made[0]), ssl_keyfile=str(locked), port=0)


def certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-out", str(cert), "-keyout", str(key)], check=True, capture_output=True)
    return cert, key


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    config = ServerConfig(uds=str(path))
    sockets = listening.bind(config)
    assert "server.sock: already in use" in refused(tmp_path, uds=str(path))
    assert listening.place(config, sockets) == f"the Unix socket {path}" and not listening.everywhere(sockets)
    sockets[0].close()  # as if the process was killed: the path stays, and does not hinder the next
    assert path.is_socket()
    listening.close(config, listening.bind(config))
    assert not path.exists()
    path.write_text("not a socket")
    assert "already in use" in refused(tmp_path, uds=str(path)) and path.read_text() == "not a socket"
    assert "cannot listen on the Unix socket" in refused(tmp_path, uds=str(tmp_path / ("x" * 200)))


def test_a_server_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with living.started(tmp_path, fake="slow=0", server={"uds": str(path)}) as server:
        living.wait(lambda: "listening on the Unix socket" in server.log)

        def get(target: str, host: str = "localhost") -> bytes:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                return living.answer(client).body

        living.wait(lambda: b"tiny" in get("/v1/models") and "curl" in server.log)
        assert f"-H 'Content-Type: application/json' --unix-socket {path} -d" in server.log
        assert b"Host header not allowed" in get("/v1/models", host="other.example")
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0 and not path.exists()


def test_every_address_of_a_name() -> None:
    config = ServerConfig(host="localhost", port=0)
    sockets = listening.bind(config)
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        port = sockets[0].getsockname()[1]
        assert listening.url(config, sockets) == f"http://localhost:{port}"
        assert not listening.everywhere(sockets)
        for host, shown in (("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("fe80::1", "[fe80::1]"), ("a.b", "a.b")):
            assert listening.url(ServerConfig(host=host), sockets) == f"http://{shown}:{port}"
    finally:
        for sock in sockets:
            sock.close()


def test_all_addresses() -> None:
    [opened] = listening.bind(ServerConfig(host="0.0.0.0", port=0))
    with opened:
        assert listening.everywhere([opened])


# --- logs -----------------------------------------------------------------------------------------------------------


def logged(form: str, message: str, *, secrets: tuple[str, ...] = (), fields: dict[str, Any] | None = None) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.Lines(form, secrets))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError(message)
    except ValueError:
        logger.error("%s", message, exc_info=True, extra={"fields": fields or {}})
    return stream.getvalue()


HOSTILE = "a\r\n2026-01-01T00:00:00Z ERROR forged\x1b[2J\x1b]0;title\x07\u2028\u2029\u202e\x85\x00 b"


@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_cannot_be_forged(form: str) -> None:
    text = logged(form, HOSTILE, fields={"id": HOSTILE})
    assert not any(c in text for c in "\r\x1b\x07\x00\x85\u2028\u2029\u202e")
    lines = text.splitlines()
    assert not any(line.startswith("2026-01-01") for line in lines)
    if form == "json":
        [line] = lines
        assert json.loads(line)["id"] == json.loads(line)["message"] == HOSTILE
        assert "Traceback" in json.loads(line)["exception"]
    else:
        assert all(line.startswith("    ") for line in lines[1:])


@pytest.mark.parametrize("value", ["x status=200 error=none", 'x" status=200 "', "a=b"])
def test_values_cannot_forge_other_fields(value: str) -> None:
    """Such as those of X-Request-Id in text format."""
    line = logged("text", "GET /", fields={"id": value, "status": 400}).splitlines()[0]
    assert line.endswith(" status=400")
    _, _, rest = line.partition(" GET / id=")
    shown, end = json.JSONDecoder().raw_decode(rest)
    assert (shown, rest[end:]) == (value, " status=400")


@pytest.mark.parametrize("form", ["text", "json"])
def test_keys_are_masked_in_every_log_line(form: str) -> None:
    secrets = ("sk-1", "sk-1-longer", 'quo"te')
    text = logged(form, f"got {' '.join(secrets)}", secrets=secrets, fields={"x": "sk-1-longer"})
    assert "sk-1" not in text
    assert "longer" not in text
    assert "quo" not in text


@given(st.text(), st.sampled_from(("text", "json")))
def test_any_text_is_one_line(text: str, form: str) -> None:
    record = logging.LogRecord("test", logging.INFO, "", 0, "%s", (text,), None)
    line = logs.Lines(form).format(record)
    assert len(line.splitlines()) == 1
    assert line.isprintable()


def test_the_log_line_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    record = RequestRecord("id\n7", arrival=0.0, error="no\x1b[31m")
    logger = logging.getLogger("jaxserve.server")
    logger.propagate = True
    with caplog.at_level(logging.INFO, "jaxserve.server"):
        logs.request_line(record, method="POST", path="/a\nb" + "c" * 5000, status=400, config=ServerConfig())
    [entry] = caplog.records
    shown = logs.Lines("text").format(entry)
    assert len(shown) < 1000
    assert "status=400" in shown
    assert "id=id\\n7" in shown
    assert "error=no\\x1b[31m" in shown


def test_unknown_speeds(caplog: pytest.LogCaptureFixture) -> None:
    """Requests that ended before their first tokens were reported, and those too short to measure."""
    logging.getLogger("jaxserve.server").propagate = True
    prompt = Request(id="a", prompt_token_ids=[5], params=SamplingParams())
    with caplog.at_level(logging.INFO, "jaxserve.server"):
        for count, last in ((0, 2), (1, 2), (5, 2), (5, 1.019)):
            record = RequestRecord("x", arrival=0.0, first_token=1.0, last_token=last, prepared=[prompt])
            record.generated_tokens = count
            logs.request_line(record, method="POST", path="/a", status=504, config=ServerConfig())
    lines = [vars(entry)["fields"] for entry in caplog.records]
    assert [line["tokens_per_second"] for line in lines] == [None, None, 4.0, None]
    assert [line["generated_tokens"] for line in lines] == [0, 1, 5, 5]


def test_how_a_request_ended(caplog: pytest.LogCaptureFixture) -> None:
    """By finish reasons; without one, the engine failed or the client left."""
    logging.getLogger("jaxserve.server").propagate = True
    prompt = Request(id="a", prompt_token_ids=[5], params=SamplingParams())
    with caplog.at_level(logging.INFO, "jaxserve.server"):
        for reasons, error in ((["stop", "length", "stop"], None), ([], "The engine has failed."), ([], None)):
            record = RequestRecord("x", arrival=0.0, prepared=[prompt], error=error)
            record.finish_reasons = list(reasons)
            logs.request_line(record, method="POST", path="/a", status=200, config=ServerConfig())
    assert [vars(entry)["fields"]["finish"] for entry in caplog.records] == ["length,stop", "error", "left"]


def test_the_line_about_throughput(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    logging.getLogger("jaxserve.server").propagate = True
    none = FakeEngine({}).metrics()
    line = logs.Throughput()
    with caplog.at_level(logging.INFO, "jaxserve.server"):
        line.tell(None)
        line.tell(none)
        now += 10
        line.tell(none)  # nothing was done, nothing is said
        assert not caplog.records
        now += 10
        line.tell(replace(none, prompt_tokens=100, generated_tokens=50, prefix_queries=80, prefix_hits=20, running=1))
    [entry] = caplog.records
    shown = logs.Lines("text").format(entry)
    assert "prompt_tokens_per_second=10 generated_tokens_per_second=5 running=1 waiting=0" in shown
    assert "prefix_hits=25.0%" in shown
    caplog.clear()
    now += 10
    with caplog.at_level(logging.INFO, "jaxserve.server"):
        line.tell(replace(none, prompt_tokens=30, running=1))  # of an engine that was started again
        assert not caplog.records


# --- histograms -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 5)), max_size=30))
def test_histograms(values: list[tuple[float, int]]) -> None:
    bounds = (0.1, 1.0, 10.0, 1000.0)
    histogram = Histogram(bounds)
    for value, count in values:
        histogram.observe(value, count)
    for name, below in histogram.buckets():
        assert below == sum(count for value, count in values if value <= float(name))
    assert histogram.sum == pytest.approx(sum(value * count for value, count in values))


def test_classes_of_token_counts() -> None:
    assert token_counts(300) == (1, 2, 5, 10, 20, 50, 100, 200)
