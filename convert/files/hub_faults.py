# SPDX-License-Identifier: Apache-2.0
"""A model of the hub, and one line for each way that asking for it can fail."""

import errno
import ssl
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import gaierror

from convert.files.header import quote
from jaxserve.errors import CheckpointError, one_line

HINT_AGAIN = "run it again"
HINT_ROOM = "free some space, or set HF_HOME to a larger disk"
HINT_ENDPOINT = "check HF_ENDPOINT, and whether a proxy answers in its place"
_OR_OFFLINE = "or set HF_HUB_OFFLINE=1 to use what the cache has"
_HINT_NETWORK = f"check the network and HF_ENDPOINT, {_OR_OFFLINE}"


@dataclass(frozen=True)
class HubModel:
    """A model of the hub. Its place in the cache is laid out as huggingface_hub documents it."""

    id: str
    revision: str
    endpoint: str
    cache: Path

    @property
    def place(self) -> Path:
        return self.cache / f"models--{self.id.replace('/', '--')}"

    def folder(self, commit: str) -> Path:
        return self.place / "snapshots" / commit

    def __str__(self) -> str:
        return quote(self.id) if self.revision == "main" else f"{quote(self.id)} at {quote(self.revision)}"


@contextmanager
def explained(model: HubModel, *, file: str | None = None) -> Generator[None]:
    """One line for whatever huggingface_hub raises: it documents a part, and its xet and HTTP libraries add theirs."""
    try:
        yield
    except Exception as error:
        # A failed look at a file comes wrapped in one that only says it is not in the cache.
        while type(error).__name__ == "LocalEntryNotFoundError" and isinstance(error.__cause__, Exception):
            error = error.__cause__
        problem, hint = _explain(error, model, file)
        raise CheckpointError(problem, hint) from error


def _explain(error: Exception, model: HubModel, file: str | None) -> tuple[str, str]:
    import httpx2  # what huggingface_hub speaks HTTP with
    from huggingface_hub import errors

    what = f"{quote(file)} of {model}" if file else str(model)
    hub = one_line(model.endpoint)
    page = f"{hub}/{model.id}"
    match error:
        case errors.GatedRepoError():
            return f"{quote(model.id)} is gated", f"accept its licence at {page}, and set HF_TOKEN to a token of yours"
        case errors.RepositoryNotFoundError():
            problem = f"there is no folder {quote(model.id)} here and no such model at {hub}, or it is private"
            return problem, "check the name, and for a private model set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return (
                f"{quote(model.id)} has no revision {quote(model.revision)}",
                f"see {page}/tree/main for those it has",
            )
        case errors.RemoteEntryNotFoundError():
            return f"{hub} lists {what} but does not have it", "run it again, or choose another revision"
        case errors.DisabledRepoError():
            return f"{quote(model.id)} has been disabled", f"see {page} for the reason"
        case errors.HfHubHTTPError():
            return _explain_status(error.response.status_code, error.response.headers, what, hub=hub, page=page)
        case httpx2.TimeoutException():
            return f"{hub} did not answer in time for {what}", _HINT_NETWORK
        case httpx2.ProxyError():
            return f"the proxy does not let {what} through ({reason(error)})", "check HTTPS_PROXY and NO_PROXY"
        case httpx2.ConnectError():
            return _explain_connection(error, hub)
        case httpx2.UnsupportedProtocol() | httpx2.InvalidURL():
            return f"{quote(hub)} is not the address of a hub", "check HF_ENDPOINT"
        case httpx2.HTTPError():
            return f"the connection to {hub} broke off at {what} ({reason(error)})", f"{HINT_AGAIN}, {_OR_OFFLINE}"
        case errors.FileMetadataError() | KeyError() | TypeError() | AttributeError():
            return f"{hub} does not answer as a hub does for {what}", HINT_ENDPOINT
        case UnicodeEncodeError():
            return f"the request for {what} cannot be written in ASCII", "check HF_TOKEN"
        case ValueError() if not file:  # JSON
            return f"{hub} does not answer as a hub does for {what}", HINT_ENDPOINT
        case OSError(errno=int()) if file:
            return _explain_disk(error, model)
        case OSError() if "Consistency check failed" in str(error):
            return f"{what} arrived with another size than {hub} announced", HINT_AGAIN
        case _:
            return f"{what} cannot be downloaded ({type(error).__name__}: {reason(error)})", _HINT_NETWORK


def _explain_status(status: int, headers: Mapping[str, str], what: str, *, hub: str, page: str) -> tuple[str, str]:
    if status in (401, 403):
        hint = f"set HF_TOKEN to a valid token that may read it, and accept its licence at {page} if it has one"
        return f"{hub} refuses access to {what} (status {status})", hint
    if status == 429:
        wait = headers.get("retry-after", "")
        pause = f"{wait} seconds" if wait.isdecimal() else "some minutes"
        return f"{hub} is asked too often (status 429)", f"wait {pause}, or set HF_TOKEN for a higher limit"
    hint = f"try again later, {_OR_OFFLINE}" if status >= 500 else HINT_ENDPOINT
    return f"{hub} answers {what} with status {status}", hint


def _explain_connection(error: BaseException, hub: str) -> tuple[str, str]:
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, gaierror):
            return f"the address of {hub} cannot be found ({reason(cause)})", _HINT_NETWORK
        if isinstance(cause, ssl.SSLError):
            hint = "check the clock and the proxy, or name the certificates to trust in SSL_CERT_FILE"
            return f"no secure connection to {hub} ({reason(cause)})", hint
        cause = cause.__cause__ or cause.__context__
    return f"{hub} cannot be reached ({reason(error)})", _HINT_NETWORK


def _explain_disk(error: OSError, model: HubModel) -> tuple[str, str]:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of the cache {shown(model.cache)} is full, {model} is incomplete", HINT_ROOM
    problem = f"the cache {shown(model.cache)} cannot be written ({reason(error)})"
    return problem, "check its permissions, or set HF_HOME to another folder"


def reason(error: BaseException) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return one_line(text.strip().split("\n")[0]).lower()


def shown(path: Path) -> str:
    return one_line(str(path), limit=1000)


def few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(quote, names[:3])) + more
