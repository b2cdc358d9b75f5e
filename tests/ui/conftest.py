# SPDX-License-Identifier: Apache-2.0
"""One browser for all tests of the page; a profile and a fake server for each. Tests here may be coroutines."""

import asyncio
import inspect
from collections.abc import Generator
from typing import Any

import pytest

from tests.ui.browser import Browser, Tab, find, launch
from tests.ui.fake_server import FakeServer, serving

READY = "document.body?.dataset.ready !== undefined"
RUNNER = pytest.StashKey[asyncio.Runner]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a coroutine in the loop that the browser's connection lives in."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    values: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names}
    pyfuncitem.session.stash[RUNNER].run(pyfuncitem.obj(**values))
    return True


@pytest.fixture(scope="session")
def runner(request: pytest.FixtureRequest) -> Generator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        request.session.stash[RUNNER] = runner
        yield runner


@pytest.fixture(scope="session")
def browser(runner: asyncio.Runner) -> Generator[Browser]:
    executable = find()
    if not executable:
        pytest.skip("no Chromium: install one, or let CHROMIUM name it")
    opened = launch(executable)
    yield runner.run(opened.__aenter__())
    runner.run(opened.__aexit__(None, None, None))


@pytest.fixture
def server(runner: asyncio.Runner) -> Generator[FakeServer]:
    opened = serving()
    yield runner.run(opened.__aenter__())
    runner.run(opened.__aexit__(None, None, None))


class Visitor:
    """A user with a separate browser profile. Errors that a page logs fail the test at the end."""

    def __init__(self, browser: Browser, profile: str, url: str) -> None:
        self._browser, self._profile, self._url = browser, profile, url
        self._tabs: list[Tab] = []

    async def tab(self, *, window: bool = True, ready: str = "document.querySelector('#model').value") -> Tab:
        """The page, in a tab that is ready to send."""
        tab = await self._browser.tab(self._profile, window=window)
        self._tabs.append(tab)
        await tab.open(self._url, ready=f"{READY} && ({ready})")
        return tab

    def complaints(self) -> list[str]:
        return [complaint for tab in self._tabs for complaint in tab.complaints]


@pytest.fixture
def visitor(runner: asyncio.Runner, browser: Browser, server: FakeServer) -> Generator[Visitor]:
    profile = runner.run(browser.profile())
    visitor = Visitor(browser, profile, server.url)
    yield visitor
    runner.run(browser.forget(profile))
    assert visitor.complaints() == []
