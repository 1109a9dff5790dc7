"""The page's parts without a browser: controls to lanes, views, cancelling, presets, the command line of app.py."""

import json
import socket
import threading
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from page_stand_in import StandInEngine
from PIL import Image

import app
from safety.engine import Answer, Event, Step
from safety.errors import UserError
from safety.inputs import open_image
from safety.settings import Lane, Revision, Sapt, Sasa
from safety.ui.board import chips, empty_view, view_of
from safety.ui.controls import Form, lanes_of, length_of, sampling_of
from safety.ui.live import BUG, LiveRun, Runs
from safety.ui.page import build_page
from safety.ui.presets import PRESETS
from safety.ui.theme import launch_options

FORM: dict[str, Any] = dict(
    sasa=True, sasa_mode="gate", sasa_strength=1.0, sasa_threshold=0.5, sasa_pair="13-15",
    revision=True, revision_alpha=2.0, revision_layer=19, revision_level="head",
    sapt=True, sapt_threshold=0.9, sapt_interval=16, sapt_end_check=True,
    separate=False, max_new_tokens=64, temperature=0, top_p=1, seed=0,
)  # fmt: skip


def lanes(**changes: Any) -> list[Lane]:
    return lanes_of(Form(**(FORM | changes)), StandInEngine())  # type: ignore[arg-type]


def test_defenses_share_one_lane_or_get_one_each() -> None:
    undefended, defended = lanes()
    assert undefended == Lane("No defense")
    assert defended == Lane("Defended", Sasa(13, 15), Revision(19), Sapt())
    separate = lanes(separate=True)
    assert [lane.name for lane in separate] == ["No defense", "SASA", "Revision", "SAPT", "All together"]
    assert separate[2] == Lane("Revision", revision=Revision(19))
    assert [lane.name for lane in lanes(separate=True, revision=False, sapt=False)] == ["No defense", "SASA"]
    assert lanes(sasa=False, revision=False, sapt=False) == [Lane("No defense")]


def test_controls_reach_the_settings() -> None:
    lane = lanes(sasa_mode="project", sasa_strength=0.5, sasa_pair="12-14", revision_level="layer", sapt_interval=4)[1]
    assert lane.sasa == Sasa(12, 14, strength=0.5, mode="project")
    assert lane.revision is not None and lane.revision.level == "layer"
    assert lane.sapt is not None and lane.sapt.interval == 4


@pytest.mark.parametrize(
    "changes", [{"sasa_pair": "x"}, {"sasa_threshold": None}, {"revision_layer": 1.5}, {"sapt_interval": float("nan")}]
)
def test_broken_values_get_a_sentence(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        lanes(**changes)


def test_broken_sampling_gets_a_sentence() -> None:
    with pytest.raises(UserError, match="Seed"):
        sampling_of(Form(**(FORM | {"seed": None})))
    with pytest.raises(UserError, match="new tokens"):
        length_of(Form(**(FORM | {"max_new_tokens": ""})))


def components(page: gr.Blocks) -> list[dict[str, Any]]:
    return [item["props"] for item in page.get_config_file()["components"]]


def test_a_defense_without_artifacts_is_disabled_with_the_reason() -> None:
    engine = StandInEngine()
    engine.artifacts.sasa = engine.artifacts.settings.sasa = None
    found = {str(props.get("label")): props for props in components(build_page(engine))}  # type: ignore[arg-type]
    assert found["SASA"]["interactive"] is False and found["SASA"]["value"] is False
    assert "no calibrated SASA" in found["SASA"]["info"] and "calibrate" in found["SASA"]["info"]
    assert found["SAPT"]["interactive"] is True
    with pytest.raises(UserError, match="SASA"):
        lanes_of(Form(**FORM), engine)  # type: ignore[arg-type]


def test_bounds_come_from_the_model_and_artifacts() -> None:
    found = {str(props.get("label")): props for props in components(build_page(StandInEngine()))}  # type: ignore[arg-type]
    assert (found["Layer"]["minimum"], found["Layer"]["maximum"], found["Layer"]["value"]) == (8, 24, 19)
    assert [value for _, value in found["Layers"]["choices"]] == ["12-14", "13-15", "16-20"]


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
    assert view(answer([0.1]), Lane("x", Sasa(1, 2, mode="project")))["lanes"][0]["badge"] is None
    assert view(answer([0.1]), Lane("x", revision=Revision(3)))["lanes"][0]["badge"] is None
    assert [chip["key"] for chip in chips(Lane("x", Sasa(1, 2), Revision(3), Sapt()))] == ["sasa", "revision", "sapt"]
    assert [chip["key"] for chip in chips(Lane("x"))] == ["none"]
    assert len(empty_view()["lanes"]) == 2


def test_a_new_run_replaces_the_visitors_old_one() -> None:
    runs = Runs()
    first = runs.start("a")
    other = runs.start("b")
    second = runs.start("a")
    assert first.is_set() and not second.is_set() and not other.is_set()
    assert runs.replaced("a", first) and not runs.replaced("a", second)
    runs.forget("a", first)
    runs.cancel("a")
    assert second.is_set() and not runs.replaced("a", second)
    runs.forget("a", second)
    runs.cancel("a")  # nothing runs: nothing happens


def live(engine: StandInEngine, prompt: str = "Hello?") -> tuple[LiveRun, threading.Event]:
    cancel = threading.Event()
    run = LiveRun(engine, [Lane("No defense")], cancel, prompt=prompt, image=None, max_new_tokens=64)  # type: ignore[arg-type]
    return run, cancel


def test_a_run_ends_with_all_its_tokens() -> None:
    updates = list(live(StandInEngine(200, 0.0))[0])
    assert updates[0][0]["lanes"][0]["state"] == "waiting" and updates[-1][0]["lanes"][0]["state"] == "done"
    assert updates[-1][0]["lanes"][0]["tokens"][-1] == "play. " and updates[-1][1] == ""


def test_a_stop_is_answered_in_the_middle_of_a_prefill() -> None:
    run, cancel = live(StandInEngine(200, prefill=3.0))
    updates = iter(run)
    next(updates)
    cancel.set()
    final, message = next(updates)
    assert final["lanes"][0]["state"] == "stopped" and message == ""
    assert next(updates, None) is None


def test_an_abandoned_run_is_cancelled() -> None:
    run, cancel = live(StandInEngine(20))
    updates = iter(run)
    next(updates)
    updates.close()  # type: ignore[attr-defined]
    assert cancel.is_set()


def test_errors_become_messages(caplog: pytest.LogCaptureFixture) -> None:
    engine = StandInEngine(200, 0.0)
    final, message = list(live(engine, " ")[0])[-1]
    assert message.startswith("The prompt is empty") and final["lanes"][0]["state"] == "error"
    engine.fail = ZeroDivisionError("detail")
    assert list(live(engine)[0])[-1][1] == BUG
    assert "ZeroDivisionError" in caplog.text


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


@pytest.mark.parametrize("port", ["0", "99999", "-1", "http", "", "７８６０"])
def test_app_rejects_what_is_no_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([f"--port={port}"]) == 2
    assert "--port must be a number from 1 to 65535" in capsys.readouterr().err


def test_app_says_when_the_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert app.main(["--port", str(taken.getsockname()[1])]) == 2
    assert "Another program may use that port" in capsys.readouterr().err


def test_app_says_when_the_host_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--host", "no.such.host.invalid"]) == 2
    assert "is not an address" in capsys.readouterr().err


def test_app_prints_a_sentence_when_loading_fails(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any, **__: Any) -> SimpleNamespace:
        raise UserError("The model was not found: check its name.")

    monkeypatch.setattr("safety.loading.load", refuse)
    assert app.main(["--port", "18765", "--model", "nobody/nothing"]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.strip() == "The model was not found: check its name." and "Loading nobody/nothing" in captured.out
    )
