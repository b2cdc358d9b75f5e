# SPDX-License-Identifier: Apache-2.0
"""Listening sockets and TLS. Both are set up before the model loads, so that a port in use fails at once."""

import errno
import os
import socket
import ssl
from pathlib import Path

from jaxserve.config import ConfigError
from jaxserve.errors import JaxserveError
from jaxserve.server.config import ServerConfig

BACKLOG = 2048
# Caps the unread response bytes that the kernel buffers per connection; its default can grow to megabytes.
SEND_BUFFER = 128 * 1024


def bind(config: ServerConfig) -> list[socket.socket]:
    """A listening socket for each address that the host name resolves to, or for the path that is set."""
    if config.uds is not None:
        return [_on_path(Path(config.uds).expanduser(), config)]
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot resolve host {config.host!r}: {reason}", "choose another --host") from None
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            # With port 0 the first socket picks the port for all.
            port = sockets[0].getsockname()[1] if sockets else config.port
            try:
                sockets.append(_listening(family, (address[0], port, *address[2:])))
            except OSError as error:
                # The name may also resolve to an address family that this machine lacks.
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) or len(found) == 1:
                    raise
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise _listen_error(error, config) from None
    return sockets


def close(config: ServerConfig, sockets: list[socket.socket]) -> None:
    """Close the sockets, and remove the path of a Unix socket."""
    for opened in sockets:
        opened.close()
    if config.uds is not None:
        Path(config.uds).expanduser().unlink(missing_ok=True)


def _on_path(path: Path, config: ServerConfig) -> socket.socket:
    """A Unix domain socket, in place of one that no process listens on any more."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            if other.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        opened.bind(str(path))
        opened.listen(BACKLOG)
    except OSError as error:  # also a path that is too long
        opened.close()
        reason = "already in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        problem = f"cannot listen on the Unix socket {config.uds}: {reason}"
        raise JaxserveError(problem, "choose another --uds, or remove the file") from None
    opened.setblocking(False)
    return opened


def _listening(family: int, address: tuple[object, ...]) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
        opened.bind(address)
        opened.listen(BACKLOG)
    except BaseException:
        opened.close()
        raise
    opened.setblocking(False)
    return opened


def _listen_error(error: OSError, config: ServerConfig) -> JaxserveError:
    place = f"{config.host} port {config.port}"
    if error.errno == errno.EADDRINUSE:
        return JaxserveError(
            f"{place} is already in use", "choose another --port, or stop the process that listens there"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return JaxserveError(f"no permission to listen on {place}", "choose a --port above 1023")
    return JaxserveError(f"cannot listen on {place}: {error.strerror}", "choose another --host or --port")


def tls(config: ServerConfig) -> ssl.SSLContext | None:
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_certificate(context, config)
    return context


def renew(context: ssl.SSLContext, config: ServerConfig) -> None:
    """Use the certificate as it is on disk now for new connections. If it cannot be used, the old one stays."""
    tls(config)  # tried in a separate context: a key that does not match would leave the one in use half changed
    _load_certificate(context, config)


def _load_certificate(context: ssl.SSLContext, config: ServerConfig) -> None:
    try:
        # Without a password argument OpenSSL would prompt on the terminal.
        context.load_cert_chain(config.ssl_certfile or "", config.ssl_keyfile, password="")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = error.reason if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None) or str(error)
        names = " and ".join(name for name in (config.ssl_certfile, config.ssl_keyfile) if name)
        problem = f"cannot load the TLS certificate from {names}: {reason}"
        raise ConfigError(problem, "provide a PEM certificate and its unencrypted private key") from None


def everywhere(sockets: list[socket.socket]) -> bool:
    """Whether the server listens on all addresses of this machine."""
    return any(opened.getsockname()[0] in ("0.0.0.0", "::") for opened in sockets)


def place(config: ServerConfig, sockets: list[socket.socket]) -> str:
    """Where the server listens, for the log."""
    return url(config, sockets) if config.uds is None else f"the Unix socket {config.uds}"


def url(config: ServerConfig, sockets: list[socket.socket]) -> str:
    """The server's URL for a client on this machine. With a Unix socket, the host means nothing."""
    if config.uds is not None:
        return f"{'https' if config.ssl_certfile else 'http'}://localhost"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{'https' if config.ssl_certfile else 'http'}://{shown}:{sockets[0].getsockname()[1]}"
