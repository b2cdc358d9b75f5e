# SPDX-License-Identifier: Apache-2.0
"""Rate limits: what a minute lets in, by a clock of the test; and the responses of a server."""

import math
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI, RateLimitError

from jaxserve.server.errors import ApiError
from jaxserve.server.http.limits import UNSET, RateLimit
from jaxserve.server.http.rate_limit import Limiter, duration
from tests.server import live as living
from tests.server.live import Live, Reply, wait

PROMPT = [5] * 40


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limiter(clock: Clock, text: str) -> Limiter:
    return Limiter(RateLimit.parse(text, where="test"), lambda *_: None, clock=clock)


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 5)), min_size=1, max_size=60),
)
def test_no_minute_has_more_requests_than_twice_the_limit_and_a_patient_client_waits_as_told(
    rpm: int, bursts: list[tuple[float, int]]
) -> None:
    """A burst takes what a minute allows at once, and meanwhile as much is refilled. On average the limit is kept."""
    clock, begun = Clock(), list[float]()
    limits = limiter(clock, f"rpm={rpm}")
    start = clock.now
    for pause, count in bursts:
        clock.now += pause
        for _ in range(count):
            try:
                limits.begin("a", UNSET).end()
            except ApiError as error:
                wait = int(error.headers["Retry-After"])
                assert error.status == 429 and error.headers["x-ratelimit-remaining-requests"] == "0"
                clock.now += wait
                limits.begin("a", UNSET).end()  # does not raise
            begun.append(clock.now)
    for place, moment in enumerate(begun):
        elapsed = moment - start
        assert place + 1 <= rpm + elapsed * rpm / 60 + 1e-6
        assert sum(moment <= other < moment + 60 for other in begun) <= 2 * rpm + 1


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 3000)), min_size=2, max_size=40))
def test_tokens_are_limited_on_average_and_no_request_is_too_large(requests: list[tuple[int, int]]) -> None:
    clock, tpm, used = Clock(), 1000, 0
    limits = limiter(clock, f"tpm={tpm}")
    start = clock.now
    for prompt, generated in requests:
        while True:
            try:
                grant = limits.begin("a", UNSET)
            except ApiError as error:
                clock.now += int(error.headers["Retry-After"])
                continue
            try:
                grant.take_prompt(prompt)
                break
            except ApiError as error:
                assert error.type == "tokens"
                clock.now += int(error.headers["Retry-After"])
            finally:
                grant.end()
        # What was used before this request, but for the last one, fits into the time.
        assert used - max(map(sum, requests)) <= tpm + (clock.now - start) * tpm / 60 + 1e-6
        grant.take_generated(generated)
        used += prompt + generated
    assert clock.now - start <= used * 60 / tpm + len(requests) * 3  # nor does anyone wait for long without need


def test_later_prompts_of_an_accepted_request_are_never_refused() -> None:
    limits = limiter(Clock(), "tpm=10")
    grant = limits.begin("a", UNSET)
    for _ in range(3):
        grant.take_prompt(9)
    assert grant.headers()["x-ratelimit-remaining-tokens"] == "0"


def test_concurrent_requests_and_names_are_separate() -> None:
    clock = Clock()
    limits = limiter(clock, "concurrent=2")
    first, _ = limits.begin("a", UNSET), limits.begin("a", UNSET)
    with pytest.raises(ApiError, match="key a reached: 2 concurrent requests"):
        limits.begin("a", UNSET)
    limits.begin("b", UNSET)
    limits.begin("a", RateLimit(concurrent=3))  # as after a reload
    clock.now += 80
    first.end()
    with pytest.raises(ApiError) as caught:
        limits.begin("a", UNSET)
    assert 2 <= int(caught.value.headers["Retry-After"]) <= 40  # after a long request, others are expected to be long


def test_a_changed_limit_keeps_what_was_used() -> None:
    limits = limiter(Clock(), "rpm=10")
    for _ in range(9):
        limits.begin("a", UNSET)
    assert limits.begin("a", RateLimit(rpm=100)).headers()["x-ratelimit-remaining-requests"] == "0"
    assert limits.begin("a", RateLimit(rpm=math.inf)).headers() == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (1.44, "1.5s"), (59.99, "1m0s"), (360, "6m0s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- a server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("limits")
    (folder / "keys").write_text(
        "free concurrent=none\nslow name=slow rpm=2\nlong name=long tpm=100\nwide name=wide concurrent=1\n"
        "scrape scope=metrics"
    )
    settings = {"api_key_file": str(folder / "keys"), "rate_limit": "concurrent=50", "admin_api_key": ["root"]}
    with living.started(folder, fake="slow=0.02", server=settings) as one:
        one.wait_listening()
        one.wait_ready()
        yield one
        one.process.terminate()
        assert one.wait_exit(20) == 0


def complete(server: Live, key: str, max_tokens: int = 5) -> Reply:
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True}
    return server.post("/v1/completions", body, Authorization=f"Bearer {key}")


def test_requests_per_minute(server: Live) -> None:
    replies = [complete(server, "slow") for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429]
    left = [reply.headers["x-ratelimit-remaining-requests"] for reply in replies]
    assert left == ["1", "0", "0"] and {reply.headers["x-ratelimit-limit-requests"] for reply in replies} == {"2"}
    assert re.fullmatch(r"(2\d|30)(\.\d)?s", replies[0].headers["x-ratelimit-reset-requests"])
    refused = replies[2]
    assert 25 <= int(refused.headers["retry-after"]) <= 30
    error = refused.error
    assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
    assert error["message"].startswith("Rate limit of key slow reached: 2 requests per minute. Try again in 2")
    assert complete(server, "free").status == 200
    assert "x-ratelimit-limit-requests" not in complete(server, "free").headers


def test_tokens_per_minute(server: Live) -> None:
    first = complete(server, "long")  # 40 of the prompt, then 5
    assert (first.status, first.headers["x-ratelimit-limit-tokens"]) == (200, "100")
    assert first.headers["x-ratelimit-remaining-tokens"] in ("55", "56", "57")
    assert complete(server, "long", max_tokens=50).status == 200
    refused = complete(server, "long")
    assert (refused.status, refused.error["type"]) == (429, "tokens")
    assert 20 <= int(refused.headers["retry-after"]) <= 24  # 35 to 40 tokens are missing


def test_concurrent_requests(server: Live) -> None:
    sock = server.connect()
    with sock:
        body = b'{"prompt": [5], "max_tokens": 2000, "stream": true, "return_token_ids": true}'
        sock.sendall(living.post("/v1/completions", body, "Authorization: Bearer wide"))
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        assert (complete(server, "wide").status, complete(server, "free").status) == (429, 200)
    wait(lambda: complete(server, "wide").status == 200, 20)


def test_what_is_not_limited(server: Live) -> None:
    for _ in range(5):
        assert server.get("/v1/models", Authorization="Bearer slow").status == 200
        assert server.get("/metrics", Authorization="Bearer scrape").status == 200
        assert server.post("/abort_requests", {"request_ids": []}, Authorization="Bearer root").status == 200


def test_refusals_are_counted(server: Live) -> None:
    with pytest.raises(RateLimitError, match="2 requests per minute"):
        client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="slow", max_retries=0)
        with client:
            for _ in range(3):
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)
    text = server.get("/metrics", Authorization="Bearer scrape").body.decode()
    shown = dict(re.findall(r'rate_limited_total\{engine="0",(.*),model_name="tiny"\} (.*)', text))
    assert float(shown['key="slow",limit="rpm"']) >= 1 and "free" not in "".join(shown)
    [total] = re.findall(r'admission_rejections_total\{.*reason="rate_limited"\} (.*)', text)
    assert float(total) == sum(map(float, shown.values()))
    assert 'key_requests_total{engine="0",key="slow",model_name="tiny",status="429"}' in text
