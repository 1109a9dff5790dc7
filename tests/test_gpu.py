"""What only a CUDA device can show. Everything else is tested on the CPU."""

import gc

import pytest
import torch
from PIL import Image
from test_engine import LANES, assert_like_oracle, run
from tiny import random_artifacts, tiny_llava
from torch import nn

from safety.engine import Engine
from safety.int4 import GROUP, Int4Linear
from safety.loading import load
from safety.session import Session
from safety.settings import Lane

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.fixture(scope="module")
def engine():
    lvlm = tiny_llava()
    lvlm.open(lvlm.model.to("cuda"))
    return Engine(lvlm, random_artifacts(lvlm))


@pytest.mark.parametrize("name", LANES)
def test_every_defense_is_like_the_oracle(engine, name):
    assert engine.lvlm.device.type == "cuda"
    none, defended = run(engine, [LANES["none"], LANES[name]])
    assert_like_oracle(engine, LANES["none"], none)
    assert_like_oracle(engine, LANES[name], defended)


@pytest.mark.parametrize("rows", [1, 4, 37])
def test_the_4_bit_kernel_multiplies_by_what_it_was_given(rows):
    torch.manual_seed(0)
    plain = nn.Linear(256, 96, bias=True).to("cuda", torch.bfloat16)
    groups = plain.weight.detach().float().view(96, -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    rounded = (((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low).view(96, 256)
    x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    expected = x.float() @ rounded.T + plain.bias.float()
    found = Int4Linear(plain)(x).float()
    assert (found - expected).norm() / expected.norm() < 0.01


def test_a_switch_of_models_gives_the_old_ones_memory_back(tmp_path):
    for name, layers in (("one", 6), ("two", 7)):
        lvlm = tiny_llava(layers=layers, width=512, heads=8)
        lvlm.model.save_pretrained(tmp_path / name)
        lvlm.processor.save_pretrained(tmp_path / name)

    def held():
        gc.collect()
        return torch.cuda.memory_allocated()
    before = held()
    session = Session(Engine(lvlm := load(str(tmp_path / "one"), "none"), random_artifacts(lvlm)))
    one = held() - before
    del lvlm
    session.switch(str(tmp_path / "two"), "none")
    two = held() - before
    assert one > 50e6 and one < two < 1.4 * one  # 7 blocks instead of 6, not 13
    session.switch(str(tmp_path / "one"), "none")
    assert held() - before == pytest.approx(one, rel=0.02)


def test_nf4_and_int8_answer_in_every_lane(tmp_path):
    lvlm = tiny_llava()
    lvlm.model.save_pretrained(tmp_path / "tiny")
    lvlm.processor.save_pretrained(tmp_path / "tiny")
    for quantization in ("nf4", "int8"):
        loaded = load(str(tmp_path / "tiny"), quantization)
        assert loaded.device.type == "cuda"
        lanes = [Lane("none"), LANES["revision heads"], LANES["sapt fires"], LANES["all three"]]
        answers = Engine(loaded, random_artifacts(loaded)).answer("Hi", Image.new("RGB", (40, 30), "red"), lanes=lanes,
                                                                  max_new_tokens=12)
        assert all(answer.text for answer in answers) and len({answer.text for answer in answers}) > 1
