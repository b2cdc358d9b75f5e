# SPDX-License-Identifier: Apache-2.0
"""Rate limits of API keys: requests and tokens per minute, as token buckets, and concurrent requests.

A bucket holds what a minute allows, and refills at a constant rate. A request takes 1 from the bucket of requests when
it begins, and its prompt's tokens from the bucket of tokens when they are known. Generated tokens are taken when it
ends: they may leave the bucket below zero, and the next request waits until it is refilled. So the rate is kept over
time, whatever lengths clients ask for.
"""

import math
import time
from collections.abc import Callable

from jaxserve.server.errors import ApiError
from jaxserve.server.http.limits import RateLimit

ANONYMOUS = "anonymous"  # shares one account: requests without a key
EPSILON = 1e-6  # of a request or token: rounding
WEIGHT = 0.1  # of a request's duration in the mean


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
        """Seconds until it holds this amount; a full bucket is enough for any."""
        missing = min(amount, self.capacity) - self.balance(now)
        return 0.0 if missing < EPSILON else missing * 60 / self.capacity


class Account:
    """What the requests of one name have used."""

    def __init__(self, name: str, limit: RateLimit, now: float) -> None:
        self.name = name
        self.running = 0
        self.mean_seconds = 1.0  # duration of a request
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
        self.refused(account.name, which)
        limit = f"{int(getattr(account.limit, which))} {_UNITS[which]}"
        whose = f"key {account.name}" if account.name != ANONYMOUS else "this server"
        message = f"Rate limit of {whose} reached: {limit}. Try again in {duration(wait)}."
        headers = {"Retry-After": str(max(1, math.ceil(wait))), **account.headers(self.clock())}
        kind = _KINDS.get(which, "requests")

        raise ApiError(429, message, type=kind, code="rate_limit_exceeded", headers=headers)


class Grant:
    """A request that was let in."""

    def __init__(self, limiter: Limiter, account: Account, begun: float) -> None:
        self._limiter, self._account, self._begun = limiter, account, begun
        self._checked = False

    def headers(self) -> dict[str, str]:
        return self._account.headers(self._limiter.clock())

    def take_prompt(self, tokens: int) -> None:
        """Count the tokens of prompts. Raises a 429 if there are too few left, unless it has taken some before."""
        bucket = self._account.buckets.get("tpm")
        if bucket is None:
            return
        now = self._limiter.clock()
        if not self._checked and (wait := bucket.wait(tokens, now)):
            self._limiter.refuse(self._account, "tpm", wait)
        self._checked = True
        bucket.take(tokens, now)

    def take_generated(self, tokens: int) -> None:
        if "tpm" in self._account.buckets:
            self._account.buckets["tpm"].take(tokens, self._limiter.clock())

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
