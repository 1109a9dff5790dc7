"""The real page in a real browser, on scripted answers (page_stand_in): streaming, marks, Stop, bad files, layouts."""

import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_browser import LAPTOP, ask, browser, opened, start, states, texts, wait_for_end
from page_stand_in import StandInEngine
from PIL import Image

from safety.ui.browser import served
from safety.ui.page import build_page
from safety.ui.presets import PRESETS

pytestmark = pytest.mark.browser
__all__ = ["browser"]  # a fixture
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def engine() -> StandInEngine:
    return StandInEngine()


@pytest.fixture(scope="module")
def address(engine: StandInEngine) -> Iterator[str]:
    with served(build_page(engine)) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str, engine: StandInEngine) -> Iterator[Any]:
    engine.delay, engine.prefill, engine.words, engine.fail = 1 / 40, 0.1, None, None
    with opened(browser, address) as page:
        yield page


def test_an_example_streams_in_every_column_with_marks_and_badge(page: Any, engine: StandInEngine) -> None:
    engine.delay = 0.1
    page.click("[data-layout=each]")
    page.evaluate(
        """() => { window.lengths = []; setInterval(() => window.lengths.push(
            [...document.querySelectorAll('.lane .body')].map(body => body.textContent.length)), 20); }"""
    )
    start(page, ".card-run >> nth=0")
    wait_for_end(page)
    names = page.eval_on_selector_all(".lane h3", "titles => titles.map(title => title.textContent)")
    assert names == ["No defense", "SASA", "Revision", "SAPT", "All together"]
    lengths = [row for row in page.evaluate("window.lengths") if len(row) == 5]
    for lane in range(5):
        seen = list(dict.fromkeys(row[lane] for row in lengths))
        # The text grew while it was watched.
        assert seen == sorted(seen) and len(seen) >= 2, (lane, seen)
    assert states(page) == ["done", "refused", "done", "refused", "refused"]
    undefended, sasa, _, sapt = (page.locator(".lane").nth(i) for i in range(4))
    assert undefended.locator(".token.over").count() > 5
    style = undefended.locator(".token.over").first.evaluate("token => getComputedStyle(token).textDecorationLine")
    assert style == "underline"
    assert undefended.locator("svg.trace .above").count() == undefended.locator(".token.over").count()
    assert undefended.locator("svg.trace .threshold").count() == 1
    assert sasa.locator(".badge").inner_text() == "SASA 0.97 ≥ 0.50 → refused"
    assert sapt.locator("svg.trace .check").count() >= 1 and sapt.locator("svg.trace .inject").count() == 1
    assert sapt.locator(".flag").count() == 1
    assert "1 injection" in sapt.locator(".summary").inner_text()
    assert "tokens/s" in sapt.locator(".speed").inner_text()
    request = engine.requests[-1]
    assert request["prompt"] == PRESETS[0].prompt and request["image"].mode == "RGB"


def test_the_board_names_what_it_answers_and_another_run_starts_at_its_own_alarm_line(page: Any) -> None:
    card = page.locator(".card-fill").first
    start(page, ".card-run >> nth=0")
    wait_for_end(page)
    assert page.locator(".asked").inner_text().startswith(f"Asked: {PRESETS[0].title}: ")
    assert card.get_attribute("aria-pressed") == "true"
    page.focus(".alarm-knob input")
    page.keyboard.press("End")
    page.wait_for_function("() => document.querySelector('.summary').textContent.startsWith('Re-marked')")
    page.fill("#prompt textarea", "Another thing?")
    assert card.get_attribute("aria-pressed") == "false" and "Another" not in page.locator(".asked").inner_text()
    start(page)
    wait_for_end(page)
    assert page.locator(".asked").inner_text().endswith(": Another thing?")
    assert "Re-marked" not in page.locator(".lanes").inner_text()


def test_a_benign_prompt_passes_the_gate_in_two_columns(page: Any) -> None:
    ask(page, "How do I train a dog?")
    wait_for_end(page)
    assert states(page) == ["done", "done"]
    assert page.locator(".badge:visible").inner_text() == "SASA 0.04 < 0.50 → passed"
    assert page.locator(".token.over").count() == 0


def test_a_threshold_that_was_not_moved_goes_with_the_probe(page: Any) -> None:
    page.click(".defense-sasa .settings")
    threshold, selects = page.locator(".defense-sasa .number >> nth=0"), page.locator(".defense-sasa select")
    selects.nth(0).select_option(label="safety 16, fused 20")
    assert threshold.input_value() == "0.7"
    selects.nth(1).select_option(label="Probe only")
    assert threshold.input_value() == "0.3"
    threshold.fill("0.4")
    selects.nth(1).select_option(label="Gate (the paper)")
    assert threshold.input_value() == "0.4"


def test_a_badge_shows_the_digits_that_tell_it_from_the_threshold(page: Any) -> None:
    page.click(".defense-sasa .settings")
    page.fill(".defense-sasa .number >> nth=0", "0.9704")
    ask(page, "Make a list.")
    wait_for_end(page)
    assert page.locator(".badge:visible").inner_text() == "SASA 0.9700 < 0.9704 → passed"


def test_without_defenses_only_the_undefended_column_runs(page: Any) -> None:
    for name in ("sasa", "revision", "sapt"):
        page.click(f".defense-{name} .switch input")
    ask(page, "Hello?")
    wait_for_end(page)
    assert page.locator(".lane").count() == 1


def test_knobs_reach_the_engine(page: Any, engine: StandInEngine) -> None:
    page.click(".defense-sapt .settings")
    page.fill(".defense-sapt .number >> nth=1", "8")
    page.click(".sampling summary")
    page.fill(".sampling .number >> nth=0", "40")
    ask(page, "Hello?")
    wait_for_end(page)
    assert engine.requests[-1]["lanes"][1].sapt.interval == 8 and engine.requests[-1]["max_new_tokens"] == 40
    assert page.locator(".chip-sapt").inner_text() == "SAPT every 8"


def test_stop_keeps_the_text_and_run_works_at_once(page: Any, engine: StandInEngine) -> None:
    engine.delay = 0.15
    ask(page, "Make a list.")
    page.wait_for_function("document.querySelectorAll('.lane .token').length > 6")
    page.click("#stop")
    start(page)  # at once: before the first run has wound up
    page.wait_for_function("document.querySelectorAll('.lane .token').length > 6")
    page.click("#stop")
    page.wait_for_selector(".lane[data-state=stopped]")
    kept = texts(page)
    assert len(kept[0]) > 5
    page.wait_for_timeout(500)
    assert texts(page) == kept
    assert not page.is_enabled("#stop")
    engine.delay = 0.01
    start(page)
    wait_for_end(page)
    assert states(page) == ["done", "refused"] and engine.overlaps == 1


def test_a_long_answer_ends_at_its_first_line(page: Any, engine: StandInEngine) -> None:
    engine.delay, engine.words = 0.01, ["several", "words", "more"] * 30
    ask(page, "Hello?")
    wait_for_end(page)
    offset = """() => document.querySelector('.lane .body').getBoundingClientRect().top
        - document.querySelector('.lane .text').getBoundingClientRect().top"""
    page.wait_for_function(f"() => Math.abs(({offset})()) < 4")


def test_run_during_a_run_starts_afresh(page: Any, engine: StandInEngine) -> None:
    engine.delay = 0.1
    ask(page, "Make a list.")
    page.wait_for_function("document.querySelectorAll('.lane .token').length > 4")
    engine.delay = 0.01
    ask(page, "How do I train a dog?")
    wait_for_end(page)
    assert states(page) == ["done", "done"] and engine.overlaps == 1
    assert texts(page)[0].startswith("Here is the list.") and texts(page)[0].count("Here is") == 1


def test_leaving_the_page_ends_the_run(browser: Any, address: str, engine: StandInEngine) -> None:
    engine.delay, engine.fail = 0.3, None
    with opened(browser, address) as page:
        ask(page, "Make a list.")
        page.wait_for_function("document.querySelectorAll('.lane .token').length > 2")
        assert engine.lvlm.lock.locked()
    deadline = time.monotonic() + 8
    while engine.lvlm.lock.locked() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not engine.lvlm.lock.locked()


def test_a_second_visitor_waits_for_the_model(browser: Any, address: str, page: Any, engine: StandInEngine) -> None:
    engine.delay = 0.6
    ask(page, "Make a list.")
    page.wait_for_function("document.querySelectorAll('.lane .token').length > 2")
    with opened(browser, address) as second:
        ask(second, "How do I train a dog?")
        second.wait_for_selector(".lane[data-state=queued]")
        assert "one run before yours" in second.locator(".placeholder").first.inner_text()
        engine.delay = 0.01
        page.click("#stop")
        wait_for_end(second)
        assert states(second) == ["done", "done"] and engine.overlaps == 1


def test_markup_in_model_text_stays_text(page: Any, engine: StandInEngine) -> None:
    engine.words = [
        '<img src=x onerror="window.harmed=1">',
        "<script>window.harmed=1</script>",
        "${1+1} {{value}}",
        "&amp;",
    ]
    ask(page, "Hello?")
    wait_for_end(page)
    assert texts(page)[0].strip() == " ".join(engine.words)
    assert page.locator(".lane img, .lane script").count() == 0
    assert page.evaluate("window.harmed") is None


def test_an_empty_prompt_gets_a_sentence(page: Any) -> None:
    page.click("#run")
    page.wait_for_selector(".notice:visible")
    assert "The prompt is empty" in page.locator(".notice").inner_text()
    assert states(page) == ["empty", "empty"]
    ask(page, "Hello?")
    wait_for_end(page)
    assert not page.is_visible(".notice")


def test_a_bug_gets_a_calm_sentence_and_the_next_run_works(page: Any, engine: StandInEngine) -> None:
    engine.fail = RuntimeError("secret detail")
    ask(page, "Hello?")
    page.wait_for_selector(".notice:visible")
    assert "Something went wrong" in page.locator(".notice").inner_text()
    assert "secret" not in page.content()
    assert states(page) == ["error", "error"] and page.input_value("#prompt textarea") == "Hello?"
    engine.fail = None
    start(page)
    wait_for_end(page)
    assert states(page) == ["done", "done"]


def bomb(path: Path, side: int = 20_000) -> None:
    """A small PNG that decodes to side x side pixels."""
    row, squeeze = bytes(1 + side // 8), zlib.compressobj()
    data = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_bad_files_get_a_sentence_and_the_next_run_works(page: Any, engine: StandInEngine, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("this is not a picture")
    Image.effect_noise((600, 400), 60).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    bomb(tmp_path / "bomb.png")
    page.fill("#prompt textarea", "What is this?")
    bad = {"notes.png": "could not be read", "half.jpg": "could not be read", "bomb.png": "million pixels"}

    def upload_bad_files() -> None:
        for name, words in bad.items():
            page.set_input_files("#image input[type=file]", tmp_path / name)
            page.wait_for_function("words => document.querySelector('.notice').textContent.includes(words)", arg=name)
            assert words in page.locator(".notice").inner_text()
            page.wait_for_selector("#image img", state="detached")

    upload_bad_files()
    assert page.input_value("#prompt textarea") == "What is this?"
    start(page)
    page.wait_for_function("() => document.querySelector('.notice').textContent.includes('This run has no picture')")
    wait_for_end(page)
    page.set_input_files("#image input[type=file]", tmp_path / "whole.jpg")
    page.wait_for_selector("#image img")
    page.wait_for_selector(".notice", state="hidden")
    start(page)
    wait_for_end(page)
    assert states(page) == ["done", "done"] and engine.requests[-1]["image"].size == (600, 400)
    page.click("#image button[aria-label='Remove Image']")
    upload_bad_files()  # Gradio has made this visitor's component anew meanwhile


def test_odd_but_good_pictures_work(page: Any, engine: StandInEngine, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (60, 40), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    Image.new("I;16", (60, 40), 40_000).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (60, 40), "red").save(tmp_path / "turned.jpg", exif=exif)
    engine.words = ["fine"]
    for name, size in (
        ("moving.gif", (60, 40)),
        ("print.jpg", (60, 40)),
        ("deep.png", (60, 40)),
        ("turned.jpg", (40, 60)),
    ):
        page.set_input_files("#image input[type=file]", tmp_path / name)
        page.wait_for_selector("#image img")
        ask(page, "What is this?")
        wait_for_end(page)
        assert (engine.requests[-1]["image"].mode, engine.requests[-1]["image"].size) == ("RGB", size)
        page.click("#image button[aria-label='Remove Image']")
        page.wait_for_selector("#image img", state="detached")


def luminance(page: Any, selector: str, what: str) -> float:
    rgb = page.locator(selector).first.evaluate(f"node => getComputedStyle(node).{what}")
    return sum(float(part) for part in rgb.split("(")[1].rstrip(")").split(",")[:3]) / 3


@pytest.mark.parametrize(
    "view",
    [
        {"viewport": PHONE},
        {"viewport": LAPTOP, "color_scheme": "dark"},
        {"viewport": {"width": 3840, "height": 2160}},
    ],
)
def test_layout_neither_overflows_nor_jumps(
    browser: Any, address: str, engine: StandInEngine, view: dict[str, Any]
) -> None:
    engine.delay, engine.prefill, engine.words, engine.fail = 0.02, 0.1, None, None
    with opened(browser, address, **view) as page:
        wide = "document.documentElement.scrollWidth"
        assert page.evaluate(wide) <= view["viewport"]["width"]
        page.fill("#prompt textarea", "Make a list of " + "averyveryverylongword" * 8)
        start(page)
        page.wait_for_selector(".lane .token")
        heights = "[...document.querySelectorAll('.lane')].map(lane => Math.round(lane.getBoundingClientRect().height))"
        before = page.evaluate(heights)
        wait_for_end(page)
        assert page.evaluate(heights) == before
        assert page.evaluate(wide) <= view["viewport"]["width"]
        dark = view.get("color_scheme") == "dark"
        assert (luminance(page, ".lane", "backgroundColor") < 60) is dark
        assert (luminance(page, ".lane .body", "color") > 180) is dark


def test_the_keyboard_reaches_the_examples_and_runs_one(page: Any) -> None:
    page.locator(".card-fill").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "card-run"
    page.keyboard.press("Enter")
    page.wait_for_selector(".lane .token")
    wait_for_end(page)
    assert "went along" in page.locator(".verdict[aria-live=polite]").inner_text()


def test_labels(page: Any) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('#work :is(input:not([type=file]), textarea, button), .cards button')]
        .filter(node => node.offsetParent && !(node.labels?.length || node.ariaLabel || node.title
                        || node.textContent.trim() || node.getAttribute('aria-labelledby')))
        .map(node => node.outerHTML.slice(0, 120))"""
    )
    assert unnamed == []
