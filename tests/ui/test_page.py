# SPDX-License-Identifier: Apache-2.0
"""The rest of the page: state of tabs, sampling, the engine's picture, completions, keyboard, narrow screens."""

import asyncio
from typing import Any

from tests.ui.browser import PATIENCE, Tab
from tests.ui.conftest import READY, Visitor
from tests.ui.fake_server import METRICS, FakeServer
from tests.ui.test_chat import ANSWER, ENDED, asked

SAID = "[...document.querySelectorAll('.user .body')].map((node) => node.innerText).join()"
READY_TO_SEND = f"{READY} && document.querySelector('#model').value"


async def titles(tab: Tab) -> list[str]:
    return await tab.evaluate("[...document.querySelectorAll('#history .open')].map((node) => node.textContent)")


async def test_tabs_are_independent(visitor: Visitor, server: FakeServer) -> None:
    one, two = await visitor.tab(), await visitor.tab()
    await asked(one, "alpha")
    await asked(two, "beta")
    await asked(one, "gamma")
    for tab, said in ((one, "alpha,gamma"), (two, "beta"), (one, "alpha,gamma")):
        await tab.reload(ready=READY_TO_SEND)
        assert await tab.evaluate(SAID) == said
    assert [len(body["messages"]) for body in server.asked] == [1, 1, 3]
    await two.wait("document.querySelectorAll('#history .open').length === 2")
    # What another tab shows is copied, and each goes on with its own.
    await two.click("#panel details:nth-of-type(3) summary")
    await two.click("#history li:has(button[aria-current=false]) .open")
    await two.wait(f"{SAID} === 'alpha,gamma'")
    await asked(two, "delta")
    await one.reload(ready=READY_TO_SEND)
    assert await one.evaluate(SAID) == "alpha,gamma"
    assert await two.evaluate(SAID) == "alpha,gamma,delta"
    assert await titles(one) == ["alpha", "alpha", "beta"]


async def test_a_new_tab_opens_the_last_conversation_that_no_tab_shows(visitor: Visitor) -> None:
    first = await visitor.tab()
    await asked(first, "alpha")
    second = await visitor.tab()
    assert await second.evaluate(SAID) == ""
    await second.close()
    await first.close()
    third = await visitor.tab()
    await third.wait(f"{SAID} === 'alpha'")
    await third.click("#new")
    await third.wait(f"{SAID} === ''")
    await asked(third, "beta")
    assert await titles(third) == ["beta", "alpha"]


async def test_clearing_deleting_and_undo(visitor: Visitor) -> None:
    tab = await visitor.tab()
    await asked(tab, "alpha")
    await tab.click("#panel details:nth-of-type(3) summary")
    await tab.click("#clear")
    await tab.wait(f"{SAID} === '' && !document.querySelector('#empty').hidden")
    assert "alpha" not in await tab.evaluate("JSON.stringify({...localStorage})")
    await tab.click("#notice-act")
    await tab.wait(f"{SAID} === 'alpha'")
    await tab.click("#new")
    await tab.wait(f"{SAID} === ''")
    await tab.click("#history li button:last-child")
    await tab.wait("!document.querySelector('#history .open')")
    assert "alpha" not in await tab.evaluate("JSON.stringify({...localStorage})")


async def test_clearing_while_an_answer_streams_clears(visitor: Visitor, server: FakeServer) -> None:
    server.answers = [["Once", asyncio.Event()]]
    tab = await visitor.tab()
    await tab.click("#panel details:nth-of-type(3) summary")
    await tab.write("#prompt", "alpha")
    await tab.press("Enter")
    await tab.wait(f"{ANSWER} === 'Once'")
    await tab.click("#clear")
    await tab.wait(f"{SAID} === '' && {ENDED}")
    assert "alpha" not in await tab.evaluate("JSON.stringify({...localStorage})")
    await asked(tab, "beta")
    assert [message["content"] for message in server.asked[1]["messages"]] == ["beta"]


async def test_an_answer_under_way_survives_a_reload(visitor: Visitor, server: FakeServer) -> None:
    server.answers = [["Once", asyncio.Event()]]
    tab = await visitor.tab()
    await tab.write("#prompt", "alpha")
    await tab.press("Enter")
    await tab.wait(f"{ANSWER} === 'Once'")
    await tab.reload(ready=READY_TO_SEND)
    assert await tab.evaluate(SAID) == "alpha"
    assert await tab.evaluate(ANSWER) == "Once"


async def test_sampling_is_sent_and_kept(visitor: Visitor, server: FakeServer) -> None:
    server.models = ("demo", "other")
    tab = await visitor.tab()
    values = {"temperature": "0.7", "top_p": "0.9", "top_k": "40", "max_tokens": "16", "seed": "5"}
    for name, value in values.items():
        await tab.write(f"[name={name}]", value)
    await tab.write("[name=stop]", "END\n\\n\\n\n")
    await tab.evaluate("model.value = 'other'; model.dispatchEvent(new Event('change'))")
    await tab.reload(ready=READY_TO_SEND)
    await asked(tab, "Hello")
    [body] = server.asked
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 16, "seed": 5, "stop": ["END", "\n\n"]}
    assert wanted.items() <= body.items()
    assert body["model"] == "other"
    await tab.click("[name=top_p]")
    await tab.evaluate("document.activeElement.select()")
    await tab.command("Input.insertText", text="7")
    await tab.wait("!document.querySelector('#sampling-error').hidden")
    assert (await tab.text("#sampling-error")).startswith("Top p: ")
    await tab.write("#prompt", "Hello")
    assert await tab.evaluate("document.querySelector('#send').disabled") is True
    await tab.click("#sampling [type=reset]")
    await tab.wait("!document.querySelector('#send').disabled")
    await tab.click("#send")
    await tab.wait(f"document.querySelectorAll('.assistant').length === 2 && {ENDED}")
    assert not wanted.keys() & server.asked[1].keys()


def page_numbers() -> str:
    ids = ("running", "waiting", "hits", "kv-used", "kv-cached", "kv-free")
    return f"{list(ids)}.map((id) => document.getElementById(id).textContent).join()"


async def test_the_picture_of_the_engine(visitor: Visitor, server: FakeServer) -> None:
    tab = await visitor.tab()
    for prefix in ("jaxserve", "vllm"):
        server.metrics = METRICS.replace("jaxserve:", f"{prefix}:").replace("3.0", "5.0" if prefix == "vllm" else "3.0")
        running = 5 if prefix == "vllm" else 3
        await tab.wait(f"{page_numbers()} === '{running},2,75 %,100,200,700'")
        counts = await tab.evaluate("['run', 'wait'].map((kind) => document.querySelectorAll('#rows .' + kind).length)")
        assert counts == [running, 2]
    cells: Any = await tab.evaluate(
        "['used', 'cached', 'free'].map((state) => document.querySelectorAll('#kv-grid .' + state).length)"
    )
    assert sum(cells) == 144 and cells == [14, 28, 102]
    assert await tab.evaluate("document.querySelector('#kv-grid').ariaLabel") == "100 used, 200 cached, 700 free"
    # 50 tokens more at each look, about one a second: it depends on how busy the machine is.
    await tab.wait("Number(document.querySelector('#rate').textContent) > 0")
    await tab.wait("document.querySelector('#spark .line').getAttribute('d').startsWith('M')")
    server.metrics = "".join(
        line for line in METRICS.replace("700", "0").splitlines(keepends=True) if "cached" not in line
    ).replace("100.0", "1.0")
    await tab.wait("document.querySelectorAll('#kv-grid i').length === 1")


async def test_a_hidden_tab_sends_no_requests(visitor: Visitor, server: FakeServer) -> None:
    tab = await visitor.tab()
    await tab.wait("document.querySelector('#engine-note').textContent === 'live'")
    front = await visitor.tab(window=False)
    await front.show()
    await tab.wait("document.hidden")
    await front.open("about:blank")  # else it looks too
    looks = server.looks
    await asyncio.sleep(2.5)
    assert server.looks <= looks + 1  # one may have been under way
    await front.close()
    await tab.wait("!document.hidden")
    while server.looks < looks + 2:
        await asyncio.sleep(0.05)


async def test_a_server_that_goes_away_and_comes_back(visitor: Visitor, server: FakeServer) -> None:
    tab = await visitor.tab()
    await tab.command("Network.enable")
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    await tab.command("Network.emulateNetworkConditions", offline=True, **offline)
    await tab.wait("document.querySelector('#state').textContent === 'Offline'")
    assert await tab.text("#loading-title") == "Cannot reach the server."
    await tab.command("Network.emulateNetworkConditions", offline=False, **offline)
    await tab.wait("document.querySelector('#state').textContent === 'Ready'")
    assert await asked(tab, "Back?") == "Hello there."


async def test_completion(visitor: Visitor, server: FakeServer) -> None:
    server.answers = [["<b>Upon", " a time"], [" there", asyncio.Event()], [{"error": {"message": "Broken."}}]]
    tab = await visitor.tab()
    await tab.click("#tab-chat")
    await tab.press("ArrowRight")
    assert await tab.evaluate("document.activeElement.id") == "tab-text"
    value = "document.querySelector('#text-prompt').value"
    ended = "document.querySelector('#text-stop').hidden"
    await tab.write("#text-prompt", "Once ")
    await tab.press("Enter", modifiers=2)
    await tab.wait(f"{ended} && {value} === 'Once <b>Upon a time'")
    assert (await tab.text("#text-stats")).startswith("stop · 2 tokens")
    assert server.asked[0]["prompt"] == "Once " and "messages" not in server.asked[0]
    await tab.click("#text-run")
    await tab.wait(f"{value}.endsWith('time there')")
    await tab.click("#text-stop")
    await asyncio.wait_for(server.left.wait(), PATIENCE)
    await tab.wait(ended)
    await tab.click("#text-undo")
    await tab.wait(f"{value} === 'Once <b>Upon a time'")
    await tab.click("#text-run")
    await tab.wait(f"{ended} && document.querySelector('#text-error').innerText === 'Broken.'")


async def test_every_control_has_a_name_and_is_reachable_by_keyboard(visitor: Visitor) -> None:
    tab = await visitor.tab()
    await asked(tab, "Hello")
    tree = (await tab.command("Accessibility.getFullAXTree"))["nodes"]
    kinds = {"button", "textbox", "combobox", "spinbutton", "tab", "img", "log"}
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node["ignored"] and node["role"]["value"] in kinds and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    await tab.click("#prompt")
    reached: set[str] = set()
    for _ in range(40):
        await tab.press("Tab")
        reached.add(await tab.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"tab-chat", "model", "new", "key", "log", "Copy", "Regenerate", "Edit", "Conversations"} <= reached
    await tab.wait("document.querySelector('#announce').textContent.startsWith('Response complete')")


async def test_narrow_screens(visitor: Visitor, server: FakeServer) -> None:
    server.answers = [["word" * 200, "\n\n```\n" + "x" * 500 + "\n```"]]
    tab = await visitor.tab()
    await tab.size(360, 640)
    await asked(tab, "Hello" * 60)
    fits = "document.documentElement.scrollWidth <= 360 && document.querySelector('#log').scrollWidth <= 360"
    await tab.wait(fits)
    await tab.click("#panel-toggle")
    await tab.wait("document.querySelector('#kv-grid').getBoundingClientRect().width > 200")
    await tab.wait(fits)
    await tab.click("#panel-toggle")
    await tab.write("#prompt", "visible again")
