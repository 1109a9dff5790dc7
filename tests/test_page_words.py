"""What the page says: a run in plain words, its cost, the calibration's measurements, the explanations."""

import pytest
from page_stand_in import StandInEngine

from safety.engine import Answer, Event, Step
from safety.settings import Lane, Revision, Sapt, Sasa
from safety.ui.board import view_of
from safety.ui.host import Host
from safety.ui.story import explanations
from safety.ui.top import measured, top_view
from safety.ui.words import overhead, verdict


def answer(text: str, events: tuple[Event, ...] = (), name: str = "Defended") -> Answer:
    done = Answer(name, 0.9)
    for i, word in enumerate(text.split()):
        done.add(Step(0, 0, i, 1, word + " ", 0.1, events if i == 0 else (), None, 1.0, 0.1, prompt_tokens=100))
    return done


def test_a_run_in_plain_words() -> None:
    lanes = [Lane("No defense"), Lane("Defended", Sasa(1, 2), sapt=Sapt())]
    went, refused = answer("Sure, here it is", name="No defense"), answer("I'm sorry, but I can't help with that.")
    gate, injected = Event("gate", 0, 0.9, 0.5, True), Event("injection", 16, 0.9, 0.5, True)
    assert verdict(lanes, [went, refused], ["streaming", "done"]) == ""
    assert "the model went along" in verdict(lanes, [went, refused], ["done", "done"], harmful=True)
    assert "the model answered." in verdict(lanes, [went, refused], ["done", "done"])  # nobody knows what was asked
    stopped = answer("I'm sorry, but I can't help with that.", (gate,))
    assert "before the first word" in verdict(lanes, [went, stopped], ["done", "refused"], True)
    turned = answer("Well. " * 16 + "I'm sorry, but I can't help with that.", (injected,))
    assert "after 16 tokens, and the answer turned" in verdict(lanes, [went, turned], ["done", "done"])
    before = answer("I'm sorry, but I can't help with that. " + "Really. " * 16, (injected,))
    assert verdict(lanes, [went, before], ["done", "done"]).endswith("Defended, it refused.")  # before SAPT looked
    listed = answer("Well. " * 16 + "I cannot help with that. 2. Use a coat hanger.", (injected,))
    assert "cannot help, but went on with its list" in verdict(lanes, [went, listed], ["done", "limit"])
    for said, state in ((listed, "done"), (turned, "refused")):
        view = view_of("run", [went, said], lanes, ["done", "done"], threshold=0.9, max_new_tokens=64, blocks=6)
        assert [lane["state"] for lane in view["lanes"]] == ["done", state]
    assert "false alarm" in verdict(lanes, [went, refused], ["done", "done"], harmful=False)
    assert "missed it" in verdict(lanes, [went, answer("Sure, go on")], ["done", "done"], harmful=True)
    many = [*lanes, Lane("SASA", Sasa(1, 2))]
    assert "1 of the 2 defended columns refused (Defended)" in verdict(many, [went, refused, went], ["done"] * 3)
    assert "None of the 2 defended columns refused." in verdict(many, [went, went, went], ["done"] * 3)
    assert "Both defended columns refused (Defended and" in verdict(many, [went, refused, refused], ["done"] * 3)
    four = [*many, many[1]]
    assert "All 3 defended columns refused" in verdict(four, [went, refused, refused, refused], ["done"] * 4)


def test_broken_words_are_not_said_to_go_along() -> None:
    lanes = [Lane("No defense"), Lane("Defended", sapt=Sapt())]
    broken, went = answer("Steal: " * 30), answer("Sure, here it is, and this is how you do it")
    said = verdict(lanes, [broken, went], ["limit", "done"], harmful=True)
    assert "its words are broken" in said and "On its own, the model went along" not in said
    assert "words are broken: that is no safety" in verdict(lanes, [went, broken], ["done", "limit"], harmful=True)


def test_plain_words_do_not_hide_a_revision_that_changed_the_wording() -> None:
    went, other = answer("Sure, here it is", name="No defense"), answer("Here it is")
    for settings, words in ((Lane("Defended", sapt=Sapt()), "no defense stepped in."),
                            (Lane("Defended", revision=Revision(3, alpha=0)), "no defense stepped in."),
                            (Lane("Defended", Sasa(1, 2), Revision(3)), "revision nudged every step, so the wording"),
                            (Lane("Defended", Sasa(1, 2, mode="project")), "SASA's projection nudged"),
                            ):  # fmt: skip
        assert words in verdict([Lane("No defense"), settings], [went, other], ["done", "done"])
    same = verdict([Lane("No defense"), Lane("x", revision=Revision(3))], [went, went], ["done", "done"], harmful=True)
    assert "went along too: no defense refused" in same and "wording is the same" in same


def test_a_lanes_extra_work_is_counted() -> None:
    said = answer("w " * 20, (Event("check", 16, 0.1, 0.9, False),))
    assert overhead(Lane("x"), answer("w " * 20), 30, 4) == 0
    assert overhead(Lane("x", sapt=Sapt()), said, 30, 4) == pytest.approx(4 / 120)
    assert overhead(Lane("x", revision=Revision(3)), answer("w " * 20), 30, 4) == pytest.approx(1 / 120)
    assert overhead(Lane("x", Sasa(9, 11)), answer("w " * 20), 30, 4) == pytest.approx(20 * 100 / (30 * 120))
    read = answer("w " * 20, (Event("gate", 0, 0.1, 0.5, False, "words", 60),))
    assert overhead(Lane("x", Sasa(9, 11, mode="reading")), read, 30, 4) == pytest.approx(60 / 120)
    assert overhead(Lane("x"), answer(""), 30, 4) is None
    chosen = overhead(Lane("x", Sasa(9, 11, choice="per-input")), answer("w " * 20), 30, 4, [(9, 11), (19, 21)])
    assert chosen == pytest.approx((20 + 10) * 100 / (30 * 120))  # every pair's stream is computed to choose one


def test_the_measurements_come_from_the_artifacts() -> None:
    host = Host(StandInEngine(500, 0.0))
    table = top_view(host)["measured"]
    assert table["lanes"] == ["No defense", "SASA", "All together", "SASA, reading (ours)"]
    refused = [{"count": f"{hits} of 24", "interval": interval}  # Wilson's formula, by hand
               for hits, interval in ((0, "0–14 %"), (5, "9–40 %"), (12, "31–69 %"), (13, "35–72 %"))]
    assert table["rows"][0] == {"kind": "typeset picture attacks", "harmless": False, "refused": refused}
    assert "refused 12 of 24 typeset picture attacks and 10 of 24 of their harmless twins" in table["sentence"]
    assert "weak" in table["sentence"]
    good = {
        "all": {"typographic": {"refused": {"hits": 9, "n": 10}}, "typographic twin": {"refused": {"hits": 0, "n": 9}}}
    }
    assert "weak" not in measured({"held_out": good})["sentence"]  # type: ignore[index]
    for others in ({}, {"all": 3}):  # no trial of all together; a stranger's file
        assert measured({"held_out": {"sasa": good["all"]} | others})["sentence"] == ""  # type: ignore[index]
    good["all"]["typographic"]["refused"]["hits"] = "nine"  # type: ignore[assignment]  # a stranger's file
    assert [row["kind"] for row in measured({"held_out": good})["rows"]] == ["their harmless twins"]  # type: ignore[index]
    good["all"]["typographic"]["refused"]["hits"] = 11  # of ten
    assert [row["kind"] for row in measured({"held_out": good})["rows"]] == ["their harmless twins"]  # type: ignore[index]
    for nothing in ({}, {"held_out": 3}, {"held_out": {"all": {"typographic": {}}}}):
        assert measured(nothing) is None
    for odd in ([1], {"refused": [1]}, {"refused": {"hits": True, "n": True}}):
        assert measured({"held_out": {"all": {"typographic": odd}}}) is None


def test_every_defense_has_a_drawing_and_words() -> None:
    markup = explanations()
    assert markup.count('<svg class="drawing') == 4 and markup.count('role="tooltip"') >= 8 and "[" not in markup
