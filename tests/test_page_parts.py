"""The page's parts without a browser: controls to lanes, views, cancelling, presets, the command line of app.py."""

import json
from typing import Any

import gradio as gr
import pytest
from page_stand_in import StandInEngine
from PIL import Image

from safety import artifacts
from safety.engine import Answer, Event, Step
from safety.errors import UserError
from safety.inputs import open_image
from safety.settings import Lane, Revision, Sapt, Sasa
from safety.ui import story
from safety.ui.board import chips, empty_view, view_of
from safety.ui.host import Host
from safety.ui.knobs import knobs_of, lanes_of, layouts, length_of, sampling_of, starting_form
from safety.ui.live import BUG, MEMORY, LiveRun, Runs
from safety.ui.names import DEFENSES
from safety.ui.page import build_page
from safety.ui.presets import PRESETS
from safety.ui.theme import launch_options
from safety.ui.top import top_view


def form(**changes: Any) -> dict[str, Any]:
    """The form as the page starts with it; changes like sasa={"threshold": 0.7} turn knobs of its one lane."""
    start = starting_form(StandInEngine())  # type: ignore[arg-type]
    for key, value in changes.items():
        if key in start["lanes"][0]:
            start["lanes"][0][key] |= value
        else:
            start[key] = value
    return start


def lanes(**changes: Any) -> list[Lane]:
    return lanes_of(form(**changes), StandInEngine())  # type: ignore[arg-type]


def test_the_form_starts_with_one_lane_of_all_calibrated_defenses() -> None:
    assert lanes() == [Lane("No defense"), Lane("Defended", Sasa(13, 15), Revision(19), Sapt())]
    assert lanes(lanes=[]) == [Lane("No defense")]
    each = knobs_of(StandInEngine())["layouts"]["each"]  # type: ignore[arg-type]
    separate = lanes(lanes=each)
    assert [lane.name for lane in separate] == ["No defense", "SASA", "Revision", "SAPT", "All together"]
    assert separate[2] == Lane("Revision", revision=Revision(19))


def test_the_reading_mode_is_offered_where_a_probe_is_there_for_it() -> None:
    def modes(engine: StandInEngine) -> list[str]:
        sasa = next(row for row in knobs_of(engine)["defenses"] if row["key"] == "sasa")  # type: ignore[arg-type]
        return [mode for _, mode in next(knob for knob in sasa["controls"] if knob["key"] == "mode")["options"]]

    engine = StandInEngine()
    assert modes(engine) == ["gate", "probe", "project", "reading"]
    engine.artifacts.sasa.reading = None
    assert modes(engine) == ["gate", "probe", "project"]
    assert lanes(sasa={"mode": "reading"})[1].sasa == Sasa(13, 15, mode="reading")


def test_each_defense_is_called_the_same_wherever_the_page_names_it() -> None:
    assert tuple(DEFENSES) == artifacts.DEFENSES
    host = Host(StandInEngine())  # type: ignore[arg-type]
    full = {key: name.full for key, name in DEFENSES.items()}
    assert top_view(host)["names"] == full
    assert {row["key"]: row["name"] for row in knobs_of(host.engine)["defenses"]} == full
    page = story.explanations()
    assert all(f"<h3>{name}" in page for name in full.values())
    short = [name.short for name in DEFENSES.values()]
    assert [lane.name for lane in layouts(host.engine)["each"]] == [*short, "All together"]
    assert [chip["label"].split()[0] for chip in chips(lanes()[1])] == short


def test_every_knob_reaches_its_setting() -> None:
    lane = lanes(
        sasa={"mode": "project", "strength": 0.5, "pair": "12-14"},
        revision={"level": "layer", "fraction": 0.1, "heads": "random", "vector": "pwd", "units": "std",
                  "positions": "all", "layer": 9},
        sapt={"interval": 4, "end_check": False},
    )[1]  # fmt: skip
    assert lane.sasa == Sasa(12, 14, strength=0.5, mode="project")
    assert lane.revision == Revision(9, 2.0, "layer", "random", 0.1, "pwd", "std", "all")
    assert lane.sapt == Sapt(interval=4, end_check=False)
    assert lanes(revision={"on": False})[1].revision is None


def test_every_described_knob_is_a_setting_within_its_bounds() -> None:
    for defense in knobs_of(StandInEngine())["defenses"]:  # type: ignore[arg-type]
        for values in (defense["calibrated"], defense["paper"]):
            for knob in defense["controls"]:
                value = values[knob["key"]]
                if knob["type"] == "range":
                    assert knob["min"] <= value <= knob["max"], knob
                elif knob["type"] == "choice":
                    assert value in [option for _, option in knob["options"]], knob
        assert lanes(**{defense["key"]: defense["paper"]})


def test_the_papers_values_are_the_papers() -> None:
    paper = {defense["key"]: defense["paper"] for defense in knobs_of(StandInEngine())["defenses"]}  # type: ignore[arg-type]
    assert (paper["sapt"]["threshold"], paper["sapt"]["interval"], paper["sapt"]["end_check"]) == (0.9, 16, False)
    assert (paper["revision"]["alpha"], paper["revision"]["fraction"]) == (2.0, 0.7) and paper["sasa"]["strength"] == 1


@pytest.mark.parametrize(
    "broken",
    [
        {"sasa": {"pair": "x"}},
        {"sasa": {"threshold": None}},
        {"revision": {"layer": 1.5}},
        {"sapt": {"interval": float("nan")}},
        {"lanes": "all"},
        {"lanes": [3]},
        {"lanes": [{"name": str(i)} for i in range(6)]},
    ],
)
def test_broken_forms_get_a_sentence(broken: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        lanes(**broken)
    for nothing in (None, [], "", {}):
        with pytest.raises(UserError):
            lanes_of(nothing, StandInEngine())  # type: ignore[arg-type]


def test_lanes_get_names_that_differ() -> None:
    on: dict[str, Any] = {"sapt": {"on": True}}
    rows = [{"name": "x"} | on, {"name": "x"} | on, on, {"name": "No defense"} | on, {"name": "nothing is on"}]
    names = [lane.name for lane in lanes(lanes=rows)]
    assert len(names) == len(set(names)) == 5 and names[3] == "Column 3"


def test_broken_sampling_gets_a_sentence() -> None:
    with pytest.raises(UserError, match="Seed"):
        sampling_of(form(seed=None))
    with pytest.raises(UserError, match="new tokens"):
        length_of(form(max_new_tokens=""))


def components(page: gr.Blocks) -> list[dict[str, Any]]:
    return [item["props"] for item in page.get_config_file()["components"]]


def test_a_defense_without_artifacts_is_unavailable_with_the_reason() -> None:
    engine = StandInEngine()
    engine.artifacts.sasa = engine.artifacts.settings.sasa = None
    knobs = knobs_of(engine)  # type: ignore[arg-type]
    sasa, _, sapt = knobs["defenses"]
    assert not sasa["available"] and "no calibrated SASA" in sasa["hint"] and sapt["available"]
    assert "sasa" not in knobs["start"]["lanes"][0]
    with pytest.raises(UserError, match="SASA"):
        lanes_of(form(), engine)  # type: ignore[arg-type]
    nothing = knobs_of(None)
    assert not any(defense["available"] for defense in nothing["defenses"]) and nothing["start"]["lanes"] == []


def test_bounds_come_from_the_model_and_artifacts() -> None:
    knobs = {
        knob["label"]: knob for defense in knobs_of(StandInEngine(), 64)["defenses"] for knob in defense["controls"]
    }  # type: ignore[arg-type]
    assert (knobs["Layer"]["min"], knobs["Layer"]["max"]) == (8, 24)
    assert [value for _, value in knobs["Layers"]["options"]] == ["12-14", "13-15", "16-20"]
    assert knobs_of(StandInEngine(), 64)["sampling"][0]["max"] == 64  # type: ignore[arg-type]


def test_sasas_thresholds_are_told_per_way_to_judge() -> None:
    sasa, revision, _ = knobs_of(StandInEngine())["defenses"]  # type: ignore[arg-type]
    assert sasa["thresholds"] == {"13-15": 0.5, "16-20": 0.7, "clean": 0.3, "reading": 0.6}
    assert revision["thresholds"] == {}


def test_nothing_is_public_or_fetched() -> None:
    page = build_page(StandInEngine())  # type: ignore[arg-type]
    assert all(event["api_visibility"] == "private" for event in page.get_config_file()["dependencies"])
    options = launch_options()
    assert not options["share"] and not options["mcp_server"] and not options["run_history"]
    assert "http" not in options["css"] and not options["theme"]._stylesheets


def answer(harm: list[float | None], events: tuple[Event, ...] = ()) -> Answer:
    result = Answer("Defended", 0.9)
    for i, p in enumerate(harm):
        result.add(Step(0, 0, i, 1, f"w{i} ", p, events if i == 0 else (), None, 0.1 * i, 0.0))
    return result


def view(done: Answer, lane: Lane, state: str = "done") -> dict[str, Any]:
    return view_of("run", [done], [lane], [state], threshold=0.9, max_new_tokens=128, wait="…")


def test_a_view_is_plain_data_and_fresh_each_time() -> None:
    events = (
        Event("gate", 0, 0.2, 0.5, False),
        Event("check", 16, 0.95, 0.9, True),
        Event("injection", 16, 0.95, 0.9, True),
    )
    done = answer([0.1, 0.95, None], events)
    first = view(done, Lane("Defended", Sasa(1, 2), sapt=Sapt()))
    assert json.loads(json.dumps(first)) == first
    lane = first["lanes"][0]
    assert lane["harm"] == [0.1, 0.95, None] and [mark["type"] for mark in lane["marks"]] == ["check", "injection"]
    assert lane["badge"] == {"p": 0.2, "t": 0.5, "fired": False} and lane["summary"]
    second = view(done, Lane("Defended", Sasa(1, 2), sapt=Sapt()))
    assert second == first and second["lanes"][0]["tokens"] is not lane["tokens"]
    assert first["axis"] == 32 and view(answer([0.1] * 40), Lane("x"))["axis"] == 64


def test_badge_and_chips() -> None:
    assert view(answer([0.1]), Lane("x", Sasa(1, 2)), "waiting")["lanes"][0]["badge"]["p"] is None
    assert view(answer([0.1]), Lane("x", Sasa(1, 2)), "error")["lanes"][0]["badge"] is None  # it was never judged
    assert view(answer([0.1]), Lane("x", Sasa(1, 2, mode="project")))["lanes"][0]["badge"] is None
    assert view(answer([0.1]), Lane("x", revision=Revision(3)))["lanes"][0]["badge"] is None
    assert [chip["key"] for chip in chips(Lane("x", Sasa(1, 2), Revision(3), Sapt()))] == ["sasa", "revision", "sapt"]
    assert [chip["key"] for chip in chips(Lane("x"))] == ["none"]
    assert len(empty_view()["lanes"]) == 2


def test_numbers_next_to_a_threshold_stay_on_their_side_of_it() -> None:
    done = answer([0.82414], (Event("gate", 0, 0.82414, 0.8241, True), Event("check", 0, 0.82414, 0.8241, True)))
    lane = view(done, Lane("x", Sasa(1, 2), sapt=Sapt()))["lanes"][0]
    assert lane["badge"]["p"] >= lane["badge"]["t"] and lane["badge"]["fired"]
    assert lane["marks"][0]["p"] >= lane["marks"][0]["t"] and lane["harm"] == [0.82414]


def test_an_answer_that_refuses_in_its_own_words_is_shown_as_refused() -> None:
    refusal = Answer("x", 0.9)
    refusal.add(Step(0, 0, 0, 1, "I'm sorry, but I can't help with that.", 0.1, (), None, 1.0, 0.0))
    ends = ("streaming", "done", "limit", "stopped")
    shown = [view(refusal, Lane("x"), state)["lanes"][0]["state"] for state in ends]
    assert shown == ["streaming", "refused", "refused", "stopped"]
    assert view(answer([0.1]), Lane("x"), "limit")["lanes"][0]["state"] == "limit"


def live(engine: StandInEngine, prompt: str = "Hello?", host: Host | None = None) -> LiveRun:
    host = host or Host(engine)  # type: ignore[arg-type]
    return LiveRun(host, [Lane("No defense")], {}, prompt=prompt, image=None, max_new_tokens=64)


def test_a_new_run_replaces_the_visitors_old_one() -> None:
    engine, runs = StandInEngine(), Runs()
    first, other, second = (live(engine) for _ in range(3))
    runs.start("a", first)
    runs.start("b", other)
    runs.start("a", second)
    assert first.cancel.is_set() and not second.cancel.is_set() and not other.cancel.is_set()
    assert not runs.current("a", first) and runs.current("a", second)
    runs.cancel("a")
    assert second.cancel.is_set() and runs.current("a", second)
    runs.leave("a")
    runs.cancel("a")  # nothing runs: nothing happens
    assert runs.reveal("a") is None


def test_a_run_ends_with_all_its_tokens() -> None:
    updates = list(live(StandInEngine(200, 0.0)))
    assert updates[0][0]["lanes"][0]["state"] == "waiting" and updates[-1][0]["lanes"][0]["state"] == "done"
    assert updates[-1][0]["lanes"][0]["tokens"][-1] == "play. " and updates[-1][1] == ""


def test_a_stop_is_answered_in_the_middle_of_a_prefill() -> None:
    run = live(StandInEngine(200, prefill=3.0))
    updates = iter(run)
    next(updates)
    run.cancel.set()
    final, message = next(updates)
    assert final["lanes"][0]["state"] == "stopped" and message == ""
    assert next(updates, None) is None


def test_an_abandoned_run_is_cancelled() -> None:
    run = live(StandInEngine(20))
    updates = iter(run)
    next(updates)
    updates.close()  # type: ignore[attr-defined]
    assert run.cancel.is_set()


def test_runs_wait_in_line_and_see_how_many_come_first() -> None:
    engine = StandInEngine(20, prefill=0.0)
    host = Host(engine)  # type: ignore[arg-type]
    first, second = iter(live(engine, host=host)), live(engine, host=host)
    next(first)
    waiting = iter(second)
    view = next(waiting)[0]["lanes"][0]
    assert view["state"] == "queued" and "one run before yours" in view["wait"]
    first.close()  # type: ignore[attr-defined]
    views = [view["lanes"][0] for view, _ in waiting]
    assert views[-1]["state"] == "done" and engine.overlaps == 1


def test_errors_become_messages(caplog: pytest.LogCaptureFixture) -> None:
    engine = StandInEngine(200, 0.0)
    final, message = list(live(engine, " "))[-1]
    assert message.startswith("The prompt is empty") and final["lanes"][0]["state"] == "error"
    engine.fail = ZeroDivisionError("detail")
    assert list(live(engine))[-1][1] == BUG
    assert "ZeroDivisionError" in caplog.text
    engine.fail = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    final, message = list(live(engine))[-1]
    assert message == MEMORY and final["lanes"][0]["state"] == "memory"


def test_every_preset_has_its_picture_and_words() -> None:
    assert len(PRESETS) >= 6 and len({preset.key for preset in PRESETS}) == len(PRESETS)
    for preset in PRESETS:
        assert preset.prompt and preset.title and preset.teaser
        if preset.image is not None:
            assert open_image(preset.image).size[0] >= 224
            assert preset.image.stat().st_size < 40_000
    kinds = [preset.kind for preset in PRESETS]
    assert "attack" in kinds and "harmless twin" in kinds and "ordinary" in kinds
    attack, twin = (next(p for p in PRESETS if p.key == key) for key in ("attack", "twin"))
    assert attack.prompt == twin.prompt and Image.open(attack.image).size == Image.open(twin.image).size
