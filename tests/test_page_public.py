"""Runs as the handlers take them, without a browser: the line, limits, pictures, and what a public page covers."""

import base64
import io
import threading
import time
from typing import Any

import pytest
from page_stand_in import StandInEngine
from PIL import Image

from safety.engine import Engine
from safety.errors import UserError
from safety.settings import Lane
from safety.ui import handlers as handlers_module
from safety.ui.handlers import Handlers, spec_of
from safety.ui.host import Host
from safety.ui.line import Line, RateLimit
from safety.ui.live import BUG, LiveRun
from safety.ui.mode import PRIVATE, PUBLIC, Mode, mode_of
from safety.ui.presets import PRESETS


def engine() -> Engine:
    return StandInEngine(500, 0.0)  # type: ignore[return-value]


def test_the_line_serves_in_order_and_is_bounded() -> None:
    line = Line(2)
    first, second = line.join(), line.join()
    with pytest.raises(UserError, match="2 runs are waiting"):
        line.join()
    assert first.wait(0) and not second.wait(0.01) and second.ahead == 1
    first.leave()
    assert second.wait(0) and second.ahead == 0
    second.leave()
    second.leave()  # leaving twice is no error
    assert line.join().wait(0)


def test_a_visitor_has_so_many_runs_in_so_much_time() -> None:
    now = [0.0]
    limit = RateLimit(2, 60, clock=lambda: now[0])
    limit.take("a")
    limit.take("a")
    limit.take("b")
    with pytest.raises(UserError, match="wait 60 s"):
        limit.take("a")
    now[0] = 61
    limit.take("a")
    assert set(limit._times) == {"a"}  # whoever stays away is forgotten


def test_a_space_is_public_unless_it_says_otherwise() -> None:
    assert mode_of({}) is PRIVATE and mode_of({"SPACE_ID": "a/b"}) is PUBLIC
    assert (
        mode_of({"SPACE_ID": "a/b", "DEMO_MODE": "private"}) is PRIVATE and mode_of({"DEMO_MODE": "public"}) is PUBLIC
    )
    with pytest.raises(UserError, match="DEMO_MODE"):
        mode_of({"DEMO_MODE": "open"})


class Request:
    """As much of gr.Request as the handlers read."""

    def __init__(self, session: str = "s", host: str = "9.9.9.9") -> None:
        self.session_hash, self.headers = session, {}  # type: ignore[var-annotated]
        self.client = type("Client", (), {"host": host})()


def outcome(
    handlers: Handlers, prompt: str, form: Any = None, request: Request | None = None, path: str | None = None
) -> tuple[Any, str]:
    """(last view or None, message) of a run."""
    form = form or spec_of(handlers.host)["start"]
    updates = list(handlers.run(request or Request(), path, prompt, form))  # type: ignore[arg-type]
    views = [view for view, _, _ in updates if isinstance(view, dict) and "lanes" in view]
    messages = [message for _, message, _ in updates if isinstance(message, str) and message]
    return (views[-1] if views else None), " ".join(messages)


def test_public_mode_limits_prompts_lengths_and_runs() -> None:
    handlers = Handlers(Host(engine(), Mode(True, 64, 40, runs=2, seconds=60)))
    assert "up to 40 characters" in outcome(handlers, "x" * 41)[1]
    start = spec_of(handlers.host)["start"]
    assert start["max_new_tokens"] == 64
    assert "at most 64 tokens" in outcome(handlers, "Hello?", start | {"max_new_tokens": 65})[1]
    assert outcome(handlers, "How do I kill a Python process?" + " " * 60)[1] == ""  # an example may be longer
    assert outcome(handlers, "Hello?")[1] == ""
    assert "wait" in outcome(handlers, "Hello?")[1]
    assert outcome(handlers, "Hello?", request=Request("other", "8.8.8.8"))[1] == ""
    assert handlers.counts == {"refused": 3, "runs": 3}


def test_a_prompt_that_cannot_be_asked_leaves_the_columns_alone() -> None:
    handlers = Handlers(Host(engine()))
    for prompt, words in ((" ", "prompt is empty"), ("What is <image>?", "control marker"), ("x" * 9000, "characters")):
        view, message = outcome(handlers, prompt)
        assert view is None and words in message


def test_a_run_remembers_its_example_and_a_small_copy_of_its_picture() -> None:
    handlers, preset = Handlers(Host(engine())), PRESETS[0]
    about = outcome(handlers, preset.prompt, path=str(preset.image))[0]["about"]  # type: ignore[index]
    assert about["example"] == preset.title and about["picture"].startswith("data:image/jpeg;base64,")
    small = Image.open(io.BytesIO(base64.b64decode(about["picture"].partition(",")[2])))
    assert max(small.size) == 320 and len(about["picture"]) < 40_000
    about = outcome(handlers, "Hello?")[0]["about"]  # type: ignore[index]
    assert about["example"] is None and about["picture"] is None


def test_a_link_says_what_did_not_fit() -> None:
    event: Any = type("Event", (), {"_data": {"prompt": "Hi", "dropped": ["SASA: Layers", "Seed"]}})()
    assert Handlers(Host(engine())).restore(event)[2].endswith("left as it was: SASA: Layers, Seed.")
    event._data["dropped"] = []
    assert Handlers(Host(engine())).restore(event)[2] == ""


def test_the_rate_limit_comes_before_the_picture_and_a_full_line_costs_no_run(tmp_path: Any, monkeypatch: Any) -> None:
    opened: list[str] = []
    real = handlers_module.open_image
    monkeypatch.setattr(handlers_module, "open_image", lambda path: opened.append(path) or real(path))
    picture = tmp_path / "a.png"
    Image.new("RGB", (30, 20)).save(picture)
    host = Host(engine(), Mode(True, 64, 40, runs=1, seconds=60, places=1))
    handlers, place = Handlers(host), host.line.join()
    assert "waiting already" in outcome(handlers, "Hello?", path=str(picture))[1]
    place.leave()
    assert outcome(handlers, "Hello?", path=str(picture))[1] == ""
    assert len(opened) == 2
    assert "wait" in outcome(handlers, "Hello?", path=str(picture))[1] and len(opened) == 2


def test_few_pictures_are_decoded_at_once(monkeypatch: Any) -> None:
    handlers, go = Handlers(Host(engine())), threading.Event()
    inside: list[int] = []
    monkeypatch.setattr(handlers_module, "open_image", lambda path: inside.append(1) or go.wait(10))
    threads = [threading.Thread(target=handlers.check_image, args=(Request(str(i)), "x.png")) for i in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert len(inside) == handlers_module.DECODERS
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(inside) == 5


def test_a_run_after_a_picture_that_was_refused_says_that_it_has_none(tmp_path: Any) -> None:
    handlers, broken = Handlers(Host(engine())), tmp_path / "notes.png"
    broken.write_text("this is not a picture")
    assert "could not be read" in handlers.check_image(Request(), str(broken))  # type: ignore[arg-type]
    assert "This run has no picture" in outcome(handlers, "What is this?")[1]
    assert outcome(handlers, "What is this?")[1] == ""  # once is enough
    handlers.check_image(Request(), str(broken))  # type: ignore[arg-type]
    handlers.fill(Request(), type("Event", (), {"_data": {"index": 5}})())  # type: ignore[arg-type]
    assert outcome(handlers, "What is this?")[1] == ""  # an example took its place


def test_a_bug_after_a_reveal_on_a_public_page_is_logged_without_its_message(caplog: Any) -> None:
    stand_in: Any = engine()
    stand_in.fail = ZeroDivisionError("what the visitor wrote")
    run = LiveRun(Host(stand_in, PUBLIC), [Lane("x")], {}, prompt="Hello?", image=None, max_new_tokens=8)
    run.cover = False
    assert list(run)[-1][1] == BUG
    assert "ZeroDivisionError" in caplog.text and "visitor wrote" not in caplog.text


def test_public_mode_covers_what_passes_the_alarm_until_it_is_revealed() -> None:
    handlers = Handlers(Host(engine(), PUBLIC))
    view, _ = outcome(handlers, "Make a list.", spec_of(handlers.host)["start"] | {"lanes": []})
    lane = view["lanes"][0]
    assert lane["covered"] == 22 and lane["harm"][22] >= 0.9 > lane["harm"][21]
    assert "damage" not in str(view) and set("".join(lane["tokens"][22:]).strip()) == {"▒", " "}
    assert not any(lane["others"][22:]) and lane["chances"][22:] == [None] * len(lane["chances"][22:])
    revealed = handlers.reveal(Request())  # type: ignore[arg-type]
    assert "damage" in "".join(revealed["lanes"][0]["tokens"]) and revealed["lanes"][0]["covered"] is None
    assert revealed["run"] == view["run"] and handlers.counts["reveals"] == 1
    assert not isinstance(handlers.reveal(Request("stranger")), dict) or "lanes" not in handlers.reveal(
        Request("stranger")
    )  # type: ignore[arg-type]
    handlers.leave(Request())  # type: ignore[arg-type]
    assert "lanes" not in handlers.reveal(Request())  # type: ignore[arg-type]


def test_without_a_detector_a_public_page_covers_everything_but_fixed_refusals() -> None:
    stand_in = engine()
    stand_in.artifacts.trace = None
    view, _ = outcome(Handlers(Host(stand_in, PUBLIC)), "Make a list.")
    undefended, defended = view["lanes"]
    assert undefended["covered"] == 0 and "list" not in "".join(undefended["tokens"])
    assert defended["covered"] is None and defended["state"] == "refused"


def test_a_public_page_logs_no_words(caplog: pytest.LogCaptureFixture) -> None:
    stand_in = engine()
    handlers = Handlers(Host(stand_in, PUBLIC))
    stand_in.fail = RuntimeError("quotes my secret words")  # type: ignore[attr-defined]
    with caplog.at_level("DEBUG"):
        assert "Something went wrong" in outcome(handlers, "my secret words")[1]
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("safety")]
    assert any("RuntimeError" in line for line in ours) and not any("secret" in line for line in ours)


def test_a_full_line_is_refused_with_a_sentence() -> None:
    host = Host(engine(), Mode(places=1))
    LiveRun(host, [Lane("x")], {}, prompt="Hello?", image=None, max_new_tokens=8)
    assert "waiting already" in outcome(Handlers(host), "Hello?")[1]
