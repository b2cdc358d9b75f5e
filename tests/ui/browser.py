# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, controlled over the DevTools protocol on a WebSocket. Needs no driver.

Knows nothing of the page under test. Input goes the way a user's does: through the browser, at a place on the screen.
"""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
from collections.abc import AsyncGenerator
from itertools import count
from pathlib import Path
from subprocess import DEVNULL, PIPE, call
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome", "chrome-headless-shell")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"),
    *("--no-first-run", "--no-default-browser-check", "--disable-extensions", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--mute-audio", "--hide-scrollbars", "--window-size=1280,800"),
)
PATIENCE = 60  # s: a bound on what never comes, on a machine that is busy with other things
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "ArrowRight": (39, "")}


def find() -> str | None:
    """The executable: what CHROMIUM names, else the first on PATH that runs: some only say what to install."""
    if given := os.environ.get("CHROMIUM"):
        return given
    there = filter(None, map(shutil.which, NAMES))
    return next((path for path in there if not call([path, "--version"], stdout=DEVNULL, stderr=DEVNULL)), None)


class Browser:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}

    async def listen(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if answer := self._answers.pop(data.get("id", 0), None):
                if not answer.done():
                    answer.set_result(data)
            elif tab := self._tabs.get(data.get("sessionId", "")):
                tab.note(data["method"], data["params"])

    async def command(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params}
        await self._socket.send_json(message | ({"sessionId": session} if session else {}))
        reply = await asyncio.wait_for(answer, PATIENCE)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    async def profile(self) -> str:
        """A separate profile of cookies and storage, like a private window."""
        return (await self.command("Target.createBrowserContext"))["browserContextId"]

    async def forget(self, profile: str) -> None:
        """Closes its tabs too."""
        await self.command("Target.disposeBrowserContext", browserContextId=profile)

    async def tab(self, profile: str, *, window: bool = True) -> "Tab":
        """A new tab, by default in a separate window: a tab behind another counts as hidden."""
        target = await self.command(
            "Target.createTarget", url="about:blank", browserContextId=profile, newWindow=window, background=False
        )
        attached = await self.command("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab = self._tabs[attached["sessionId"]] = Tab(self, target["targetId"], attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            await tab.command(f"{domain}.enable")
        return tab


class Tab:
    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self._browser, self._target, self._session = browser, target, session
        self.complaints: list[str] = []  # errors of scripts, and what the page's policy stopped
        self.failed_loads: list[str] = []  # answers of 400 and above, which a test may want

    def note(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description", details["text"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(str([value.get("value") for value in params["args"]]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                entry = params["entry"]
                kept = self.failed_loads if entry["source"] == "network" else self.complaints
                kept.append(entry["text"])
            case _:
                pass

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        return await self._browser.command(method, self._session, **params)

    async def open(self, url: str, *, ready: str = "document.readyState === 'complete'") -> None:
        """Wait until `ready` is true in the new page; until then the old page may still be there."""
        await self.evaluate("window.before = true")
        await self.command("Page.navigate", url=url)
        await self.wait(f"!window.before && ({ready})")

    async def reload(self, *, ready: str) -> None:
        await self.evaluate("window.before = true")
        await self.command("Page.reload")
        await self.wait(f"!window.before && ({ready})")

    async def evaluate(self, script: str) -> Any:
        reply = await self.command(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in reply:
            raise RuntimeError(f"{script}: {reply['exceptionDetails'].get('exception', {}).get('description')}")
        return reply["result"].get("value")

    async def wait(self, condition: str) -> None:
        """Wait until the expression is true in the page."""
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    # While a new page replaces the old one, there is no page to ask.
                    with contextlib.suppress(RuntimeError):
                        if await self.evaluate(f"Boolean({condition})"):
                            return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            shown = await self.evaluate("document.body.innerText")
            raise AssertionError(f"never true: {condition}\nThe page:\n{shown}\n{self.complaints}") from None

    async def text(self, selector: str) -> str:
        return await self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    async def click(self, selector: str) -> None:
        """In the middle of the element, which must be there for a user to see, and on top."""
        found = f"document.querySelector({json.dumps(selector)})"
        await self.wait(f"{found} && !{found}.disabled")
        place = await self.evaluate(
            f"(() => {{ const node = {found}; node.scrollIntoView({{block: 'nearest'}});"
            "const {x, y, width, height} = node.getBoundingClientRect();"
            "const at = [x + width / 2, y + height / 2]; const top = document.elementFromPoint(...at);"
            "return width && height && node.contains(top) ? at : null; })()"
        )
        assert place, f"{selector} cannot be clicked: it is hidden, or something lies over it"
        for kind in ("mousePressed", "mouseReleased"):
            await self.command(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    async def write(self, selector: str, text: str) -> None:
        focused = f"document.activeElement === document.querySelector({json.dumps(selector)})"
        for _ in range(5):  # the layout may shift between finding the place and clicking on it
            await self.click(selector)
            if await self.evaluate(focused):
                break
        await self.command("Input.insertText", text=text)

    async def press(self, key: str, *, modifiers: int = 0) -> None:
        """Modifiers as the protocol has them: 2 is Ctrl, 8 is Shift."""
        code, text = KEYS[key]
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        await self.command("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        await self.command("Input.dispatchKeyEvent", type="keyUp", **named)

    async def show(self) -> None:
        await self.command("Page.bringToFront")

    async def close(self) -> None:
        await self._browser.command("Target.closeTarget", targetId=self._target)

    async def screenshot(self, path: Path, *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        await self.size(width, height)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.command("Emulation.setEmulatedMedia", features=scheme)
        path.write_bytes(base64.b64decode((await self.command("Page.captureScreenshot", format="png"))["data"]))

    async def size(self, width: int, height: int) -> None:
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )


@contextlib.asynccontextmanager
async def launch(executable: str) -> AsyncGenerator[Browser]:
    with TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as home:
        process = await asyncio.create_subprocess_exec(
            executable, *FLAGS, f"--user-data-dir={home}", stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE
        )
        assert process.stderr
        said = b""
        async with asyncio.timeout(PATIENCE):
            while not (found := re.search(rb"DevTools listening on (ws://\S+)", said)):
                line = await process.stderr.readline()
                assert line, f"{executable} ended: {said.decode(errors='replace')[-500:]}"
                said += line
        drain = asyncio.create_task(process.stderr.read())  # or it stops when the pipe is full
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(found[1].decode(), max_msg_size=0) as socket,
        ):
            browser = Browser(socket)
            listening = asyncio.create_task(browser.listen())
            try:
                yield browser
            finally:
                # It ends its own processes; killed, it would leave them to write into the folder.
                with contextlib.suppress(TimeoutError, RuntimeError, ConnectionError):
                    await browser.command("Browser.close")
                try:
                    await asyncio.wait_for(process.wait(), PATIENCE)
                except TimeoutError:
                    process.kill()
                    await process.wait()
                listening.cancel()
                await asyncio.gather(listening, drain, return_exceptions=True)
