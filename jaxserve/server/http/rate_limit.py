# SPDX-License-Identifier: Apache-2.0
"""Rate limits of API keys: requests and tokens per minute, as token buckets, and concurrent requests.

A bucket holds what a minute allows, and refills at a constant rate. A request takes 1 from the bucket of requests when
it begins. From the bucket of tokens it takes its prompt and the most that it may generate before it runs, and what it
did not use goes back at its end. So requests that run at once keep the limit too.
"""

import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxserve.server.errors import ApiError
from jaxserve.server.http.limits import RateLimit

ANONYMOUS = "anonymous"  # shares one account: requests without a key
EPSILON = 1e-6  # of a request or token: rounding
WEIGHT = 0.1  # of a request's duration, or an answer's length, in the mean
FIRST_LENGTH = 256.0  # expected tokens of the first answer without max_tokens


class Bucket:
    def __init__(self, per_minute: float, now: float) -> None:
        self.capacity, self._balance, self._time = per_minute, per_minute, now

    def balance(self, now: float) -> float:
        self._balance = min(self.capacity, self._balance + (now - self._time) * self.capacity / 60)
        self._time = now
        return self._balance

    def resize(self, per_minute: float, now: float) -> None:
        self._balance = min(self.balance(now), per_minute)
        self.capacity = per_minute

    def take(self, amount: float, now: float) -> None:
        self._balance = self.balance(now) - amount

    def wait(self, amount: float, now: float) -> float:
        """Seconds until it holds this amount, which must not exceed the capacity."""
        missing = amount - self.balance(now)
        return 0.0 if missing < EPSILON else missing * 60 / self.capacity


class Account:
    """What the requests of one name have used."""

    def __init__(self, name: str, limit: RateLimit, now: float) -> None:
        self.name = name
        self.running = 0
        self.mean_seconds = 1.0  # duration of a request
        self.mean_length = FIRST_LENGTH  # tokens of an answer whose length the client did not limit
        self.buckets: dict[str, Bucket] = {}  # "rpm", "tpm"
        self.set(limit, now)

    def set(self, limit: RateLimit, now: float) -> None:
        self.limit = limit
        for name in ("rpm", "tpm"):
            most: float | None = getattr(limit, name)
            if most is None or math.isinf(most):
                self.buckets.pop(name, None)
            elif name in self.buckets:
                self.buckets[name].resize(most, now)
            else:
                self.buckets[name] = Bucket(most, now)

    def headers(self, now: float) -> dict[str, str]:
        """OpenAI's response headers."""
        found: dict[str, str] = {}
        for kind, bucket in ((_KINDS[name], bucket) for name, bucket in self.buckets.items()):
            found[f"x-ratelimit-limit-{kind}"] = str(int(bucket.capacity))
            found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.balance(now))))
            found[f"x-ratelimit-reset-{kind}"] = duration(bucket.wait(bucket.capacity, now))
        return found

    @property
    def title(self) -> str:
        return f"key {self.name}" if self.name != ANONYMOUS else "this server"


_KINDS = {"rpm": "requests", "tpm": "tokens"}
_UNITS = {"rpm": "requests per minute", "tpm": "tokens per minute", "concurrent": "concurrent requests"}


class Limiter:
    """The accounts of all API keys. `refused` is called with the name of the key and of the limit."""

    def __init__(
        self,
        default: RateLimit,
        refused: Callable[[str, str], object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.default, self.refused, self.clock = default, refused, clock
        self._accounts: dict[str, Account] = {}

    def begin(self, name: str | None, limit: RateLimit) -> "Grant":
        """Count a request that begins; `end` must follow. Raises a 429 if a limit is reached."""
        name, limit, now = name or ANONYMOUS, limit.over(self.default), self.clock()
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = Account(name, limit, now)
        elif account.limit != limit:  # a key file was reloaded
            account.set(limit, now)
        if account.running >= (limit.concurrent or math.inf):
            self.refuse(account, "concurrent", account.mean_seconds / account.running)
        for which, bucket in account.buckets.items():
            if wait := bucket.wait(1, now):
                self.refuse(account, which, wait)
        if "rpm" in account.buckets:
            account.buckets["rpm"].take(1, now)
        account.running += 1
        return Grant(self, account, now)

    def refuse(self, account: Account, which: str, wait: float) -> None:
        limit = f"{int(getattr(account.limit, which))} {_UNITS[which]}"
        message = f"Rate limit of {account.title} reached: {limit}. Try again in {duration(wait)}."
        raise self._error(account, which, message, {"Retry-After": str(max(1, math.ceil(wait)))})

    def refuse_size(self, account: Account, bucket: Bucket, tokens: int, prompt: int) -> None:
        """For a request that no waiting helps."""
        remedy = "Shorten the prompt." if prompt > bucket.capacity else "Lower max_tokens or n, or shorten the prompt."
        message = f"Request too large for {account.title}: limit {int(bucket.capacity)} tokens per minute, "
        message += f"requested {tokens} (prompt and max_tokens). {remedy}"
        raise self._error(
            account, "tpm", message, {"x-should-retry": "false"}
        )  # OpenAI's clients retry a 429 otherwise

    def _error(self, account: Account, which: str, message: str, headers: dict[str, str]) -> ApiError:
        self.refused(account.name, which)
        headers |= account.headers(self.clock())
        return ApiError(429, message, type=_KINDS.get(which, "requests"), code="rate_limit_exceeded", headers=headers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """The tokens that a request may use."""

    prompt: int
    generated: int = 0  # at most, by answers with max_tokens
    unlimited: int = 0  # the number of answers without max_tokens


class Grant:
    """A request that was let in."""

    def __init__(self, limiter: Limiter, account: Account, begun: float) -> None:
        self._limiter, self._account, self._begun = limiter, account, begun
        self._reserved: float | None = None
        self._used = 0

    def headers(self) -> dict[str, str]:
        return self._account.headers(self._limiter.clock())

    @contextmanager
    def reserving(self, need: Need) -> Generator[None]:
        """Reserve tokens, and at the end give back what `use` has not counted. Within another reservation it reserves
        nothing. Raises a 429 if too few are left."""
        if self._reserved is not None:
            yield
            return
        self._reserved = self._reserve(need)
        try:
            yield
        finally:
            if (bucket := self._account.buckets.get("tpm")) is not None:
                bucket.take(self._used - self._reserved, self._limiter.clock())

    def _reserve(self, need: Need) -> float:
        account, now = self._account, self._limiter.clock()
        bucket = account.buckets.get("tpm")
        if bucket is None:
            return 0.0
        least = need.prompt + need.generated
        if least > bucket.capacity:
            self._limiter.refuse_size(account, bucket, least, need.prompt)
        amount = min(least + need.unlimited * account.mean_length, bucket.capacity)
        if wait := bucket.wait(amount, now):
            self._limiter.refuse(account, "tpm", wait)
        bucket.take(amount, now)
        return amount

    def use(self, prompt: int, generated: int) -> None:
        self._used += prompt + generated

    def note_length(self, tokens: int) -> None:
        """An answer without max_tokens has ended after so many tokens."""
        self._account.mean_length += WEIGHT * (tokens - self._account.mean_length)

    def end(self) -> None:
        account = self._account
        account.running -= 1
        account.mean_seconds += WEIGHT * (self._limiter.clock() - self._begun - account.mean_seconds)


def duration(seconds: float) -> str:
    """Such as 20ms, 1.5s or 6m0s, as in OpenAI's headers."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    tenths = math.ceil(seconds * 10)
    if tenths < 600:
        return f"{tenths / 10:g}s"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s"
