# SPDX-License-Identifier: Apache-2.0
"""The page with the real server: the two agree on the API."""

import asyncio
import json
from collections.abc import Generator

import pytest

from tests.server import live as living
from tests.server.live import Live
from tests.ui.browser import Browser
from tests.ui.conftest import Visitor
from tests.ui.test_chat import ANSWER, ENDED, STATS

KEY = "an open secret"


@pytest.fixture(scope="module")
def real(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Generator[Live]:
    """A slow server whose texts never end. Requires the browser, so that it does not start without one."""
    assert browser
    model = living.write_model(tmp_path_factory.mktemp("ui") / "tiny")
    for name, end in ("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token"):
        own = model / name
        own.write_text(json.dumps(json.loads(own.read_text()) | {end: None}))
    with living.started(model, server={"api_key": [KEY]}, slow=0.05) as server:
        server.wait_listening()
        yield server


async def test_the_real_server(browser: Browser, real: Live) -> None:
    """From the start, with a key, to a stopped stream whose blocks are then free."""
    profile = await browser.profile()
    visitor = Visitor(browser, profile, f"http://127.0.0.1:{real.port}/")
    tab = await visitor.tab(ready="document.querySelector('#state').dataset.kind !== 'connecting'")
    await asyncio.to_thread(real.wait_ready)
    await tab.wait("document.querySelector('#key-dialog').open")
    await tab.write("#key-input", KEY)
    await tab.press("Enter")
    await tab.wait("document.querySelector('#model').value === 'tiny'")
    assert await tab.text("#context") == "Context length: 256 tokens"
    await tab.write("[name=max_tokens]", "3")
    await tab.write("#prompt", "Hello")
    await tab.press("Enter")
    await tab.wait(f"{ENDED} && {STATS}?.startsWith('length (token limit) · 3 tokens')")
    await tab.click("#sampling [type=reset]")
    await tab.write("#prompt", "A long story")
    await tab.press("Enter")
    await tab.wait(f"{ANSWER}?.length > 0 && document.querySelectorAll('.assistant').length === 2")
    await tab.wait("document.querySelector('#running').textContent === '1'")
    assert await tab.evaluate("Number(document.querySelector('#kv-used').textContent)") > 0
    await tab.click("#stop")
    await tab.wait(f"{ENDED} && {STATS}.startsWith('stopped')")
    await tab.wait("document.querySelector('#running').textContent === '0'")
    await tab.wait("document.querySelector('#kv-used').textContent === '0'")
    total = "document.querySelector('#kv-total').textContent"
    assert await tab.evaluate(f"{total}.startsWith('128 · 0 % used')")
    await tab.write("[name=max_tokens]", "1000")
    await tab.click("#tab-text")
    await tab.write("#text-prompt", "Once")
    await tab.click("#text-run")
    await tab.wait("document.querySelector('#text-error').innerText.includes('maximum context length is 256')")
    real.process.terminate()
    await tab.wait("document.querySelector('#state').dataset.kind === 'unreachable'")
    await asyncio.to_thread(real.wait_exit)
    await browser.forget(profile)
    assert visitor.complaints() == []
