"""A whole calibration, as small as can be, on other architectures and number formats than the other tests' LLaVA:
every part is fitted, saved, loaded and run, and what calibration saw is what the engine sees."""

from dataclasses import replace

import pytest
import torch
from families import build
from PIL import Image
from tiny import tiny_llava

from safety.artifacts import load_artifacts
from safety.calibrate import Recipe, calibrate, material, observe, revision, sapt, sasa, soft_prompt
from safety.calibrate.progress import Progress
from safety.calibrate.trace import follow
from safety.engine import Engine
from safety.loading import load
from safety.samples import Sample

TOKENS = 6
INTERVAL = 4
RECIPE = Recipe(answer_tokens=TOKENS, false_alarms=0.2, interval=INTERVAL,
                soft=soft_prompt.Recipe(length=2, steps=2, check_every=1, batch=4, target_tokens=4))
MODELS = ("Qwen2-VL", "Qwen3-VL", "Gemma 3", "LLaVA-1.5 nf4", "LLaVA-1.5 int8")


@pytest.fixture(params=MODELS)
def lvlm(request, tmp_path):
    """A tiny random model: a family in fp32, or LLaVA as bitsandbytes quantises it from a folder."""
    if not request.param.startswith("LLaVA"):
        family = build(request.param)
        torch.manual_seed(0)  # the table's pixels differ from process to process, and with them how soon an answer ends
        family.pixels = {name: torch.randn_like(values) if values.is_floating_point() else values
                         for name, values in family.pixels.items()}
        return family
    pytest.importorskip("bitsandbytes", reason="the optional package bitsandbytes is not installed")
    tiny = tiny_llava(layers=4)
    for part in (tiny.model, tiny.processor):
        part.save_pretrained(tmp_path / "tiny")
    return load(str(tmp_path / "tiny"), request.param.split()[1])


@pytest.fixture
def samples(tmp_path, monkeypatch):
    """Requests of both labels with and without a picture; half of the answers are the model's own."""
    for module, name, least in ((revision, "DEPTHS", (0.5,)), (revision, "FIRST_LOOK", 1), (revision, "LONG_LOOK", 1),
                                (revision, "TOKENS", 2), (sasa, "QUERIES", 1), (sasa, "DEPTHS", (0.5,))):
        monkeypatch.setattr(module, name, least)
    Image.new("RGB", (28, 28), "red").save(tmp_path / "red.png")
    made = []
    for index in range(44):
        unsafe, pictured, own = index % 2 == 0, index % 6 < 3, index % 8 < 4
        made.append(Sample(f"s{index}", ("steal " if unsafe else "bake ") + str(index), "unsafe" if unsafe else "safe",
                           "", str(tmp_path / "red.png") if pictured else None, None if own else "so", "kind"))
    return made


def test_a_whole_calibration(lvlm, samples, tmp_path):
    given, held_out = samples[:40], samples[40:]
    calibrate(lvlm, given, held_out, tmp_path / "out", tmp_path / "work", recipe=RECIPE)
    artifacts = load_artifacts(lvlm, tmp_path / "out")
    assert set(artifacts.about["held_out"]) == {"none", "sasa", "revision", "sapt", "all", "sasa:mode=reading"}
    assert artifacts.settings.sasa.safety_layer >= lvlm.deepstack
    refusals = [observe.refusal_for(sample, index) if sample.unsafe else None for index, sample in enumerate(given)]
    pair, = sasa.tried_pairs(lvlm)
    seen = observe.observe(lvlm, given, refusals, [pair], tmp_path / "work" / observe.model_key(lvlm) / "samples",
                           TOKENS, Progress())
    found = material.Material(lvlm, given, seen, RECIPE, tmp_path, tmp_path)
    for index in (0, 10):  # with a picture, and without; both answered by the model itself
        assert bool(given[index].image) == (index == 0) and given[index].response is None
        sees = run_all_lanes(Engine(lvlm, artifacts), given[index], pair)
        if lvlm.quantization == "none":  # elsewhere a number depends on the shape of its batch
            logits = lvlm.logits(seen[index].tensor(f"{pair[0]}-{pair[1]}")[None])
            lesson = sapt._lesson(found, index)
            checked = soft_prompt.soft_states(lvlm, artifacts.sapt.soft, [lesson], [INTERVAL - 1])
            assert sees == {"tokens": seen[index].ids,
                            "gate": pytest.approx(artifacts.sasa.probes[pair].probability(logits).item(), abs=1e-4),
                            "harm": pytest.approx(follow(artifacts.trace, seen[index].tensor("states")), abs=1e-4),
                            "check": pytest.approx(artifacts.sapt.detectors["joint"].probability(checked).item(),
                                                   abs=2e-3)}  # keys and values are kept in 16 bits


def run_all_lanes(engine, sample, pair):
    """What the engine sees: the undefended tokens and their harm, SASA's judgement, SAPT's first check."""
    none, gate, revise, watch, every = engine.artifacts.standard_lanes("none,sasa,revision,sapt,all")
    lanes = [none, replace(gate, sasa=replace(gate.sasa, safety_layer=pair[0], fused_layer=pair[1], threshold=1.0)),
             revise, replace(watch, sapt=replace(watch.sapt, threshold=1.0)),  # looks, and never fires
             replace(every, sasa=replace(every.sasa, threshold=1.0), sapt=replace(every.sapt, threshold=0.0))]
    steps = list(engine.stream(sample.prompt, sample.image, lanes=lanes, max_new_tokens=TOKENS))
    events = {(step.lane, event.type): event for step in reversed(steps) for event in step.events}
    assert {step.lane for step in steps} == set(range(5)) and {(4, "gate"), (4, "injection")} <= set(events)
    said = [step for step in steps if step.lane == 0]
    return {"tokens": [step.token_id for step in said if step.finish != "eos"], "gate": events[1, "gate"].probability,
            "harm": [step.harm for step in said if step.finish != "eos"], "check": events[3, "check"].probability}
