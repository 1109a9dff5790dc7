"""The page on the real engine: a tiny random LVLM always, the miniature where it can be loaded."""

from typing import Any

import pytest
from page_browser import browser, opened, start, states, texts, wait_for_end
from tiny import random_artifacts, tiny_llava

from safety.artifacts import load_artifacts
from safety.engine import Engine
from safety.loading import load
from safety.mini.base import BaseModelError, base_folder
from safety.ui.browser import served
from safety.ui.page import build_page

pytestmark = pytest.mark.browser
__all__ = ["browser"]  # a fixture


@pytest.fixture(scope="module")
def miniature() -> Engine:
    try:
        base_folder()
    except BaseModelError as error:
        pytest.skip(f"the miniature's language model is neither cached nor reachable: {error}")
    lvlm = load("miniature")
    return Engine(lvlm, load_artifacts(lvlm))


def answer_in(page: Any, tokens: int) -> None:
    """Limit the answers' length with the page's own control."""
    page.click(".sampling summary")
    page.fill(".sampling .number >> nth=0", str(tokens))


def test_every_column_of_a_random_model_streams(browser: Any) -> None:
    lvlm = tiny_llava()
    with served(build_page(Engine(lvlm, random_artifacts(lvlm)))) as address, opened(browser, address) as page:
        page.click("[data-layout=each]")
        answer_in(page, 16)
        start(page, ".card-run >> nth=0")
        wait_for_end(page, 90_000)
        assert len(states(page)) == 5 and set(states(page)) <= {"done", "limit", "refused"}
        assert all(texts(page))
        assert page.locator("svg.trace .line").count() == 5 and page.locator("svg.trace .check").count() >= 1
        assert not page.is_visible(".notice")


@pytest.mark.miniature
def test_the_miniature_answers_on_the_page(browser: Any, miniature: Engine) -> None:
    with served(build_page(miniature)) as address, opened(browser, address) as page:
        answer_in(page, 24)
        start(page, ".card-run >> nth=0")
        page.wait_for_function("document.querySelectorAll('.lane .token').length > 2", timeout=60_000)
        early = texts(page)
        wait_for_end(page, 120_000)
        assert len(states(page)) == 2 and set(states(page)) <= {"done", "limit", "refused"}
        assert all(len(late) >= len(soon) and late for late, soon in zip(texts(page), early, strict=True))
        assert "tokens/s" in page.locator(".speed").first.inner_text()
