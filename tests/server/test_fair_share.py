# SPDX-License-Identifier: Apache-2.0
"""Keys take turns in the queue of a real engine: one with many waiting requests does not delay another's first. A
request that would wait too long for its deadline is refused at once."""

import re
import threading
import time
from collections import Counter
from pathlib import Path

from tests.server import live as living
from tests.server.live import Reply, wait

QUEUED, FLOOD = 20, 30


def test_a_flood_of_one_key_does_not_delay_another(model: Path) -> None:
    engine = {"max_num_seqs": 1, "max_num_queued_reqs": QUEUED}
    body = {"prompt": "the", "max_tokens": 4, "ignore_eos": True}
    ends: list[tuple[float, str, Reply]] = []
    settings = {"api_key": ["flooding", "patient"]}
    with living.live(model, engine=engine, server=settings, slow=0.02) as server:

        def ask(key: str) -> Reply:
            reply = server.post("/v1/completions", body, Authorization=f"Bearer {key}")
            ends.append((time.monotonic(), key, reply))
            return reply

        def waiting() -> float:
            text = server.get("/metrics", Authorization="Bearer patient").body.decode()
            [line] = [line for line in text.splitlines() if line.startswith("jaxserve:num_requests_waiting{")]
            return float(line.rpartition(" ")[2])

        assert ask("patient").status == 200  # compiles
        ends.clear()
        threads = [threading.Thread(target=ask, args=("flooding",)) for _ in range(FLOOD)]
        for thread in threads:
            thread.start()
        wait(lambda: waiting() > QUEUED - 6 and any(reply.status == 503 for _, _, reply in ends), 30)
        hurried = server.post("/v1/completions", body, Authorization="Bearer flooding", X_Request_Timeout="0.3")
        assert hurried.status == 503 and "in the queue" in hurried.error["message"]
        told = float(re.findall(r"at least ([\d.]+) s", hurried.error["message"])[0])
        assert told > 0.3 and 1 <= int(hurried.headers["retry-after"]) <= min(told + 1, 60)
        begun = time.monotonic()
        assert ask("patient").status == 200  # though the queue is nearly full, or full
        for thread in threads:
            thread.join()
    statuses = Counter(reply.status for _, key, reply in ends if key == "flooding")
    assert statuses[503] > 0 and statuses[200] + statuses[503] == FLOOD
    [end] = [moment for moment, key, _ in ends if key == "patient"]
    meanwhile = [key for moment, key, reply in ends if begun < moment < end and reply.status == 200]
    assert len(meanwhile) <= 4, "it waited for those in its row and next in turn, and little more"
