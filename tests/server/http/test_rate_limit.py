# SPDX-License-Identifier: Apache-2.0
"""Rate limits: what a minute lets in, by a clock of the test; and the responses of a server."""

import json
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI, RateLimitError

from jaxserve.server.errors import ApiError
from jaxserve.server.http.limits import UNSET, RateLimit
from jaxserve.server.http.rate_limit import Grant, Limiter, Need, duration
from tests.server import live as living
from tests.server.live import Live, Reply, wait
from tests.server.shell import Shell

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


@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 1500), st.integers(0, 1500), st.floats(0, 1), st.integers(0, 3)),
        min_size=2,
        max_size=40,
    )
)
def test_tokens_never_exceed_the_limit_even_with_requests_that_run_at_once(
    requests: list[tuple[float, int, int, float, int]],
) -> None:
    """Each waits as long as it is asked to, and ends when `later` further requests have begun."""
    clock, tpm = Clock(), 1000
    limits = limiter(clock, f"tpm={tpm}")
    start, used = clock.now, 0
    running: list[tuple[int, ExitStack]] = []
    for place, (pause, prompt, most, share, later) in enumerate(requests):
        clock.now += pause
        for _, ending in [each for each in running if each[0] <= place]:
            ending.close()
        running = [each for each in running if each[0] > place]
        need, fits = Need(prompt=prompt, generated=most), prompt + most <= tpm
        with ExitStack() as opened:
            for _ in range(3):  # one wait for any tokens at all, one for as many as are needed
                try:
                    grant = limits.begin("a", UNSET)
                    opened.callback(grant.end)
                    opened.enter_context(grant.reserving(need))
                    break
                except ApiError as error:
                    assert error.type == "tokens"
                    if "Retry-After" not in error.headers:
                        assert not fits and error.headers["x-should-retry"] == "false"
                        break
                    clock.now += int(error.headers["Retry-After"])
            else:
                raise AssertionError("refused after it had waited")
            if fits:
                grant.use(prompt, round(share * most))
                used += prompt + round(share * most)
                running.append((place + 1 + later, opened.pop_all()))
        assert used <= tpm + (clock.now - start) * tpm / 60 + 1e-6
    for _, ending in running:
        ending.close()
    clock.now += 120
    assert limits.begin("a", UNSET).headers()["x-ratelimit-remaining-tokens"] == str(tpm)


def test_unused_tokens_go_back_and_a_refused_request_uses_none() -> None:
    limits = limiter(Clock(), "tpm=100")
    grant = limits.begin("a", UNSET)
    with grant.reserving(Need(prompt=10, generated=60)):
        assert left(grant) == 30
        with pytest.raises(ApiError, match="Rate limit of key a reached: 100 tokens per minute"):
            limits.begin("a", UNSET).reserving(Need(prompt=10, generated=21)).__enter__()
        grant.use(10, 5)
    assert left(grant) == 85
    with pytest.raises(ZeroDivisionError), limits.begin("a", UNSET).reserving(Need(prompt=10, generated=60)):
        raise ZeroDivisionError
    assert left(grant) == 85


def test_parts_of_a_request_share_its_reservation() -> None:
    limits = limiter(Clock(), "tpm=100")
    grant = limits.begin("a", UNSET)
    with grant.reserving(Need(prompt=90)):
        for _ in range(3):
            with grant.reserving(Need(prompt=30)):
                grant.use(30, 0)
    assert left(grant) == 10


@pytest.mark.parametrize(
    ("need", "remedy"),
    [
        (Need(prompt=40, generated=61), r"requested 101 \(prompt and max_tokens\)\. Lower max_tokens or n, or shorten"),
        (Need(prompt=101, unlimited=1), r"requested 101 .* Shorten the prompt\."),
    ],
)
def test_a_request_that_can_never_fit_is_refused_with_the_remedy(need: Need, remedy: str) -> None:
    grant = limiter(Clock(), "tpm=100").begin("a", UNSET)
    with pytest.raises(
        ApiError, match=f"^Request too large for key a: limit 100 tokens per minute, {remedy}"
    ) as caught:
        grant.reserving(need).__enter__()
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert left(grant) == 100


def test_an_answer_without_max_tokens_reserves_what_others_have_needed() -> None:
    clock = Clock()
    limits = limiter(clock, "tpm=1000")
    grant = limits.begin("a", UNSET)
    with grant.reserving(Need(prompt=10, unlimited=2)):
        assert left(grant) == 1000 - 10 - 2 * 256
    for _ in range(200):
        grant.note_length(20)
    grant = limits.begin("a", UNSET)
    with grant.reserving(Need(prompt=10, unlimited=2)):
        assert left(grant) == pytest.approx(1000 - 10 - 2 * 20, abs=1)
    grant = limits.begin("a", UNSET)
    with grant.reserving(Need(prompt=10, unlimited=100)):  # never too large because of a guess
        assert left(grant) == 0
        grant.use(10, 1000)
    assert left(grant) == 0  # the excess of a wrong guess is paid later
    clock.now += 60
    assert left(grant) == 990


def left(grant: Grant) -> int:
    return int(grant.headers()["x-ratelimit-remaining-tokens"])


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
        "pair name=pair tpm=100\nvectors name=vectors tpm=100\nleft name=left tpm=600\nscrape scope=metrics"
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
    refused = complete(server, "long", max_tokens=50)  # 90, of which 55 to 60 are left
    assert (refused.status, refused.error["type"]) == (429, "tokens")
    assert 16 <= int(refused.headers["retry-after"]) <= 21
    large = complete(server, "long", max_tokens=61)
    assert (large.status, large.error["code"]) == (429, "rate_limit_exceeded")
    assert large.error["message"].startswith("Request too large for key long: limit 100 tokens per minute, requested")
    assert "retry-after" not in large.headers


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_charged_for_what_was_generated(server: Live, stream: bool) -> None:
    """Also if its answer was to come in one piece."""
    begun, before = time.monotonic(), int(complete(server, "left").headers["x-ratelimit-remaining-tokens"])
    body = json.dumps({"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": stream})
    with server.connect() as sock:
        sock.sendall(living.post("/v1/completions", body.encode(), "Authorization: Bearer left"))
        time.sleep(1.5)  # about 75 tokens
    wait(
        lambda: re.search(
            rb"num_requests_running\{.*\} 0\.0", server.get("/metrics", Authorization="Bearer scrape").body
        )
    )
    left = int(complete(server, "left").headers["x-ratelimit-remaining-tokens"])
    refilled = 10 * (time.monotonic() - begun) + 1
    assert left <= before + refilled - 2 * len(PROMPT) - 20
    assert left >= before - 2 * len(PROMPT) - 210


def test_parallel_requests_do_not_exceed_the_tokens_of_a_minute(server: Live) -> None:
    """Each may use 48 of 100 tokens, and uses all of them."""
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: complete(server, "pair", max_tokens=8), range(6)))
    assert sorted(reply.status for reply in replies) == [200, 200, 429, 429, 429, 429]
    assert sum(reply.json["usage"]["total_tokens"] for reply in replies if reply.status == 200) == 96


def test_embeddings_of_one_body_are_counted_at_once(server: Live) -> None:
    def embed(count: int) -> Reply:
        return server.post("/v1/embeddings", {"input": [PROMPT] * count}, Authorization="Bearer vectors")

    assert "requested 120" in embed(3).error["message"]


def test_refusals_while_loading_or_asleep_cost_no_requests() -> None:
    body = {"prompt": PROMPT, "max_tokens": 5}
    with Shell(rate_limit="rpm=2") as shell:
        loading = [shell.post("/v1/completions", body).status for _ in range(3)]
        shell.serving.client, shell.serving.asleep = cast(Any, object()), True
        asleep = [shell.post("/v1/completions", body) for _ in range(3)]
    assert loading == [503] * 3
    assert {(reply.status, reply.error["message"][:20]) for reply in asleep} == {(503, "The engine is asleep")}


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
