# SPDX-License-Identifier: Apache-2.0
"""API keys with names, scopes and rate limits, from flags, the environment and files.

A key file has one key per line, options after it, and comments that start with #:

    sk-4f9a51
    sk-77c20b  name=search rpm=600 tpm=200k concurrent=32
    sk-e01b93  name=ops scope=admin
    sk-90cc4d  name=prometheus scope=metrics

Lines may share a name, so that a new key can replace an old one while both are valid; they share limits too. A key may
do what its scope allows: `metrics` reads the state of the server, `api` also uses the model, `admin` also operates the
engine.
"""

import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from jaxserve.config import ConfigError
from jaxserve.server.http.limits import LIMITS, UNSET, RateLimit

type Scope = Literal["metrics", "api", "admin"]

SCOPES: tuple[Scope, ...] = get_args(Scope.__value__)  # each includes those before it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FORM = "write one key per line: KEY [name=NAME] [scope=metrics|api|admin] [rpm=N] [tpm=N] [concurrent=N]"


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    name: str  # in logs and metrics
    scope: Scope
    secret: str = field(repr=False)
    limit: RateLimit = UNSET

    def may(self, scope: Scope) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class KeyRing:
    """All keys of a server. `sources` are the settings; `read` takes the files' contents as they are now."""

    def __init__(self, sources: "KeySources") -> None:
        self._sources = sources
        self.keys: Sequence[ApiKey] = ()
        self.secrets: frozenset[str] = frozenset()  # all since the start, for the log
        self._digests: Sequence[bytes] = ()
        self.read()

    def read(self) -> None:
        """Read the files. Raises a ConfigError, and keeps the old keys, if one cannot be used."""
        keys = self._sources.read()
        self.keys, self._digests = keys, [_digest(key.secret) for key in keys]
        self.secrets |= {key.secret for key in keys}

    @property
    def admins(self) -> bool:
        """Whether there are keys for administration."""
        return any(key.scope == "admin" for key in self.keys)

    def find(self, given: Sequence[str]) -> ApiKey | None:
        """The first key that is among these. Takes constant time for any key, valid or not."""
        digests = [_digest(secret) for secret in given]
        known = [
            any([hmac.compare_digest(digest, own) for digest in digests])  # a list: `any` must not end early
            for own in self._digests
        ]
        return next((key for key, is_it in zip(self.keys, known, strict=True) if is_it), None)


@dataclass(frozen=True, kw_only=True)
class KeySources:
    """Where keys come from: values, which are named by their position, and files."""

    api: Sequence[str] = ()
    api_file: str | None = None
    admin: Sequence[str] = ()
    admin_file: str | None = None

    def read(self) -> list[ApiKey]:
        found = list(_read("key", "api", self.api, self.api_file))
        found += _read("admin", "admin", self.admin, self.admin_file)
        seen: dict[str, ApiKey] = {}
        for key in found:
            other = seen.setdefault(key.secret, key)
            if other is not key:
                raise ConfigError(f"API key {key.name} is the same as {other.name}", "remove one of them")
        limits: dict[str, RateLimit] = {}
        for key in found:
            if limits.setdefault(key.name, key.limit) != key.limit:
                raise ConfigError(f"API keys named {key.name} have different limits", "give them the same")
        return found


def _read(prefix: str, scope: Scope, values: Sequence[str], file: str | None) -> Iterator[ApiKey]:
    for place, secret in enumerate(values, 1):
        yield ApiKey(name=f"{prefix}-{place}", scope=scope, secret=secret)
    if file is None:
        return
    count = len(values)
    for number, words in lines_of(file):
        count += 1
        yield _key(words, name=f"{prefix}-{count}", scope=scope, where=f"{file} line {number}")
    if count == len(values):
        raise ConfigError(f"{file} contains no key", FORM)


def lines_of(file: str) -> list[tuple[int, list[str]]]:
    """The words of each line with a key, with its number."""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the key file {file}: {reason}", "name a readable file") from None
    lines = ((number, line.split()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, words) for number, words in lines if words and not words[0].startswith("#")]


def _key(words: Sequence[str], *, name: str, scope: Scope, where: str) -> ApiKey:
    """The key of a line. Errors do not show it."""
    options: dict[str, str] = {"name": name, "scope": scope}
    limits: dict[str, str] = {}
    given: set[str] = set()
    for word in words[1:]:
        option, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{where} has a second word that is not an option", FORM)
        if option not in (*options, *LIMITS):
            raise ConfigError(f"{where} has an unknown option", FORM)
        if option in given:
            raise ConfigError(f"{where} sets {option} twice", "remove one of them")
        given.add(option)
        (limits if option in LIMITS else options)[option] = value
    if not NAME.fullmatch(options["name"]):
        problem = f"{where}: the name is not 1 to 64 letters, digits, dots, dashes and underscores"
        raise ConfigError(problem, "choose another")
    found: Scope | None = next((each for each in SCOPES if each == options["scope"]), None)
    if found is None:
        raise ConfigError(f"{where} has an unknown scope", f"choose one of {', '.join(SCOPES)}")
    limit = RateLimit.of(limits, where=where)
    return ApiKey(name=options["name"], scope=found, secret=words[0], limit=limit)


def _digest(key: str) -> bytes:
    # aiohttp decodes header bytes that are not UTF-8 to surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
