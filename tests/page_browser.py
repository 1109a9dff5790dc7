"""What the browser tests share: one browser per module, tabs that fail on console errors, and the page's gestures."""

from collections.abc import Iterator
from typing import Any

import pytest
from absent import absent

from safety.errors import UserError
from safety.ui.browser import chromium

LAPTOP = {"width": 1366, "height": 768}
ENDED = """() => [...document.querySelectorAll('.lane')].every(
    lane => ['done', 'limit', 'refused', 'stopped', 'error'].includes(lane.dataset.state))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        with chromium() as browser:
            yield browser
    except UserError as error:
        absent(str(error))


class opened:
    """A fresh tab on the page; fails on console errors and on requests to anywhere else."""

    def __init__(self, browser: Any, address: str, **view: Any):
        self.page, self.address, self.problems = browser.new_page(**({"viewport": LAPTOP} | view)), address, []

    def __enter__(self) -> Any:
        self.page.set_default_timeout(90_000)  # a busy machine may take half a minute to open the page
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)
        self.page.on(
            "request", lambda request: self.problems.append(request.url) if self.foreign(request.url) else None
        )
        self.page.goto(self.address)
        self.page.wait_for_selector(".lane")
        return self.page

    def foreign(self, url: str) -> bool:
        return not url.startswith((self.address.partition("#")[0], "data:", "blob:", "about:"))

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.page.close()
        if kind is None:
            assert not self.problems, self.problems


def start(page: Any, button: str = "#run") -> None:
    """Press a button that starts a run, and wait until the board shows that run."""
    before = page.get_attribute(".lanes", "data-run")
    page.click(button)
    page.wait_for_function("before => document.querySelector('.lanes').dataset.run !== before", arg=before)


def ask(page: Any, words: str) -> None:
    page.fill("#prompt textarea", words)
    start(page)


def wait_for_end(page: Any, timeout: float = 60_000) -> None:
    """Wait until every lane has ended; timeout in milliseconds."""
    page.wait_for_function(ENDED, timeout=timeout)


def texts(page: Any) -> list[str]:
    return page.eval_on_selector_all(".lane .body", "bodies => bodies.map(body => body.textContent)")


def states(page: Any) -> list[str]:
    return page.eval_on_selector_all(".lane", "lanes => lanes.map(lane => lane.dataset.state)")
