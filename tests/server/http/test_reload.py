# SPDX-License-Identifier: Apache-2.0
"""SIGHUP reloads key files and the certificate of a running server. The engine is a fake."""

import http.client
import signal
import socket
import ssl
import subprocess
from contextlib import closing
from pathlib import Path

from tests.server import live as living
from tests.server.live import Live, wait


def certificate(folder: Path, name: str) -> tuple[str, str]:
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}"]
    subprocess.run([*command, "-out", str(cert), "-keyout", str(key)], check=True, capture_output=True)
    return str(cert), str(key)


def served_certificate(port: int) -> str:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as sock,
        context.wrap_socket(sock) as secured,
    ):
        found = secured.getpeercert(binary_form=True)
        assert found is not None
        return ssl.DER_cert_to_PEM_cert(found)


def reload(server: Live, logged: str) -> None:
    before = server.log.count(logged)
    server.signal(signal.SIGHUP)
    wait(lambda: server.log.count(logged) > before, 20)


def test_keys_and_certificates_are_replaced(tmp_path: Path) -> None:
    first, second = certificate(tmp_path, "first"), certificate(tmp_path, "second")
    cert, key, keys = (tmp_path / name for name in ("cert.pem", "key.pem", "keys"))
    cert.write_bytes(Path(first[0]).read_bytes())
    key.write_bytes(Path(first[1]).read_bytes())
    keys.write_text("sk-old name=team\n")
    settings = {"api_key_file": str(keys), "ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    with living.started(tmp_path, fake="slow=0.01", server=settings) as server:
        server.wait_listening()

        def status(secret: str) -> int:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with closing(http.client.HTTPSConnection("127.0.0.1", server.port, timeout=20, context=context)) as one:
                one.request("POST", "/tokenize", b"{}", {"Authorization": f"Bearer {secret}"})
                return one.getresponse().status

        assert (status("sk-old") != 401, status("sk-new")) == (True, 401)
        assert served_certificate(server.port) == Path(first[0]).read_text()

        keys.write_text("sk-new name=team\n")
        cert.write_bytes(Path(second[0]).read_bytes())
        key.write_bytes(Path(second[1]).read_bytes())
        reload(server, "reloaded the TLS certificate")
        assert "reloaded 1 API keys" in server.log
        assert (status("sk-old"), status("sk-new") != 401) == (401, True)
        assert served_certificate(server.port) == Path(second[0]).read_text()

        keys.write_text("sk-worse oops\n")
        key.write_bytes(Path(first[1]).read_bytes())  # not that of the certificate
        reload(server, "the TLS certificate was not reloaded")
        assert "API keys were not reloaded" in server.log
        assert (status("sk-old"), status("sk-new") != 401) == (401, True)
        assert served_certificate(server.port) == Path(second[0]).read_text()

        wait(lambda: "POST /tokenize" in server.log)
        assert "key=team" in server.log and "sk-" not in server.log
        server.signal(signal.SIGTERM)
        assert server.wait_exit(20) == 0


def test_without_a_file_a_hangup_ends_the_server(tmp_path: Path) -> None:
    """As it ends any process when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and child processes inherit that
    try:
        with living.live(tmp_path, fake="slow=0.01") as server:
            server.signal(signal.SIGHUP)
            assert server.wait_exit(20) == -signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
