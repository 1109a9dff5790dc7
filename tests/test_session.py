"""Switching models: the old one's memory is freed, and a failed load leaves it answering."""

import gc
import shutil
import threading
import time
import weakref

import pytest
from safetensors.torch import load_file, save_file
from tiny import random_artifacts, tiny_llava

from safety import loading, memory
from safety.artifacts import save_artifacts
from safety.engine import Engine
from safety.errors import UserError
from safety.loading import load
from safety.memory import Need
from safety.session import Session
from safety.settings import Lane


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny models: 6 and 7 blocks."""
    root = tmp_path_factory.mktemp("models")
    for name, layers in (("one", 6), ("two", 7)):
        lvlm = tiny_llava(layers=layers)
        lvlm.model.save_pretrained(root / name)
        lvlm.processor.save_pretrained(root / name)
    return root


@pytest.fixture
def session(folders):
    lvlm = load(str(folders / "one"), "none")
    return Session(Engine(lvlm, random_artifacts(lvlm)))


@pytest.fixture
def no_room_for_both(monkeypatch):
    """10 bytes in all, a model takes 6."""
    monkeypatch.setattr(memory, "need", lambda *_: Need(6, 6, 6, 6))
    monkeypatch.setattr(memory, "held", lambda model, device: [6])
    alive = []
    original = loading._read_model

    def read(*arguments):
        model = original(*arguments)
        alive.append(weakref.ref(model))
        return model
    monkeypatch.setattr(loading, "_read_model", read)

    def free(device):
        gc.collect()
        return [4 if any(model() is not None for model in (first, *alive)) else 10]
    monkeypatch.setattr(memory, "free_memory", free)
    first = weakref.ref  # replaced by `watch`

    def watch(model):
        nonlocal first
        first = weakref.ref(model)
    return watch


def say(engine):
    return engine.answer("Hi", lanes=[Lane("none")], max_new_tokens=6)[0].text


def test_the_new_model_answers_and_the_old_one_is_gone(session, folders):
    old, before = weakref.ref(session.engine.lvlm.model), say(session.engine)
    lines = []
    engine = session.switch(str(folders / "two"), "none", progress=lines.append)
    assert session.engine is engine and engine.lvlm.blocks == 7 and say(engine) != before
    assert old() is None
    assert len(lines) == 1 and lines[0].startswith("Loading two in none")
    assert engine.artifacts.revision is None  # nothing in the project fits it


def test_artifacts_of_the_new_model_come_with_it_or_stop_the_switch(session, folders, tmp_path, monkeypatch):
    two = load(str(folders / "two"), "none")
    save_artifacts(random_artifacts(two), two, tmp_path / "two" / "defenses")
    first = session.engine
    with pytest.raises(UserError, match="blocks is 7 there and 6 here"):
        session.switch(str(folders / "one"), "none", artifacts=tmp_path / "two" / "defenses")
    assert session.engine is first and say(first)
    monkeypatch.setattr("safety.artifacts.SHIPPED", tmp_path)
    assert session.switch(str(folders / "two"), "none").artifacts.sasa is not None


def test_a_failed_load_leaves_the_old_model_answering(session, folders):
    engine, before = session.engine, say(session.engine)
    for name in (str(folders / "nowhere"), str(folders)):
        with pytest.raises(UserError):
            session.switch(name)
        assert session.engine is engine and say(engine) == before


def test_without_room_for_both_the_old_model_is_gone_before_the_new_one_comes(session, folders, no_room_for_both):
    no_room_for_both(session.engine.lvlm.model)
    engine, lines = session.engine, []
    session.switch(str(folders / "two"), "none", progress=lines.append)
    assert lines[0] == "Making room for two …" and session.engine.lvlm.blocks == 7
    assert engine.lvlm.closed
    with pytest.raises(UserError, match="one was unloaded for another model"):
        say(engine)


def test_without_room_for_both_a_failed_load_brings_the_old_model_back(session, folders, tmp_path, no_room_for_both):
    broken = shutil.copytree(folders / "two", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.popitem()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    engine, before, lines, told = session.engine, say(session.engine), [], []
    locked, reopen = [], engine.lvlm.open
    engine.lvlm.open = lambda model: (locked.append(engine.lvlm.lock.locked()), reopen(model))
    no_room_for_both(engine.lvlm.model)

    def progress(line):
        lines.append(line)
        if line.startswith("Loading"):  # a run that waited gets its turn now
            with pytest.raises(UserError) as refused:
                say(engine)
            told.append(str(refused.value))

    with pytest.raises(UserError, match="broken is incomplete"):
        session.switch(str(broken), "none", progress=progress)
    # Nothing has been replaced, and nothing will be: what the run is told holds whether the other model comes or not.
    assert told == ["one was unloaded for another model before this run began. Run it again as soon as a "
                    "model is ready."]
    assert [line.split(" (")[0] for line in lines] == ["Making room for broken …", "Loading broken in none",
                                                       "Going back to one …"]
    assert session.engine is engine and say(engine) == before
    assert locked == [True]  # a run that starts at that moment waits


def test_without_room_for_both_artifacts_that_do_not_fit_bring_the_old_model_back(
        session, folders, tmp_path, no_room_for_both):
    save_artifacts(session.engine.artifacts, session.engine.lvlm, tmp_path / "defenses")
    engine, before = session.engine, say(session.engine)
    no_room_for_both(engine.lvlm.model)
    with pytest.raises(UserError, match="blocks is 6 there and 7 here"):
        session.switch(str(folders / "two"), "none", artifacts=tmp_path / "defenses")
    assert session.engine is engine and say(engine) == before


def test_when_the_old_model_cannot_come_back_another_one_still_can(session, folders, tmp_path, no_room_for_both):
    for name in ("broken", "gone"):
        shutil.copytree(folders / "one", tmp_path / name)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    session.engine.lvlm.source = str(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    no_room_for_both(session.engine.lvlm.model)
    with pytest.raises(UserError, match=r"broken could not be loaded .* And one could not be loaded again: .* Restart"):
        session.switch(str(tmp_path / "broken"), "none")
    assert session.engine.lvlm.closed
    session.switch(str(folders / "two"), "none")
    assert say(session.engine)


def test_a_running_stream_ends_first_and_a_second_switch_is_turned_away(session, folders):
    stream = session.engine.stream("Hi", lanes=[Lane("none")], max_new_tokens=6)
    next(stream)
    switching = threading.Thread(target=session.switch, args=(str(folders / "two"), "none"))
    switching.start()
    while not session._switching.locked():
        time.sleep(0.01)
    with pytest.raises(UserError, match="Another model is being loaded already"):
        session.switch(str(folders / "two"))
    assert len(list(stream)) == 5  # to its end, on the old model
    switching.join(30)
    assert session.engine.lvlm.blocks == 7
