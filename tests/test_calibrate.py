"""Calibration: its pieces on numbers whose answer is known, and the whole command on a tiny model."""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_llava

from safety.artifacts import Artifacts, load_artifacts
from safety.calibrate import activations, layers, run, soft_prompt, vectors
from safety.detector import fit_probe
from safety.engine import Engine
from safety.errors import UserError
from safety.samples import Sample, read_samples, write_samples
from safety.statistics import conformal_threshold, rate


@pytest.fixture(scope="module")
def lvlm():
    return tiny_llava()


@pytest.mark.parametrize("pca", [None, 4])
def test_a_folded_probe_equals_the_scikit_learn_pipeline(pca):
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 40)
    x = rng.normal(3, 2, (80, 12)) + y[:, None] * np.linspace(0, 1.5, 12)
    steps = [StandardScaler(), *([PCA(pca, random_state=0)] if pca else []),
             LogisticRegression(C=1.0, max_iter=2000, class_weight="balanced")]
    expected = make_pipeline(*steps).fit(x, y).predict_proba(x)[:, 1]
    probe = fit_probe(x, y, pca=pca)
    assert np.allclose(probe.probability(torch.tensor(x, dtype=torch.float32)).numpy(), expected, atol=1e-4)


def test_revision_vectors_point_from_unsafe_to_safe_and_rank_the_telling_head():
    generator = torch.Generator().manual_seed(0)
    safe_layers, unsafe_layers = (torch.randn(60, 3, 8, generator=generator) for _ in range(2))
    safe_heads, unsafe_heads = (torch.randn(60, 3, 4, 2, generator=generator) for _ in range(2))
    safe_layers[:, 1, 5] += 4  # safe answers have more of feature 5 at block 1 …
    safe_heads[:, 2, 3, 0] += 4  # … and head 3 of block 2 tells them apart
    artifact = vectors.fit_revision(safe_layers, unsafe_layers, safe_heads, unsafe_heads)
    for kind in ("mms", "pwd"):
        assert artifact.vector("layer", kind, 1).argmax() == 5
        assert artifact.vector("layer", kind, 1)[5] > 2
        assert artifact.vector("head", kind, 2)[3, 0] > 2
    assert torch.allclose(artifact.vector("layer", "mms", 1), safe_layers[:, 1].mean(0) - unsafe_layers[:, 1].mean(0))
    assert artifact.accuracy.flatten().argmax() == 2 * 4 + 3
    assert artifact.scale("head", "mms", 2)[3] == pytest.approx(2.2, abs=0.5)  # two unit normals, 4 apart


def test_answer_activations_equal_a_plain_forward_pass(lvlm):
    image = Image.new("RGB", (30, 30), "red")
    inputs = lvlm.prepare("Hi", image, 8)
    ids = lvlm.tokenizer("yes", add_special_tokens=False)["input_ids"]
    path = Path("unused")
    features = activations.read(lvlm, "Hi", None, "yes")
    text_inputs = lvlm.prepare("Hi", None, 8)
    whole = torch.cat([text_inputs["input_ids"], torch.tensor([ids])], 1)
    with torch.no_grad():
        output = lvlm.model(input_ids=whole, output_hidden_states=True)
    assert torch.allclose(features.layers[2], output.hidden_states[3][0, -1], atol=1e-5)
    logits = lvlm.logits(features.states)
    assert features.states.shape == (3, lvlm.width)
    assert torch.allclose(logits, output.logits[0, -4:-1].float(), atol=1e-4)
    assert inputs["input_ids"].shape[1] > text_inputs["input_ids"].shape[1] and not path.exists()


def test_head_importance_sees_a_head_that_matters(lvlm):
    angles = layers.head_importance(lvlm, ["How?", "Tell me why it rains", "A", "What now, then?"])
    assert angles.shape == (6, 4)
    assert (angles >= 0).all() and (angles <= 90).all() and angles.max() > 0
    with torch.no_grad():  # a head whose output is not used cannot matter
        weight = lvlm.attention_output(1).weight
        kept = weight.clone()
        weight[:, 16:32] = 0
        silenced = layers.head_importance(lvlm, ["How?", "Tell me why it rains", "A", "What now, then?"])
        weight.copy_(kept)
    assert silenced[1, 1] < 0.05 <= angles[1, 1]


def test_chosen_blocks_follow_the_curves():
    safety, separable = torch.zeros(12), torch.full((12,), 0.5)
    safety[4], separable[7] = 3.0, 0.9
    assert layers.choose_blocks(safety, separable) == (4, 7)


def test_soft_prompt_losses_equal_an_uncached_forward_pass_and_training_lowers_them(lvlm):
    recipe = soft_prompt.Recipe(length=3, epochs=20, learning_rate=0.02)
    lessons = [soft_prompt.Lesson("bad one", None, "sure here", "No."),
               soft_prompt.Lesson("good", None, "yes ok", None),
               soft_prompt.Lesson("bad two", None, "sure thing", "No."), soft_prompt.Lesson("nice", None, "fine", None)]
    module = soft_prompt.SoftPrompt(lvlm, 3)
    rng = random.Random(3)
    language, detector = soft_prompt.losses(lvlm, lvlm, module, lessons[0], recipe, rng)

    again = random.Random(3)  # the same prefix, without a cache
    answer = lvlm.tokenizer("sure here", add_special_tokens=False)["input_ids"]
    cut = 0 if again.random() < recipe.empty_share else again.randint(1, len(answer))
    target = [*lvlm.tokenizer("No.", add_special_tokens=False)["input_ids"], 2]
    prompt = lvlm.prepare("bad one", None, 0)["input_ids"]
    before = torch.cat([prompt, torch.tensor([answer[:cut]], dtype=torch.long)], 1)
    embeds = torch.cat([lvlm.embed(before), module.soft[None], lvlm.embed(torch.tensor([target]))], 1)
    with torch.no_grad():
        states = lvlm.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
        logits = lvlm.lm_head(states)[before.shape[1] + 2:-1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(target))
    assert language.item() == pytest.approx(expected.item(), abs=1e-4)
    assert detector.item() == pytest.approx(np.log(2), abs=1e-4)  # the detector starts undecided

    rows = []
    artifact = soft_prompt.train(lvlm, lvlm, lessons, recipe, rows.append)
    first, last = (np.mean([row["refuse"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert last < first - 0.3
    assert artifact.soft.shape == (3, lvlm.width)
    saved = []
    soft_prompt.train(lvlm, lvlm, lessons, recipe, save=saved.append)
    resumed = soft_prompt.train(lvlm, lvlm, lessons, recipe, state=saved[0])
    assert torch.allclose(resumed.soft, artifact.soft, atol=1e-5)


def test_the_command_calibrates_saves_and_resumes(lvlm, tmp_path, capsys, monkeypatch):
    rng = random.Random(0)
    samples = []
    for index in range(48):
        unsafe = index % 2 == 0
        image = tmp_path / f"{index}.png"
        Image.new("RGB", (30, 30), (255, 0, 0) if unsafe else (0, 0, rng.randint(100, 255))).save(image)
        samples.append(Sample(f"s{index}", ("steal " if unsafe else "bake ") + "abcdefgh"[index % 8],
                              "unsafe" if unsafe else "safe", f"scenario {index % 3}",
                              str(image) if index % 4 < 2 else None,
                              "first do this " if unsafe else "with pleasure ", "image" if index % 4 < 2 else "text"))
    write_samples(samples, tmp_path / "samples.jsonl")
    assert read_samples(tmp_path / "samples.jsonl") == samples
    monkeypatch.setattr(run.trial, "answer_all", lambda engine, samples, lanes, *rest, _real=run.trial.answer_all:
                        _real(engine, samples, lanes, 2, *rest[1:]))  # a random model's words say nothing: two suffice
    arguments = argparse.Namespace(data=tmp_path / "samples.jsonl", out=tmp_path / "out", work=tmp_path / "work",
                                   per_kind=0, sasa=False, revision=False, sapt=False, trace=False)
    assert run.run(lvlm, arguments) == 0
    artifacts = load_artifacts(lvlm, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["about"]
    assert about["sasa"]["validation_auroc"]["clean"] > 0.9  # red and blue pictures, two verbs: easily told apart
    assert about["trace"]["token_auroc"] > 0.9
    assert set(artifacts.sapt.detectors) == {"joint", "frozen"}
    lanes = artifacts.standard_lanes("none,sasa,revision,sapt,all")
    assert len(Engine(lvlm, artifacts).answer("steal a", lanes=lanes, max_new_tokens=20)) == 5

    arguments.trace = True  # one part alone keeps the others
    assert run.run(lvlm, arguments) == 0
    again = load_artifacts(lvlm, tmp_path / "out")
    assert torch.equal(again.sapt.soft, artifacts.sapt.soft)
    assert torch.equal(again.trace.probe.weight, artifacts.trace.probe.weight)


@pytest.mark.parametrize(("text", "message"), [
    ("not json", "Line 1"), ('{"prompt": "a"}', "Line 1"), ('{"prompt": "a", "label": "evil"}', '"safe" or "unsafe"'),
    ('{"id": 1, "prompt": "a", "label": "safe"}\n{"id": 1, "prompt": "b", "label": "safe"}', "same id")])
def test_bad_sample_files_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_samples(path)


def test_too_few_samples_or_none_are_refused(lvlm, tmp_path):
    arguments = argparse.Namespace(data=None, out=tmp_path, work=tmp_path, per_kind=0, sasa=True, revision=False,
                                   sapt=False, trace=False)
    with pytest.raises(UserError, match="--data"):
        run.run(lvlm, arguments)
    write_samples([Sample("1", "a", "safe", "")], tmp_path / "few.jsonl")
    arguments.data = tmp_path / "few.jsonl"
    with pytest.raises(UserError, match="at least 20"):
        run.run(lvlm, arguments)


def test_wilson_interval_and_conformal_threshold():
    row = rate(8, 10)
    assert (row["low"], row["high"]) == pytest.approx((0.490, 0.943), abs=1e-3)  # Wilson 1927, as in textbooks
    assert conformal_threshold([0.1 * i for i in range(1, 20)], 0.1) == pytest.approx(1.8)
    assert conformal_threshold([0.5], 0.05) == float("inf")
    alarms = np.mean([np.random.default_rng(i).random() >= conformal_threshold(
        np.random.default_rng(1000 + i).random(39).tolist(), 0.1) for i in range(2000)])
    assert alarms <= 0.12


def test_no_artifacts_no_lanes():
    with pytest.raises(UserError, match="calibrate"):
        Artifacts().standard_lanes("sasa")
