# SPDX-License-Identifier: Apache-2.0
"""Chats through the page: sending, streaming, stopping, failing, editing, keys, hostile text."""

import asyncio
import json

import pytest
from aiohttp import web

from tests.ui.browser import PATIENCE, Tab
from tests.ui.conftest import Visitor
from tests.ui.fake_server import FakeServer, chunk, event, refusal, unwell

ANSWER = "document.querySelector('.assistant:last-child .body')?.innerText"
STATS = "document.querySelector('.assistant:last-child .stats')?.textContent"
ENDED = "document.querySelector('.assistant:last-child')?.ariaBusy !== 'true' && document.querySelector('#stop').hidden"
ERROR = "document.querySelector('.assistant:last-child .error')?.textContent"


async def ask(tab: Tab, text: str) -> None:
    await tab.write("#prompt", text)
    await tab.press("Enter")


async def asked(tab: Tab, text: str) -> str:
    """The whole answer."""
    before = await tab.evaluate("document.querySelectorAll('.assistant').length")
    await ask(tab, text)
    await tab.wait(f"document.querySelectorAll('.assistant').length > {before} && {ENDED}")
    return await tab.evaluate(ANSWER)


async def test_an_answer_is_shown_while_it_streams(visitor: Visitor, server: FakeServer) -> None:
    more = asyncio.Event()
    server.answers = [["The fox", " ran", more, " away."]]
    tab = await visitor.tab()
    await ask(tab, "Where is the fox?")
    await tab.wait(f"{ANSWER} === 'The fox ran'")
    assert await tab.evaluate("!document.querySelector('#stop').hidden && document.querySelector('#send').hidden")
    more.set()
    await tab.wait(ENDED)
    assert await tab.evaluate(ANSWER) == "The fox ran away."
    stats = await tab.evaluate(STATS)
    assert stats.startswith("stop · 3 tokens · ") and " tok/s · first token after " in stats
    assert stats.endswith("prompt 12, 8 cached")
    [body] = server.asked
    assert body == {
        "model": "demo",
        "messages": [{"role": "user", "content": "Where is the fox?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_a_conversation_of_several_turns(visitor: Visitor, server: FakeServer) -> None:
    tab = await visitor.tab()
    await tab.click("#panel details:nth-of-type(2) summary")
    await tab.write("#system", "Be brief.")
    await asked(tab, "One")
    await tab.write("#prompt", "Two")
    await tab.press("Enter", modifiers=8)  # Shift: a new line
    await asked(tab, "lines")
    roles = [(message["role"], message["content"]) for message in server.asked[1]["messages"]]
    system, said = ("system", "Be brief."), ("assistant", "Hello there.")
    assert roles == [system, ("user", "One"), said, ("user", "Two\nlines")]


@pytest.mark.parametrize("by", ["button", "key"])
async def test_stop_ends_the_request_and_keeps_the_partial_answer(
    visitor: Visitor, server: FakeServer, by: str
) -> None:
    server.answers = [["Once", " upon", asyncio.Event()]]
    tab = await visitor.tab()
    await ask(tab, "A story")
    await tab.wait(f"{ANSWER} === 'Once upon'")
    await (tab.click("#stop") if by == "button" else tab.press("Escape"))
    await asyncio.wait_for(server.left.wait(), PATIENCE)
    await tab.wait(ENDED)
    assert (await tab.evaluate(STATS)).startswith("stopped · about 2 tokens")
    assert await tab.evaluate(ERROR) is None
    await asked(tab, "Go on")
    assert server.asked[1]["messages"][1] == {"role": "assistant", "content": "Once upon"}


async def test_errors_are_shown_and_can_be_tried_again(visitor: Visitor, server: FakeServer) -> None:
    server.refusals = [
        refusal(400, "This model's maximum context length is 64 tokens."),
        refusal(503, "The queue is full.", **{"Retry-After": "7"}),
        web.Response(status=502, text="<b>Bad gateway</b>"),
    ]
    tab = await visitor.tab()
    assert await asked(tab, "Hello?") == ""
    assert await tab.evaluate(ERROR) == "This model's maximum context length is 64 tokens."
    for message in ("The queue is full. Retry in 7 s.", "The server returned status 502."):
        await tab.click(".assistant:last-child .actions button:last-child")
        await tab.wait(f"{ENDED} && {ERROR} === {json.dumps(message)}")
    await tab.click(".assistant:last-child .actions button:last-child")
    await tab.wait(f"{ENDED} && {ANSWER} === 'Hello there.'")
    assert await tab.evaluate(ERROR) is None
    assert [len(body["messages"]) for body in server.asked] == [1, 1, 1, 1]


async def test_a_failed_answer_is_not_sent_on(visitor: Visitor, server: FakeServer) -> None:
    server.refusals = [refusal(500, "No.")]
    tab = await visitor.tab()
    await asked(tab, "One")
    await asked(tab, "Two")
    assert server.asked[1]["messages"] == [{"role": "user", "content": "One\n\nTwo"}]


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"error": {"message": "The engine has failed.", "code": 500}}, "The engine has failed."),
        (b"data: [DO", "The connection closed before the response was complete."),
        (b"data: {nonsense\n\n", "The server sent an event that is not valid JSON."),
    ],
)
async def test_interrupted_streams(visitor: Visitor, server: FakeServer, last: bytes, message: str) -> None:
    server.answers = [[event(chunk("The fox")), last]]
    tab = await visitor.tab()
    assert await asked(tab, "A story") == "The fox"
    assert await tab.evaluate(ERROR) == message


async def test_events_may_be_split_anywhere(visitor: Visitor, server: FakeServer) -> None:
    texts = ["Füchse ", "🦊 ", "sind\n", "schlau"]
    whole = b": a comment\r\n\r\n" + b"".join(event(chunk(text)).replace(b"\n", b"\r\n") for text in texts)
    whole = whole.replace(rb"\u00fc", "ü".encode()).replace(rb"\ud83e\udd8a", "🦊".encode()) + b"data: [DONE]\r\n\r\n"
    seen = asyncio.Event()
    seen.set()  # waiting for it lets the piece before it go
    pieces = [piece for byte in whole for piece in (bytes([byte]), seen)]
    server.answers = [list(pieces)]
    tab = await visitor.tab()
    assert await asked(tab, "Foxes?") == "Füchse 🦊 sind\nschlau"
    assert await tab.evaluate(ERROR) is None


async def test_editing_and_asking_again(visitor: Visitor, server: FakeServer) -> None:
    server.answers = [["One."], ["Two."], ["Three."]]
    tab = await visitor.tab()
    assert await asked(tab, "First") == "One."
    await tab.click(".assistant:last-child .actions button:last-child")
    await tab.wait(f"{ENDED} && {ANSWER} === 'Two.'")
    await tab.click(".user .actions button:last-child")
    await tab.evaluate("document.querySelector('.edit textarea').select()")
    await tab.command("Input.insertText", text="Second")
    await tab.press("Enter")
    await tab.wait(f"{ENDED} && {ANSWER} === 'Three.'")
    assert await tab.evaluate("[...document.querySelectorAll('.user .body')].map((node) => node.innerText)") == [
        "Second"
    ]
    asked_for = [[message["content"] for message in body["messages"]] for body in server.asked]
    assert asked_for == [["First"], ["First"], ["Second"]]


MARKDOWN = """\
# Title

Some **bold** and *slanted* and `code` text, 2 * 3 * 4.
A second line.

- one
- two with `x`

3. three
4. four

```json
{"a": "**not bold**"}

```

The end"""


async def test_markdown(visitor: Visitor, server: FakeServer) -> None:
    server.answers = [[MARKDOWN[n : n + 7] for n in range(0, len(MARKDOWN), 7)]]
    tab = await visitor.tab()
    await asked(tab, "Show")
    texts = "(selector) => [...document.querySelectorAll('.assistant ' + selector)].map((node) => node.textContent)"
    found = {
        tag: await tab.evaluate(f"({texts})('{tag}')") for tag in ("strong", "em", ":not(pre) > code", "li", "pre")
    }
    assert found == {
        "strong": ["bold"],
        "em": ["slanted"],
        ":not(pre) > code": ["code", "x"],
        "li": ["one", "two with x", "three", "four"],
        "pre": ['{"a": "**not bold**"}\n'],
    }
    assert await tab.evaluate("document.querySelector('.assistant ol').start") == 3
    assert "2 * 3 * 4.\nA second line." in await tab.evaluate(ANSWER)
    # What grew piece by piece is what is drawn at once.
    grown = await tab.evaluate("document.querySelector('.assistant .body').innerHTML")
    await tab.reload(ready="document.querySelector('.assistant .body')")
    assert await tab.evaluate("document.querySelector('.assistant .body').innerHTML") == grown


HOSTILE = (
    "<img src=x onerror='window.pwned=1'> <script>window.pwned=1</script> [a](javascript:window.pwned=1) "
    "![b](https://example.org/x.png) **<svg onload=window.pwned=1>** `<b>x</b>` \x1b[31m </div></article>"
)


async def test_untrusted_text_is_never_markup(visitor: Visitor, server: FakeServer) -> None:
    server.models = ("<img src=x onerror=window.pwned=1>",)
    server.answers = [[HOSTILE, "\n\n```<img src=x>\n", HOSTILE, "\n```"], [{"error": {"message": HOSTILE}}]]
    tab = await visitor.tab()
    await asked(tab, HOSTILE.replace("\x1b", ""))
    await asked(tab, "again")
    assert await tab.evaluate(ERROR) == HOSTILE
    assert await tab.text(".assistant pre") == HOSTILE
    assert "<img src=x onerror='window.pwned=1'> <script>" in await tab.evaluate(
        "document.querySelector('.assistant .body').innerText"
    )
    await tab.reload(ready="document.querySelector('.assistant pre')")
    for selector in ("#messages", "#history", "#model", "#panel"):
        assert (
            await tab.evaluate(f"document.querySelector('{selector}').querySelector('img, script, a, b svg, object')")
            is None
        )
    assert await tab.evaluate("document.querySelectorAll('svg, img').length") == 2  # ours
    assert await tab.evaluate("window.pwned") is None


async def test_the_content_security_policy_stops_injected_scripts(visitor: Visitor, server: FakeServer) -> None:
    """Even if injected markup got into the page, it could neither run scripts nor contact other hosts."""
    tab = await visitor.tab()
    await tab.evaluate("window.stopped = []; addEventListener('securitypolicyviolation', (e) => "
                       "stopped.push(e.effectiveDirective))")  # fmt: skip
    attempts = {
        "document.body.innerHTML = '<img>'": "require-trusted-types-for",
        "document.createElement('script').src = '/static/app.js'": "require-trusted-types-for",
        "window.setTimeout('window.pwned = 1')": "require-trusted-types-for",
        "fetch('http://localhost:1/').catch(() => {})": "connect-src",
        "Object.assign(new Image(), {src: 'http://localhost:1/x.png'})": "img-src",
        "document.body.setAttribute('style', 'color: red')": "style-src-attr",
        "document.head.append(Object.assign(document.createElement('base'), {href: '//localhost:1'}))": "base-uri",
    }
    for attempt, directive in attempts.items():
        await tab.evaluate(f"(() => {{ try {{ {attempt} }} catch {{}} }})()")
        await tab.wait(f"window.stopped.includes('{directive}')")
        await tab.evaluate("window.stopped.length = 0")
    assert await tab.evaluate("window.pwned") is None
    tab.complaints.clear()  # they are what this test is for


async def test_a_key_is_asked_for_and_kept_in_the_tab(visitor: Visitor, server: FakeServer) -> None:
    server.key = "schlüssel"
    tab = await visitor.tab(ready="document.querySelector('#key-dialog').open")
    assert await tab.evaluate("document.activeElement.id") == "key-input"
    await tab.write("#key-input", "wrong")
    await tab.press("Enter")
    await tab.wait("document.querySelector('#key-dialog').open && !document.querySelector('#key-input').value")
    server.key = "sesame"
    await tab.write("#key-input", "sesame")
    await tab.press("Enter")
    await tab.wait("document.querySelector('#model').value === 'demo'")
    await tab.wait("document.querySelector('#engine-note').textContent === 'live'")
    assert await asked(tab, "Hello") == "Hello there."
    await tab.reload(ready="document.querySelector('#model').value === 'demo'")
    assert "sesame" not in await tab.evaluate("JSON.stringify({...localStorage})")
    # The key is changed on the server: the next message asks for the new one, and is then sent.
    server.key = "other"
    await ask(tab, "Still there?")
    await tab.wait("document.querySelector('#key-dialog').open")
    await tab.write("#key-input", "other")
    await tab.press("Enter")
    await tab.wait(f"{ENDED} && {ANSWER} === 'Hello there.' && document.querySelectorAll('.assistant').length === 2")
    # Another tab has to be notified.
    another = await visitor.tab(ready="document.querySelector('#key-dialog').open")
    await another.click("#key-cancel")
    await another.wait("!document.querySelector('#notice').hidden")
    assert await another.text("#notice-text") == "An API key is needed."


async def test_waiting_for_the_model(visitor: Visitor, server: FakeServer) -> None:
    server.health = unwell("starting", "compiling 7/18", done=7, total=18)
    tab = await visitor.tab(ready="!document.querySelector('#loading').hidden")
    await tab.wait("document.querySelector('#loading').innerText.includes('compiling 7/18')")
    assert (
        await tab.evaluate("document.querySelector('#loading-bar').value / document.querySelector('#loading-bar').max")
        == 7 / 18
    )
    await tab.write("#prompt", "Early")
    await tab.press("Enter")
    assert await tab.evaluate("document.querySelector('#send').disabled") is True
    assert server.looks == 0
    server.health = None
    await tab.wait("document.querySelector('#loading').hidden && document.querySelector('#model').value")
    await tab.click("#send")
    await tab.wait(f"{ENDED} && {ANSWER} === 'Hello there.'")
    server.health = unwell("draining", "2 requests in flight")
    await tab.wait("document.querySelector('#loading').innerText.includes('shutting down')")
    assert await tab.text("#state") == "Shutting down"
    server.health = web.Response(status=502, text="<html>")
    await tab.wait("document.querySelector('#state').textContent === 'Not ready'")
    server.health = web.json_response({"status": "asleep"})
    await tab.wait("document.querySelector('#state').textContent === 'Asleep'")
    assert await tab.evaluate("document.querySelector('#send').disabled") is True
