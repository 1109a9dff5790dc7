"""Every supported family: all defenses through the engine, equal to the oracle, on its real architecture."""

import pytest
from families import FAMILIES, build
from oracle import Oracle
from PIL import Image
from tiny import random_artifacts

from safety.engine import Engine
from safety.errors import UserError
from safety.lvlm import CHECKED
from safety.settings import Lane, Revision, Sapt, Sasa

LANES = [
    Lane("none"),
    Lane("gate", sasa=Sasa(2, 4, threshold=1.0)),
    Lane("project", sasa=Sasa(2, 4, mode="project")),
    Lane("revision", revision=Revision(3, alpha=0.7)),
    Lane("sapt", sapt=Sapt(interval=4, threshold=0.0)),
    Lane("all", Sasa(2, 4, mode="project"), Revision(3, 0.4, "layer", positions="all"), Sapt(0.0, 6)),
]
READING = Lane("reading", sasa=Sasa(2, 4, threshold=1.0, mode="reading"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_lane_equals_the_oracle_with_an_image_and_then_without(family):
    lvlm = build(family)
    engine = Engine(lvlm, random_artifacts(lvlm))
    for picture in (Image.new("RGB", (56, 56)), None):
        tokens = assert_like_oracle(engine, picture, LANES)
        assert len({tuple(row) for row in tokens}) >= 4  # the lanes do differ
        assert_like_oracle(engine, picture, [READING])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_that_is_read_is_encoded_once(family):
    lvlm = build(family)
    engine = Engine(lvlm, random_artifacts(lvlm))
    base = lvlm.model.base_model
    encode, encoded = type(base).get_image_features, []

    def counted(self, *args, **kwargs):
        encoded.append(1)
        return encode(self, *args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(base), "get_image_features", counted)
        for picture in (Image.new("RGB", (56, 56)), Image.new("RGB", (56, 56), "red")):
            engine.answer("Tell me", picture, lanes=[READING], max_new_tokens=2)
        assert len(encoded) == 2
        engine.answer("Tell me", picture, lanes=[READING], max_new_tokens=2)
        assert len(encoded) == 3  # nothing is kept from one run to the next
    assert "get_image_features" not in vars(base)


def test_the_architectures_that_are_said_to_be_checked_are_those_checked_here():
    assert {model_type for model_type, *_ in FAMILIES.values()} == CHECKED


def test_sasa_keeps_out_of_deepstack_blocks():
    lvlm = build("Qwen3-VL")
    engine = Engine(lvlm, random_artifacts(lvlm))
    with pytest.raises(UserError, match="at least 2"):
        next(engine.stream("Tell me", None, lanes=[Lane("l", sasa=Sasa(1, 3))]))


def assert_like_oracle(engine, picture, lanes):
    tokens = [[] for _ in lanes]
    gates = []
    for step in engine.stream("Tell me", picture, lanes=lanes, max_new_tokens=12):
        tokens[step.lane].append(step.token_id)
        gates += [event.probability for event in step.events if event.type == "gate"]
    for lane, got in zip(lanes, tokens, strict=True):
        oracle = Oracle(engine.lvlm, engine.artifacts, "Tell me", picture).run(lane, 12, [])
        assert got == oracle.tokens, lane.name
        if oracle.gate is not None:
            assert gates == [pytest.approx(oracle.gate, abs=1e-4)]
    return tokens
