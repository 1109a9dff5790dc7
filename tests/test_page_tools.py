"""What one does with a run, in a real browser: look closer, re-mark, set columns up, keep, play back, stay covered."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_browser import ask, browser, opened, start, states, texts, wait_for_end
from page_stand_in import StandInEngine

from safety.engine import Engine
from safety.ui import recordings
from safety.ui.browser import served
from safety.ui.host import Choice, Host
from safety.ui.mode import PUBLIC
from safety.ui.page import build_page
from safety.ui.presets import PRESETS
from safety.ui.recordings import record

pytestmark = pytest.mark.browser
__all__ = ["browser"]  # a fixture


@pytest.fixture(scope="module")
def engine() -> StandInEngine:
    return StandInEngine(100, 0.0)


@pytest.fixture(scope="module")
def address(engine: StandInEngine) -> Iterator[str]:
    with served(build_page(engine)) as address:  # type: ignore[arg-type]
        yield address


@pytest.fixture(scope="module")
def shared(browser: Any, address: str) -> Iterator[Any]:
    """One tab for the tests that leave no trace that the next one would stumble over."""
    with opened(browser, address) as page:
        yield page


def set_range(page: Any, selector: str, value: float) -> None:
    page.eval_on_selector(
        selector,
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})); }",
        value,
    )


def test_a_token_its_place_in_the_trace_and_the_reverse(shared: Any) -> None:
    shared.click("[data-layout=each]")
    ask(shared, "Make a list.")
    wait_for_end(shared)
    sapt = shared.locator(".lane").nth(3)
    assert "Point at a word" in sapt.locator(".inspector").inner_text()
    sapt.locator(".token").nth(16).hover()
    told = sapt.locator(".inspector").inner_text()
    assert "token 16" in told and "chance 60 %" in told and "harm" in told and "SAPT checked" in told
    assert "other" in told and "20 %" in told and "<b>bold</b>" in told
    assert sapt.locator(".token.lit").count() == 1 and sapt.locator(".cursor").get_attribute("visibility") == "visible"
    where = float(sapt.locator(".cursor").get_attribute("x1") or 0)
    sapt.locator("svg.trace").scroll_into_view_if_needed()
    spot = shared.eval_on_selector_all(
        "svg.trace", "plots => { const box = plots[3].getBoundingClientRect(); return [box.left, box.top]; }"
    )
    shared.mouse.move(spot[0] + where * 0.6, spot[1] + 50)
    lit = int(sapt.locator(".token.lit").get_attribute("data-i") or -1)
    assert 5 <= lit <= 11 and f"token {lit}" in sapt.locator(".inspector").inner_text()
    shared.mouse.move(2, 2)
    sapt.locator(".text").focus()
    for key in ("Home", "ArrowRight", "ArrowRight"):
        shared.keyboard.press(key)
    assert sapt.locator(".token.lit").get_attribute("data-i") == "2"
    assert sapt.locator(".inspector").get_attribute("aria-live") == "polite"
    shared.keyboard.press("Escape")
    assert shared.locator(".token.lit").count() == 0


def test_the_alarm_lines_label_leaves_the_traces_end_free(
    browser: Any, address: str, engine: StandInEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "words", ["step"] * 60)  # of an axis of 64: its trace ends at 0.97, beside the label
    plot = "document.querySelector('.lane svg.trace')"
    with opened(browser, address) as page:
        ask(page, "Make a list.")
        wait_for_end(page)
        for line, side in ((0.99, "<"), (0.9, ">")):
            set_range(page, ".alarm-knob input", line)
            page.wait_for_function(
                f"""() => {plot}.querySelector('.threshold-label').textContent === 'alarm ≥ {line:.2f}'
                && +{plot}.querySelector('.threshold-label').getAttribute('y')
                {side} +{plot}.querySelector('.threshold').getAttribute('y1')"""
            )


@pytest.mark.parametrize("layout", ["together", "each"])
def test_no_speed_is_cut_off_at_any_width(browser: Any, address: str, layout: str) -> None:
    with opened(browser, address) as page:
        page.click(f"[data-layout={layout}]")
        ask(page, "Make a list.")
        wait_for_end(page)
        for width in (1920, 1366, 1280, 1024, 390):
            page.set_viewport_size({"width": width, "height": 900})
            cut = page.eval_on_selector_all(
                ".speed", "lines => lines.filter(p => p.scrollHeight > p.clientHeight).map(p => p.textContent)"
            )
            assert cut == [], width


def test_a_moved_threshold_re_marks_and_does_not_re_run(shared: Any, engine: StandInEngine) -> None:
    asked, over = len(engine.requests), shared.locator(".lane >> nth=0").locator(".token.over")
    before = over.count()
    set_range(shared, ".alarm-knob input", 0.3)
    shared.wait_for_function(
        "before => document.querySelectorAll('.lane')[0].querySelectorAll('.over').length > before", arg=before
    )
    summary = "document.querySelector('.summary').textContent"  # drawn with the next frame, after the tokens
    shared.wait_for_function(f"() => {summary}.includes('Re-marked, not re-run: at 0.30 the alarm starts')")
    assert shared.locator(".lane >> nth=0 >> svg.trace .above").count() == over.count()
    shared.click(".alarm-knob button")
    shared.wait_for_function(
        "before => document.querySelectorAll('.lane')[0].querySelectorAll('.over').length === before", arg=before
    )
    shared.wait_for_function(f"() => !{summary}.includes('Re-marked')")
    shared.click(".lane-card >> nth=0 >> summary")
    shared.click(".lane-card >> nth=0 >> .defense-sasa .settings")
    shared.fill(".lane-card >> nth=0 >> .defense-sasa .number >> nth=0", "0.99")
    badge = shared.locator(".lane >> nth=1 >> .badge")
    shared.wait_for_function("() => document.querySelectorAll('.badge')[1].textContent.includes('would pass')")
    assert badge.inner_text() == "SASA 0.97 < 0.99 → would pass"
    assert "SASA would let it pass" in shared.locator(".summary").nth(1).inner_text()
    assert len(engine.requests) == asked


def test_a_threshold_of_another_probe_re_marks_nothing(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        ask(page, "Make a list.")
        wait_for_end(page)
        page.click(".defense-sasa .settings")
        sasa = page.locator(".defense-sasa")
        ran = page.locator(".badge").nth(1).inner_text()
        sasa.get_by_label("Mode", exact=True).select_option(label="Reading too (ours)")
        sasa.get_by_label("Threshold", exact=True).first.fill("0.99")  # of a probe that did not run
        page.wait_for_timeout(300)
        assert page.locator(".badge").nth(1).inner_text() == ran and "≥ 0.50 → refused" in ran
        assert "Re-marked" not in page.locator(".summary").nth(1).inner_text()
        sasa.get_by_label("Mode", exact=True).select_option(index=0)
        sasa.get_by_label("Threshold", exact=True).first.fill("0.99")
        page.wait_for_function("() => document.querySelectorAll('.badge')[1].textContent.includes('would pass')")


def test_columns_of_one_name_are_re_marked_each_by_its_own_threshold(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.click(".editor .add")
        for number in range(2):
            card = page.locator(".lane-card").nth(number)
            card.evaluate("card => { card.open = true; }")
            card.locator(".lane-name input").fill("Mine")
        ask(page, "Make a list.")
        wait_for_end(page)
        page.click(".lane-card >> nth=1 >> .defense-sasa .settings")
        page.fill(".lane-card >> nth=1 >> .defense-sasa .number >> nth=0", "0.99")
        page.wait_for_function("() => document.querySelectorAll('.badge')[2].textContent.includes('would pass')")
        assert page.locator(".lane >> nth=1 >> .badge").inner_text() == "SASA 0.97 ≥ 0.50 → refused"


def test_controls_that_do_nothing_in_a_mode_are_not_shown_in_it(
        browser: Any, address: str, engine: StandInEngine) -> None:
    with opened(browser, address) as page:
        def shown(defense: str) -> list[str]:
            return page.locator(f".defense-{defense} .knob:visible label").all_inner_texts()

        def choose(defense: str, label: str, option: str) -> None:
            page.locator(f".defense-{defense}").get_by_label(label, exact=True).select_option(label=option)

        page.click(".defense-sasa .settings")
        page.click(".defense-revision .settings")
        assert shown("sasa") == ["Threshold", "Projection strength λ", "Layers", "Mode", "Choice of layers"]
        for mode, acting in (("Reading too (ours)", ["Threshold", "Mode"]), ("Probe only", ["Threshold", "Mode"]),
                             ("Project only", ["Projection strength λ", "Layers", "Mode"])):
            choose("sasa", "Mode", mode)
            assert shown("sasa") == acting
        assert {"Share of heads", "Which heads"} < set(shown("revision"))
        threshold = page.locator(".defense-sasa").get_by_label("Threshold", exact=True).first
        page.click(".editor [data-values=paper]")
        assert threshold.input_value() == "0.5"
        choose("sasa", "Mode", "Reading too (ours)")
        assert threshold.input_value() == "0.6"  # the paper has none for it
        page.click("[data-layout=sweep]")
        page.select_option(".sweep select", label="SASA: Projection strength λ")
        page.click(".sweep button")
        ask(page, "Hello?")
        wait_for_end(page)
        swept = [lane.sasa for lane in engine.requests[-1]["lanes"][1:]]
        assert {(sasa.mode, sasa.threshold) for sasa in swept} == {("gate", 0.5)}
        assert len({sasa.strength for sasa in swept}) == 4
        page.click(".editor .reset")
        page.click(".defense-revision .settings")
        choose("revision", "What is revised", "Whole layer")
        assert not {"Share of heads", "Which heads"} & set(shown("revision"))
        page.click(".defense-revision .settings")
        page.click(".defense-revision .settings")
        assert "Which heads" not in shown("revision")


def test_layers_and_costs_are_told(shared: Any) -> None:
    assert shared.locator(".layers rect").count() == 30
    assert "Highest behind block 29: 0.97" in shared.locator(".layers figcaption").inner_text()
    speeds = shared.locator(".speed").all_inner_texts()
    assert "baseline" in speeds[0] and "% work" in speeds[1] and "tokens/s" in speeds[0]


def test_columns_are_added_swept_set_to_the_papers_and_removed(shared: Any, engine: StandInEngine) -> None:
    shared.click(".editor .reset")
    shared.click(".editor .add")
    shared.fill("#lane-name-1", "Mine")
    assert shared.locator("[aria-label='Remove the column Mine']").count() == 1
    assert shared.locator(".settings[aria-label$=' in Mine']").count() == 3
    shared.click(".lane-card >> nth=1 >> .defense-sasa .switch input")
    shared.click(".editor [data-values=paper]")
    ask(shared, "Hello?")
    wait_for_end(shared)
    _, first, mine = engine.requests[-1]["lanes"]
    assert mine.name == "Mine" and mine.sasa is None and mine.sapt is not None and first.sasa is not None
    assert mine.sapt.end_check is False and mine.revision.alpha == 2.0
    shared.click(".lane-card >> nth=0 >> summary")
    shared.click(".lane-card >> nth=0 >> .remove")
    assert shared.get_attribute(".lane-card", "aria-label") == "Mine"
    shared.click("[data-layout=sweep]")
    shared.select_option(".sweep select", label="Revision: Strength α")
    for name, value in (("From", "0"), ("To", "3"), ("Columns", "4")):
        shared.locator(".sweep").get_by_label(name, exact=True).fill(value)
    assert shared.locator(".sweep select >> nth=1 >> option").all_inner_texts() == ["Mine", "no other defense"]
    shared.click(".sweep button")
    assert shared.locator(".sweep").is_hidden()
    ask(shared, "Hello?")
    wait_for_end(shared)
    for lane in engine.requests[-1]["lanes"][1:]:  # all else as in "Mine"
        assert lane.sapt == mine.sapt and lane.sasa is None
    assert [lane.revision.alpha for lane in engine.requests[-1]["lanes"][1:]] == [0, 1, 2, 3]
    shared.click("[data-layout=each]")
    assert shared.locator(".lane-card .told small").all_inner_texts() == [
        "Judges the request first", "Nudges every step", "Watches, and steps in", "SASA · Revision · SAPT"]
    shared.click(".lane-card >> nth=0 >> summary")
    shared.fill("#lane-name-0", "Mine")
    assert shared.locator(".lane-card .told small").first.inner_text() == "SASA"
    for _ in range(3):
        if shared.is_enabled(".editor .add"):
            shared.click(".editor .add")
    assert shared.locator(".lane-card").count() == 5 and not shared.is_enabled(".editor .add")
    shared.click(".editor .reset")
    assert shared.locator(".lane-card").count() == 1


def test_a_link_restores_settings_prompt_and_example(shared: Any, browser: Any, engine: StandInEngine) -> None:
    shared.click(".card-fill >> nth=1")
    shared.wait_for_selector("#image img")
    shared.fill("#prompt textarea", "And what is this?")  # the picture is the example's all the same
    shared.click(".defense-sapt .settings")
    shared.fill(".defense-sapt .number >> nth=1", "5")
    link = shared.evaluate(
        """() => {
            const detail = {};
            window.dispatchEvent(new CustomEvent('safety:link', {detail}));
            return detail.link;
        }"""
    )
    with opened(browser, link) as page:
        page.wait_for_selector("#image img")
        assert page.input_value("#prompt textarea") == "And what is this?"
        start(page)
        wait_for_end(page)
        assert engine.requests[-1]["lanes"][1].sapt.interval == 5 and engine.requests[-1]["image"] is not None
    with opened(browser, link.partition("#")[0] + "#s=broken") as page:
        page.wait_for_selector(".notice:visible")
        assert "could not be read" in page.locator(".notice").inner_text()
        assert page.locator(".lane-card").count() == 1
    unfit = shared.evaluate(
        """() => {
            const detail = {};
            window.dispatchEvent(new CustomEvent('safety:link', {detail}));
            const [head, code] = detail.link.split('#s='), plain = code.replace(/-/g, '+').replace(/_/g, '/');
            const told = JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(plain), sign => sign.charCodeAt(0))));
            told.form.lanes[0].revision.layer = 99;
            return `${head}#s=${btoa(String.fromCharCode(...new TextEncoder().encode(JSON.stringify(told))))}`;
        }"""
    )
    with opened(browser, unfit) as page:
        page.wait_for_selector(".notice:visible")
        assert "left as it was: Revision: Layer." in page.locator(".notice").inner_text()


def test_exports_hold_the_run_and_escape_everything(
    shared: Any, browser: Any, engine: StandInEngine, tmp_path: Path
) -> None:
    engine.words = ['<img src=x onerror="window.harmed=1">', "</p><script>window.harmed=1</script>", "&amp;"]
    try:
        ask(shared, "<b>Make</b> a list")
        wait_for_end(shared)
    finally:
        engine.words = None
    with shared.expect_download() as saved:
        shared.click(".save-json")
    run = json.loads(Path(saved.value.path()).read_text("utf-8"))
    assert run["lanes"][0]["tokens"][0].startswith("<img") and run["about"]["prompt"] == "<b>Make</b> a list"
    assert run["about"]["sampling"]["seed"] == 0 and run["about"]["lanes"][1]["sapt"]["interval"] == 5
    with shared.expect_download() as saved:
        shared.click(".save-html")
    saved.value.save_as(tmp_path / "run.html")
    page = browser.new_page()
    page.goto((tmp_path / "run.html").as_uri())
    assert page.locator("article").count() == 2 and page.locator("article svg .line").count() == 2
    assert page.locator(".answer").first.inner_text().startswith('<img src=x onerror="window.harmed=1">')
    assert page.locator("article img, article b, script").count() == 0 and page.evaluate("window.harmed") is None
    assert "<b>Make</b> a list" in page.locator("dl").inner_text()
    assert page.locator("figure img").evaluate("img => img.complete && img.naturalWidth > 100")
    assert page.locator(".banner").count() == 0 and page.locator("article").first.inner_text().count("Done") == 1
    assert "remarked" not in run
    set_range(shared, ".alarm-knob input", 0.01)
    with shared.expect_download() as saved:
        shared.click(".save-json")
    again = json.loads(Path(saved.value.path()).read_text("utf-8"))
    assert again.pop("remarked") == {"alarm": 0.01, "thresholds": {}} and again == run  # what the run gave stays
    with shared.expect_download() as saved:
        shared.click(".save-html")
    shared.click(".alarm-knob button")
    saved.value.save_as(tmp_path / "again.html")
    page.goto((tmp_path / "again.html").as_uri())
    assert "alarm line 0.01; the run had 0.90" in page.locator(".banner").inner_text()
    first = page.locator("article").first.inner_text()
    assert "no refusal" in first and "Re-marked, not re-run: at 0.01" in first
    page.close()


def test_the_session_is_remembered_only_if_asked(shared: Any, browser: Any, address: str) -> None:
    stored = "() => localStorage.length"
    assert shared.locator(".history li").count() >= 3 and shared.evaluate(stored) == 0
    for number in (0, 1):
        shared.locator(".history li input").nth(number).check()
    assert shared.locator(".compare .side").count() == 2
    assert (
        "&amp;" in shared.locator(".compare .said").first.inner_text() and shared.locator(".compare img").count() == 0
    )
    shared.check(".remember input")
    assert shared.evaluate(stored) == 1
    shared.reload()
    shared.wait_for_selector(".history li")
    assert shared.is_checked(".remember input")
    shared.click(".forget")
    assert shared.evaluate(stored) == 0 and not shared.is_visible(".history")


def test_a_recording_plays_with_no_model_and_is_marked(browser: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(recordings, "RECORDINGS", tmp_path)
    made = record(StandInEngine(30, 0.1), PRESETS[0], "abc1234", None, 64)  # type: ignore[arg-type]
    (tmp_path / "attack.json").write_text(json.dumps(made))
    with served(build_page(Host())) as address, opened(browser, address) as page:
        assert page.locator(".card-replay").count() == 1
        start(page, ".card-replay")
        page.wait_for_selector(".lane[data-state=streaming]")
        assert "commit abc1234" in page.locator(".recording").inner_text()
        page.click(".recording .skip")
        wait_for_end(page)
        assert states(page) == ["done", "refused"] and texts(page)[0].strip().endswith("warning.")
        page.click("#run")
        page.wait_for_selector(".notice:visible")
        assert "still being loaded" in page.locator(".notice").inner_text()


def test_the_page_is_painted_before_the_model_and_takes_it_in(browser: Any) -> None:
    ready = threading.Event()

    def load(choice: Choice, progress: Any) -> Engine:
        if choice.model == "broken":
            raise ValueError("no such weights")
        progress("Reading weights …")
        ready.wait(60)
        return StandInEngine(100, 0.0)  # type: ignore[return-value]

    host = Host(load=load)
    host.start(Choice())
    with served(build_page(host)) as address, opened(browser, address) as page:
        assert "Reading weights" in page.locator(".model-status").inner_text()
        assert page.locator(".switch input:enabled").count() == 0
        assert page.locator("[data-layout][aria-pressed=true]").count() == 0
        assert "once a model is loaded" in page.locator(".lane-list .no-lanes").inner_text()
        ready.set()
        page.wait_for_selector(".switch input:enabled")
        # The head comes in the same update as the controls, but may be drawn after them.
        page.wait_for_selector(".model-name:text-is('stand-in · scripted')")
        page.wait_for_selector(".model-status", state="hidden")
        ask(page, "Hello?")
        wait_for_end(page)
        assert states(page) == ["done", "done"]
        page.click(".model summary")
        page.fill("[name=model]", "broken")
        page.click(".load button")
        page.wait_for_selector(".model-status:visible")
        page.wait_for_function("() => document.querySelector('.model-status').textContent.includes('still loaded')")
        page.click(".dismiss")
        assert not page.is_visible(".model-status")
        page.keyboard.press("Escape")
        start(page)
        wait_for_end(page)
        assert states(page) == ["done", "done"]


def test_a_public_page_covers_until_asked(browser: Any) -> None:
    engine = StandInEngine(100, 0.0)
    with served(build_page(Host(engine, PUBLIC))) as address, opened(browser, address) as page:  # type: ignore[arg-type]
        page.click(".model summary")
        assert not page.is_visible(".load") and not page.is_visible(".calibrate")
        page.click(".model summary")
        ask(page, "Make a list.")
        wait_for_end(page)
        assert page.locator(".token.covered").count() > 5 and "damage" not in page.content()
        page.click(".cover button:visible")
        page.wait_for_function("() => document.querySelector('.lane .body').textContent.includes('damage')")
        assert page.locator(".token.covered").count() == 0 and not page.is_visible(".cover")


def axe_core() -> str:
    """axe-core's script, out of the package that carries it (requirements-dev.txt)."""
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None or package.origin is None:
        pytest.skip("axe-playwright-python, which carries axe-core, is not installed (requirements-dev.txt)")
    return Path(package.origin).with_name("axe.min.js").read_text("utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_of_ours(browser: Any, address: str, scheme: str) -> None:
    with opened(browser, address, color_scheme=scheme) as page:
        ask(page, "Make a list.")
        wait_for_end(page)
        page.click(".defense-sasa .settings")
        page.click(".sampling summary")
        page.add_script_tag(content=axe_core())
        found = page.evaluate("async () => (await axe.run(document)).violations")
        told = [(rule["id"], [node["html"][:150] for node in rule["nodes"][:4]]) for rule in found]
        assert not told, json.dumps(told, indent=1)
