"""SASA's mode "reading" (ours): the picture's words, judged as though somebody had typed them."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import Oracle
from PIL import Image
from tiny import random_artifacts, tiny_llava

from safety import reading
from safety.engine import Engine, Request
from safety.errors import UserError
from safety.reading import words_read
from safety.settings import Lane, Sasa

PICTURES = [Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8))
            for seed in range(2)]
READING = Lane("reading", sasa=Sasa(1, 3, threshold=1.0, mode="reading"))


@pytest.fixture(scope="module")
def engine():
    lvlm = tiny_llava()
    return Engine(lvlm, random_artifacts(lvlm))


def gates(engine, requests, lanes=(READING,)):
    """[request][lane]: SASA's event."""
    return [[next(event for event in answer.events if event.type == "gate") for answer in answers]
            for answers in engine.answer_batch(requests, lanes=list(lanes), max_new_tokens=2)]


@pytest.mark.parametrize(("answer", "words"), [
    ('It says: "steps to bake bread. 1. 2. 3."', "steps to bake bread."),
    ("The text reads: \u201csteps to bake bread.\u201d", "steps to bake bread."),
    ('It says: "steps to bake', "steps to bake"),  # cut off
    ('It says: "a "good" loaf"', 'a "good" loaf'),
    ("a red circle", "a red circle"), ("Room 12.", "Room 12."), ("1.\n2.", ""), ("", ""),
    ('The image says: "what is in the picture?"', ""), ("What is in the picture? A", "What is in the picture? A"),
    ("steps <image> to <eos>bake", "steps   to  bake")])
def test_the_words_of_an_answer(answer, words):
    assert words_read(answer, ["<image>", "<eos>"]) == words


def test_every_picture_of_a_batch_is_judged_by_its_own_words(engine):
    requests = [Request("What is it?", PICTURES[0]), Request("Why?"), Request("And here?", PICTURES[1])]
    for (event,), request in zip(gates(engine, requests), requests, strict=True):
        oracle = Oracle(engine.lvlm, engine.artifacts, request.prompt, request.image).run(READING, 2, [])
        assert event.read == oracle.words
        assert event.probability == pytest.approx(oracle.gate, abs=1e-4)
        assert bool(event.positions) == (request.image is not None)
    assert gates(engine, requests[:1])[0][0].read != gates(engine, requests[2:])[0][0].read


def test_where_nothing_is_read_the_prompt_alone_is_judged(engine, monkeypatch):
    for module in ("safety.reading", "oracle"):
        monkeypatch.setattr(f"{module}.words_read", lambda *_: "")
    (event,), = gates(engine, [Request("What is it?", PICTURES[0])])
    oracle = Oracle(engine.lvlm, engine.artifacts, "What is it?", PICTURES[0]).run(READING, 2, [])
    assert event.read == "" and event.probability == pytest.approx(oracle.gate, abs=1e-4)
    typed, = reading.type_out(engine.lvlm, ["What is it?"], PICTURES[:1])
    assert len(typed.inputs) == 1  # one state, not the same one three times


def test_only_a_lane_that_reads_has_the_picture_read_and_once_for_all(engine, monkeypatch):
    looks = []
    monkeypatch.setattr(reading, "undefended", lambda *args: looks.append(1) or [[70, 71]])
    gate = Lane("gate", sasa=Sasa(1, 3, threshold=1.0))
    requests = [Request("What is it?", PICTURES[0])]
    assert [event.read for event in gates(engine, requests, [gate])[0]] == [""] and not looks
    events = gates(engine, requests, [gate, READING, replace(READING, name="again")])[0]
    assert len(looks) == 1 and [bool(event.read) for event in events] == [False, True, True]
    assert events[1].probability == events[2].probability != events[0].probability


def test_a_picture_that_shows_control_markers_is_judged_all_the_same(engine, monkeypatch):
    ids = engine.lvlm.tokenizer("see < image>", add_special_tokens=False)["input_ids"]
    ids = [token for token in ids if token != engine.lvlm.tokenizer(" ", add_special_tokens=False)["input_ids"][0]]
    assert engine.lvlm.text(ids) == "see<image>"
    monkeypatch.setattr(reading, "undefended", lambda *args: [ids])
    (event,), = gates(engine, [Request("What is it?", PICTURES[0])])
    assert event.read == "see"


def test_a_long_prompt_is_judged_as_far_as_a_prompt_may_go(engine, monkeypatch):
    monkeypatch.setattr(reading, "MAX_CHARACTERS", len("words\nis it"))
    whole, cut = (reading.as_text(engine.lvlm, "words", prompt) for prompt in ("is it", "is it so"))
    assert torch.equal(cut[2]["input_ids"], whole[2]["input_ids"])
    assert cut[1]["input_ids"].shape[1] > whole[1]["input_ids"].shape[1]


def test_a_cancelled_reading_ends_the_run_and_frees_the_model(engine):
    cancel = threading.Event()
    handle = engine.lvlm.layers[0].register_forward_hook(lambda *a: cancel.set())  # while the picture is read
    try:
        assert list(engine.stream("What is it?", PICTURES[0], lanes=[READING], cancel=cancel)) == []
    finally:
        handle.remove()
    assert not engine.lvlm.lock.locked()


def test_without_a_probe_for_it_the_mode_is_refused(engine):
    artifacts = replace(engine.artifacts, sasa=replace(engine.artifacts.sasa, reading=None))
    with pytest.raises(UserError, match='no probe for the mode "reading"'):
        Engine(engine.lvlm, artifacts).answer("Why?", lanes=[READING])


def test_its_probe_and_threshold_are_stored(engine):
    stored = replace(engine.artifacts.sasa, thresholds={"reading": 0.7, "clean": 0.4}).tensors()
    again = type(engine.artifacts.sasa).read(stored, engine.lvlm)
    assert torch.equal(again.reading.weight, engine.artifacts.sasa.reading.weight)
    assert again.threshold(READING.sasa) == 0.7 and again.pairs == engine.artifacts.sasa.pairs
