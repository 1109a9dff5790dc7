"""The page on the real engine: a tiny random LVLM always, the miniature where it can be loaded."""

from pathlib import Path
from typing import Any

import pytest
from absent import absent
from page_browser import browser, opened, start, states, texts, wait_for_end
from test_page_public import outcome
from tiny import random_artifacts, tiny_llava

from safety.artifacts import load_artifacts, save_artifacts
from safety.engine import Engine
from safety.loading import load
from safety.mini.base import BaseModelError, base_folder
from safety.ui.browser import served
from safety.ui.handlers import Handlers, spec_of
from safety.ui.host import Choice, Host
from safety.ui.page import build_page

pytestmark = pytest.mark.browser
__all__ = ["browser"]  # a fixture


@pytest.fixture(scope="module")
def miniature() -> Engine:
    try:
        base_folder()
    except BaseModelError as error:
        absent(f"the miniature's language model is neither cached nor reachable: {error}")
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


def test_bad_settings_and_tampered_artifacts_get_a_sentence_and_the_next_run_works(tmp_path: Path) -> None:
    lvlm = tiny_llava()
    save_artifacts(random_artifacts(lvlm), lvlm, tmp_path)
    host = Host(Engine(lvlm, load_artifacts(lvlm, tmp_path)), load=lambda choice, progress: Engine(
        lvlm, load_artifacts(lvlm, choice.artifacts)))
    handlers, form = Handlers(host), spec_of(host)["start"] | {"max_new_tokens": 6}

    for defense, key, value, says in (
        ("sasa", "threshold", float("nan"), "hreshold"), ("sasa", "threshold", 2.0, "hreshold"),
        ("sasa", "strength", float("inf"), "trength"), ("revision", "alpha", float("nan"), "alpha"),
        ("revision", "layer", 99, "99"), ("revision", "fraction", -1.0, "share of heads"),
        ("sapt", "interval", 0, "nterval"), ("sapt", "interval", "soon", "number"),
        ("sapt", "detector", "other", "other"),
    ):
        lane = {**form["lanes"][0], defense: {**form["lanes"][0][defense], key: value}}
        view, message = outcome(handlers, "What?", form=form | {"lanes": [lane]})
        assert view is None and says in message and "went wrong" not in message, (defense, key, value, message)
    path = tmp_path / "revision.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    host.start(Choice("tiny", artifacts=str(tmp_path))).join(30)
    assert "revision.safetensors" in host.status()["message"] and "still loaded" in host.status()["message"]
    view, message = outcome(handlers, "What?", form=form)
    assert not message and view is not None
    assert all(lane["state"] in ("done", "limit", "refused") for lane in view["lanes"])
