# SPDX-License-Identifier: Apache-2.0
"""Key files: what they say, what is wrong with them, and what a reload does."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import ConfigError
from jaxserve.server.http.api_keys import SCOPES, KeyRing, KeySources
from jaxserve.server.http.limits import RateLimit

FILE = """# Keys of this server.
sk-plain
   # indented
sk-search\tname=search

sk-ops  scope=admin name=ops
sk-scrape name=prometheus scope=metrics
sk-search-2 name=search
"""


def written(folder: Path, text: str) -> str:
    (folder / "keys").write_text(text)
    return str(folder / "keys")


def test_names_and_scopes(tmp_path: Path) -> None:
    file = written(tmp_path, FILE)
    admin = tmp_path / "admin"
    admin.write_text("sk-root\nsk-lesser name=less scope=api\n")
    ring = KeyRing(KeySources(api=("first", "two"), api_file=file, admin=("top",), admin_file=str(admin)))
    assert {key.secret: (key.name, key.scope) for key in ring.keys} == {
        "first": ("key-1", "api"),
        "two": ("key-2", "api"),
        "sk-plain": ("key-3", "api"),
        "sk-search": ("search", "api"),
        "sk-ops": ("ops", "admin"),
        "sk-scrape": ("prometheus", "metrics"),
        "sk-search-2": ("search", "api"),
        "top": ("admin-1", "admin"),
        "sk-root": ("admin-2", "admin"),
        "sk-lesser": ("less", "api"),
    }
    assert ring.admins
    assert not any(key.secret in repr(ring.keys) for key in ring.keys)


def test_a_scope_includes_those_before_it(tmp_path: Path) -> None:
    ring = KeyRing(KeySources(api_file=written(tmp_path, FILE)))
    for secret, allowed in (("sk-scrape", 1), ("sk-plain", 2), ("sk-ops", 3)):
        key = ring.find([secret])
        assert key is not None and [key.may(scope) for scope in SCOPES] == [place < allowed for place in range(3)]


def test_limits(tmp_path: Path) -> None:
    file = written(tmp_path, "a\nb name=b rpm=5 tpm=2k\nc name=c concurrent=none rpm=1\nb2 tpm=2000 name=b rpm=5")
    limits = {key.secret: key.limit for key in KeyRing(KeySources(api_file=file)).keys}
    default = RateLimit.parse("rpm=600, tpm=200k,concurrent=32", where="rate_limit")
    assert limits["a"].over(default) == default == RateLimit(rpm=600, tpm=200_000, concurrent=32)
    assert limits["b"].over(default) == limits["b2"].over(default) == RateLimit(rpm=5, tpm=2000, concurrent=32)
    assert limits["c"].over(default) == RateLimit(rpm=1, tpm=200_000, concurrent=math.inf)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rpm=600,foo=1", "rate_limit has 'foo=1', which is no limit"),
        ("600", "rate_limit has '600', which is no limit"),
        ("rpm=1,tpm=2,rpm=3", "rate_limit sets rpm twice"),
        ("rpm=0", "rate_limit: rpm is '0', expected a whole number"),
    ],
)
def test_wrong_limits_are_named(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        RateLimit.parse(text, where="rate_limit")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "contains no key"),
        ("# sk-secret\n", "contains no key"),
        ("sk-secret\nsk-secret\n", "API key key-2 is the same as key-1"),
        ("a\nsk-secret sk-secret", "line 2 has a second word"),
        ("sk-secret rmp=6", "line 1 has an unknown option"),
        ("sk-secret scope=root", "line 1 has an unknown scope"),
        ("sk-secret scope=", "line 1 has an unknown scope"),
        ("sk-secret name=a name=b", "line 1 sets name twice"),
        ("sk-secret name=", "the name is not"),
        ("sk-secret rpm=0", "line 1: rpm is '0'"),
        ("sk-secret tpm=1.5", "line 1: tpm is '1.5'"),
        ("sk-secret concurrent=", "line 1: concurrent is ''"),
        ("sk-secret rpm=5 rpm=5", "line 1 sets rpm twice"),
        ("sk-secret name=a rpm=5\nb name=a", "API keys named a have different limits"),
        ("sk-secret name=sk-secret,x", "the name is not"),
    ],
)
def test_faults_are_named_and_show_no_key(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyRing(KeySources(api_file=written(tmp_path, text)))
    assert problem in caught.value.problem
    assert "secret" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "binary", "."):
        with pytest.raises(ConfigError, match="cannot read the key file"):
            KeyRing(KeySources(admin_file=str(tmp_path / name)))


def test_a_reload_takes_new_keys_and_keeps_the_old_ones_if_it_fails(tmp_path: Path) -> None:
    file = written(tmp_path, "old name=team\n")
    ring = KeyRing(KeySources(api_file=file))
    written(tmp_path, "new name=team\nold name=team\n")
    ring.read()
    assert ring.find(["new"]) and ring.find(["old"])
    written(tmp_path, "new bad\n")
    with pytest.raises(ConfigError):
        ring.read()
    assert ring.find(["new"]) and ring.find(["old"])
    written(tmp_path, "new name=team\n")
    ring.read()
    assert ring.find(["new"]) and not ring.find(["old"])
    assert ring.secrets == {"old", "new"}  # the log goes on masking both


@given(st.lists(st.text(min_size=1), unique=True, max_size=5), st.lists(st.text(), max_size=3))
def test_only_the_keys_are_found(keys: list[str], given: list[str]) -> None:
    ring = KeyRing(KeySources(api=keys))
    found = ring.find(given)
    assert (found.secret if found else None) == next((key for key in keys if key in given), None)
