# SPDX-License-Identifier: Apache-2.0
"""A Hub model, and a one-line message for each way that downloading it can fail."""

import errno
import ssl
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import gaierror

from convert.files.header import quote
from jaxserve.errors import CheckpointError, one_line

HINT_AGAIN = "try again"
HINT_ROOM = "free disk space, or set HF_HOME to a folder on a larger disk"
HINT_ENDPOINT = "check HF_ENDPOINT, and whether a proxy intercepts the request"
_OR_OFFLINE = "or set HF_HUB_OFFLINE=1 to use only the cache"
_HINT_NETWORK = f"check the network and HF_ENDPOINT, {_OR_OFFLINE}"


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub. Its cache folder has the layout that huggingface_hub documents."""

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
    """Convert any exception of huggingface_hub, or of its HTTP and xet libraries, to a one-line error."""
    try:
        yield
    except Exception as error:
        # LocalEntryNotFoundError only says that the file is not cached; its cause is the real error.
        while type(error).__name__ == "LocalEntryNotFoundError" and isinstance(error.__cause__, Exception):
            error = error.__cause__
        problem, hint = _explain(error, model, file)
        raise CheckpointError(problem, hint) from error


def _explain(error: Exception, model: HubModel, file: str | None) -> tuple[str, str]:
    import httpx2  # huggingface_hub's HTTP client
    from huggingface_hub import errors

    what = f"{quote(file)} of {model}" if file else str(model)
    hub = one_line(model.endpoint)
    page = f"{hub}/{model.id}"
    match error:
        case errors.GatedRepoError():
            return f"{quote(model.id)} is gated", f"accept its license at {page}, and set HF_TOKEN to your token"
        case errors.RepositoryNotFoundError():
            problem = f"{quote(model.id)} is not a local folder, and {hub} has no such model or it is private"
            return problem, "check the name, and set HF_TOKEN if the model is private"
        case errors.RevisionNotFoundError():
            return (
                f"{quote(model.id)} has no revision {quote(model.revision)}",
                f"see {page}/tree/main for its revisions",
            )
        case errors.RemoteEntryNotFoundError():
            return f"{hub} lists {what} but does not have it", "try again, or choose another revision"
        case errors.DisabledRepoError():
            return f"{quote(model.id)} has been disabled", f"see {page} for the reason"
        case errors.HfHubHTTPError():
            return _explain_status(error.response.status_code, error.response.headers, what, hub=hub, page=page)
        case httpx2.TimeoutException():
            return f"{hub} timed out on {what}", _HINT_NETWORK
        case httpx2.ProxyError():
            return f"the proxy rejected the request for {what} ({reason(error)})", "check HTTPS_PROXY and NO_PROXY"
        case httpx2.ConnectError():
            return _explain_connection(error, hub)
        case httpx2.UnsupportedProtocol() | httpx2.InvalidURL():
            return f"{quote(hub)} is not a valid Hub URL", "check HF_ENDPOINT"
        case httpx2.HTTPError():
            return f"lost the connection to {hub} during {what} ({reason(error)})", f"{HINT_AGAIN}, {_OR_OFFLINE}"
        case errors.FileMetadataError() | KeyError() | TypeError() | AttributeError():
            return f"{hub} sent an invalid response for {what}", HINT_ENDPOINT
        case UnicodeEncodeError():
            return f"the request for {what} contains non-ASCII characters", "check HF_TOKEN"
        case ValueError() if not file:  # JSON
            return f"{hub} sent an invalid response for {what}", HINT_ENDPOINT
        case OSError(errno=int()) if file:
            return _explain_disk(error, model)
        case OSError() if "Consistency check failed" in str(error):
            return f"the size of {what} differs from what {hub} announced", HINT_AGAIN
        case _:
            return f"cannot download {what} ({type(error).__name__}: {reason(error)})", _HINT_NETWORK


def _explain_status(status: int, headers: Mapping[str, str], what: str, *, hub: str, page: str) -> tuple[str, str]:
    if status in (401, 403):
        hint = f"set HF_TOKEN to a token with read access, and accept the license at {page} if there is one"
        return f"{hub} denied access to {what} (status {status})", hint
    if status == 429:
        wait = headers.get("retry-after", "")
        pause = f"{wait} seconds" if wait.isdecimal() else "a few minutes"
        return f"{hub} rate limit exceeded (status 429)", f"wait {pause}, or set HF_TOKEN for a higher limit"
    hint = f"try again later, {_OR_OFFLINE}" if status >= 500 else HINT_ENDPOINT
    return f"{hub} returned status {status} for {what}", hint


def _explain_connection(error: BaseException, hub: str) -> tuple[str, str]:
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, gaierror):
            return f"cannot resolve {hub} ({reason(cause)})", _HINT_NETWORK
        if isinstance(cause, ssl.SSLError):
            hint = "check the clock and the proxy, or set SSL_CERT_FILE to the trusted certificates"
            return f"TLS connection to {hub} failed ({reason(cause)})", hint
        cause = cause.__cause__ or cause.__context__
    return f"cannot reach {hub} ({reason(error)})", _HINT_NETWORK


def _explain_disk(error: OSError, model: HubModel) -> tuple[str, str]:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of the cache {shown(model.cache)} is full, so {model} is incomplete", HINT_ROOM
    problem = f"cannot write to the cache {shown(model.cache)} ({reason(error)})"
    return problem, "check its permissions, or set HF_HOME to another folder"


def reason(error: BaseException) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return one_line(text.strip().split("\n")[0]).lower()


def shown(path: Path) -> str:
    return one_line(str(path), limit=1000)


def few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(quote, names[:3])) + more
