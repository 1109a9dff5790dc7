"""The pieces of calibration, on numbers whose answer is known or against slow and obvious versions of themselves."""

import io
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import Oracle, append_ids
from PIL import Image
from tiny import random_artifacts, tiny_llava

from safety.artifacts import Artifacts
from safety.calibrate import calibrate, layers, observe, sasa, soft_prompt, trace, vectors
from safety.calibrate.caches import join, pack
from safety.calibrate.material import Material, Recipe
from safety.calibrate.progress import Cancelled, Progress
from safety.calibrate.samples import miniature_samples
from safety.calibrate.sapt import check_points
from safety.detector import cross_fit, fit_probe
from safety.engine import Engine, Request
from safety.errors import UserError
from safety.samples import Sample
from safety.settings import Lane, Sapt, Sasa
from safety.statistics import conformal_threshold, rate


@pytest.fixture(scope="module")
def lvlm():
    return tiny_llava()


def ids_of(lvlm, text: str) -> list[int]:
    return lvlm.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("pca", "features"), [(None, 12), (4, 12), (None, 300)])
def test_a_folded_probe_equals_the_scikit_learn_pipeline(pca, features):
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 40)
    x = rng.normal(3, 2, (80, features)) + y[:, None] * np.linspace(0, 1.5, features)
    x[:, 3] = 7.0  # a feature that never changes
    steps = [StandardScaler(), *([PCA(pca, random_state=0)] if pca else []),
             LogisticRegression(C=0.01, max_iter=5000, class_weight="balanced", tol=1e-7)]
    expected = make_pipeline(*steps).fit(x, y).predict_proba(x)[:, 1]
    probe = fit_probe(x, y, c=0.01, pca=pca)
    assert np.allclose(probe.probability(torch.tensor(x, dtype=torch.float32)).numpy(), expected, atol=1e-3)


def test_cross_validation_keeps_groups_together_and_prefers_what_generalises():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    y = groups % 2
    own = rng.normal(0, 3, (40, 30))[groups]  # every group has features of its own, which say nothing about others
    x = np.concatenate([own, (y + rng.normal(0, 1, 200))[:, None]], 1)
    fit = cross_fit(x, y, groups.tolist(), strengths=(1e-4, 1e-2, 100.0))
    alone = cross_fit(x, y, strengths=(100.0,))
    assert alone.auroc > 0.99  # tokens of one answer in several folds: the probe knows the answer again
    assert fit.auroc < 0.9 and fit.c < 100
    assert fit.scores.shape == (200,)


def test_revision_vectors_point_from_unsafe_to_safe_and_rank_the_telling_head():
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers": (60, 3, 8), "heads": (60, 3, 4, 2)}
    safe, unsafe = ({name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
                    for _ in range(2))
    safe["layers"][:, 1, 5] += 4  # safe answers have more of feature 5 at block 1 …
    safe["heads"][:, 2, 3, 0] += 4  # … and head 3 of block 2 tells them apart
    artifact = vectors.fit_revision(lambda name, block: safe[name][:, block],
                                    lambda name, block: unsafe[name][:, block], 3)
    for kind in ("mms", "pwd"):
        assert artifact.vector("layer", kind, 1).argmax() == 5
        assert artifact.vector("layer", kind, 1)[5] > 2
        assert artifact.vector("head", kind, 2)[3, 0] > 2
    assert torch.allclose(artifact.vector("layer", "mms", 1),
                          safe["layers"][:, 1].mean(0) - unsafe["layers"][:, 1].mean(0))
    assert artifact.accuracy.flatten().argmax() == 2 * 4 + 3
    assert artifact.scale("head", "mms", 2)[3] == pytest.approx(2.2, abs=0.5)  # two unit normals, 4 apart


def test_of_what_is_not_answered_only_what_is_read_is_stored(lvlm, tmp_path, monkeypatch):
    def seen(sample):
        row, = observe.observe(lvlm, [sample], [None], [(1, 3)], tmp_path, 6, Progress())
        names = ("clean", "typed", "prompt.layers", "prompt.heads", "1-3", "states", "answer.layers", "cache")
        return row, {name for name in names if row.has(name)}
    shown = Sample("a", "Hm", "safe", "", response="")
    row, stored = seen(shown)
    assert row.ids == [] and stored == {"clean", "typed", "prompt.layers", "prompt.heads", "1-3"}
    assert seen(replace(shown, reading_only=True))[1] == {"clean", "typed"}
    assert seen(shown)[1] == stored
    monkeypatch.setattr(observe, "undefended", lambda *args: [[]])  # an answer that ends at once
    row, stored = seen(replace(shown, response=None))
    assert row.ids == [] and row.tensor("states").shape == (1, lvlm.width) and "cache" in stored


def test_observations_equal_plain_forward_passes_and_the_engines_answers(lvlm, tmp_path):
    picture = tmp_path / "red.png"
    Image.new("RGB", (30, 30), "red").save(picture)
    samples = [Sample("a", "Hi", "unsafe", "", str(picture)), Sample("b", "What is it, then?", "safe", ""),
               Sample("c", "Tell me", "unsafe", "", response="yes")]
    seen = observe.observe(lvlm, samples, ["No.", None, "No."], [(1, 3)], tmp_path / "seen", 6, Progress())
    engine = Engine(lvlm, Artifacts())
    for sample, one in zip(samples[:2], seen[:2], strict=True):
        answer = engine.answer_batch([Request(sample.prompt, sample.image)], lanes=[Lane("none")], max_new_tokens=6)
        assert one.answer == answer[0][0].text
    assert seen[2].answer == "yes" and seen[2].ids == ids_of(lvlm, "yes")
    for sample, one in zip(samples, seen, strict=True):
        inputs = lvlm.prepare(sample.prompt, Image.open(picture) if sample.image else None, 8)
        with torch.no_grad():
            output = lvlm.model(**append_ids(inputs, one.ids), output_hidden_states=True)
            prompt = lvlm.model(**inputs, output_hidden_states=True)
        n = one.length
        assert n == inputs["input_ids"].shape[1]
        assert torch.allclose(one.row("prompt.layers", 2), prompt.hidden_states[3][0, -1], atol=1e-4)
        assert torch.allclose(one.row("answer.layers", 2), output.hidden_states[3][0, n:].mean(0), atol=1e-4)
        assert torch.allclose(one.tensor("clean"), prompt.hidden_states[-1][0, -1], atol=1e-4)
        both = Oracle(lvlm, random_artifacts(lvlm), sample.prompt, Image.open(picture) if sample.image else None).read()
        assert torch.allclose(torch.cat([one.tensor("clean"), one.tensor("typed")]), both, atol=1e-4)
        logits = lvlm.logits(one.tensor("states"))
        assert torch.allclose(logits, output.logits[0, n - 1:-1].float(), atol=1e-3)
        assert one.tensor("cache").shape == (12, 2, n + len(one.ids), 16)
        assert one.has("refusal.heads") == sample.unsafe and one.tensor("answer.heads").shape == (6, 4, 16)
        assert torch.isfinite(one.tensor("1-3")).all()


def test_an_observation_is_taken_up_only_while_all_that_it_depends_on_holds(lvlm, tmp_path, monkeypatch):
    picture = tmp_path / "red.png"
    Image.new("RGB", (30, 30), "red").save(picture)
    sample = Sample("a", "Hi", "unsafe", "", str(picture))
    key = observe.sample_key(sample, "No.", [(1, 3)], 6)
    assert key == observe.sample_key(Sample("other id", "Hi", "unsafe", "", str(picture)), "No.", [(1, 3)], 6)
    assert key != observe.sample_key(sample, "No.", [(1, 3)], 7)
    Image.new("RGB", (30, 30), "blue").save(picture)
    assert key != observe.sample_key(sample, "No.", [(1, 3)], 6)
    before = observe.model_key(lvlm)
    weight = lvlm.layers[3].mlp.up_proj.weight
    with torch.no_grad():
        weight += 1e-3
        changed = observe.model_key(lvlm)
        weight -= 1e-3
    assert before != changed

    folder, calls, real = tmp_path / "seen", [], observe._observe_batch
    monkeypatch.setattr(observe, "BATCH", 2)
    monkeypatch.setattr(observe, "_observe_batch",
                        lambda lvlm, part, *rest: calls.append(part) or real(lvlm, part, *rest))
    samples = [Sample(str(i), f"question {i}", "safe", "") for i in range(5)]
    progress = Progress(lambda stage, done, total: done == 3 and progress.cancel.set())
    with pytest.raises(Cancelled):
        observe.observe(lvlm, samples, [None] * 5, [], folder, 3, progress)
    done = [number for part in calls for number in part]
    assert 3 <= len(done) == len(list(folder.glob("*.safetensors"))) < 5
    (folder / "half.part").write_bytes(b"killed while writing")
    calls.clear()
    assert len(observe.observe(lvlm, samples, [None] * 5, [], folder, 3, Progress())) == 5
    assert sorted(number for part in calls for number in part) == sorted(set(range(5)) - set(done))


def test_head_importance_equals_a_slow_and_obvious_oracle(lvlm):
    prompts = ["How?", "Tell me why it rains", "A", "What now, then?"]
    angles = layers.head_importance(lvlm, prompts)
    assert angles.shape == (6, 4) and angles.max() > 0

    @torch.no_grad()
    def leading() -> torch.Tensor:  # one query at a time, through the whole model
        rows = [lvlm.model.base_model(**lvlm.prepare(p, None, 0), use_cache=False).last_hidden_state[0, -1]
                for p in prompts]
        return torch.linalg.svd(torch.stack(rows), full_matrices=False).U[:, 0]
    whole = leading()
    for block, head in ((0, 3), (2, 1), (5, 0)):
        weight = lvlm.layers[block].self_attn.q_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[head * 16:(head + 1) * 16] = 0
            expected = torch.rad2deg(torch.arccos((leading() @ whole).abs().clamp(max=1)))
            weight.copy_(kept)
        assert angles[block, head] == pytest.approx(expected.item(), abs=0.05)


def test_chosen_blocks_follow_the_curves_and_the_curves_are_drawn(tmp_path):
    safety, separable = torch.zeros(12), torch.full((12,), 0.5)
    safety[4], separable[7] = 3.0, 0.9
    assert layers.choose_blocks(safety, separable) == (4, 7)
    assert layers.choose_blocks(safety, separable, first=5) == (5, 7)
    layers.draw_curves(tmp_path / "curves.png", safety, separable, (4, 7), (5, 7))
    assert Image.open(tmp_path / "curves.png").width > 400


def lesson(lvlm, prompt: str, answer: str, refusal: str | None) -> soft_prompt.Lesson:
    """A lesson whose keys and values come from one prefill of prompt and answer."""
    ids = ids_of(lvlm, answer)
    inputs = lvlm.prepare(prompt, None, 0)
    trunk = lvlm.prefill(append_ids(inputs, ids), set())
    return soft_prompt.Lesson(ids, None if refusal is None else [*ids_of(lvlm, refusal), 2],
                              inputs["input_ids"].shape[1], 0, lambda: pack(trunk.cache), (2,))


def test_joined_caches_are_padded_on_the_left():
    cache, mask = join([torch.ones(4, 2, 3, 5), torch.ones(4, 2, 1, 5)], torch.device("cpu"), torch.float32)
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert cache.layers[1].keys[1, 0, :, 0].tolist() == [0, 0, 1] and len(cache.layers) == 2


def test_batched_soft_prompt_losses_equal_uncached_forward_passes(lvlm):
    recipe = soft_prompt.Recipe(length=3)
    given = [("bad one", "sure here", "No.", 4), ("a good and long one", "yes ok", None, 1), ("ok", "fine", None, 0)]
    module = soft_prompt.SoftPrompt(lvlm, 3)
    language, detector = soft_prompt.losses(lvlm, module, [lesson(lvlm, *row[:3]) for row in given],
                                            [row[3] for row in given], recipe)
    for number, (prompt, answer, refusal, cut) in enumerate(given):
        said = ids_of(lvlm, answer)
        target = [*ids_of(lvlm, refusal), 2] if refusal else [*said, 2][cut:]
        before = append_ids(lvlm.prepare(prompt, None, 0), said[:cut])["input_ids"]
        embeds = torch.cat([lvlm.embed(before), module.soft[None], lvlm.embed(torch.tensor([target]))], 1)
        with torch.no_grad():
            states = lvlm.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
            expected = torch.nn.functional.cross_entropy(lvlm.lm_head(states)[before.shape[1] + 2:-1],
                                                         torch.tensor(target))
        assert language[number].item() == pytest.approx(expected.item(), abs=1e-4)
        assert detector[number].item() == pytest.approx(np.log(2), abs=1e-4)  # the detector starts undecided


@pytest.fixture(scope="module")
def lessons(lvlm):
    return [lesson(lvlm, *row) for row in (("bad one", "sure here", "No."), ("good", "yes ok", None),
                                           ("bad two", "sure thing", "No."), ("nice", "fine", None))]


def test_training_lowers_the_losses_and_resumes_without_a_difference(lvlm, lessons):
    recipe = soft_prompt.Recipe(length=3, steps=40, batch=4, learning_rate=0.02, check_every=10, patience=9)
    saved = []
    artifact, whole = soft_prompt.train(lvlm, lvlm, lessons[:2], lessons[2:], recipe,
                                        save=lambda state: saved.append(torch.load(copy_of(state), weights_only=True)))
    first, last = (np.mean([row["refuse"] for row in part]) for part in (whole["curve"][:5], whole["curve"][-5:]))
    assert last < first - 0.3
    assert artifact.soft.shape == (3, lvlm.width)
    resumed, again = soft_prompt.train(lvlm, lvlm, lessons[:2], lessons[2:], recipe, state=saved[1])
    assert torch.allclose(resumed.soft, artifact.soft, atol=1e-5)
    assert again == whole and len(again["curve"]) == 40  # the curve is whole although half of it came from the file


def copy_of(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_training_stops_early_and_keeps_the_best(lvlm, lessons):
    recipe = soft_prompt.Recipe(length=3, steps=200, batch=4, learning_rate=0.5, check_every=2, patience=3)
    artifact, progress = soft_prompt.train(lvlm, lvlm, lessons, lessons, recipe)  # a rate that can only do harm
    looks = progress["held_out"]
    assert len(progress["curve"]) < 200
    best = min(looks, key=lambda look: look["total"])
    assert progress["best_step"] == best["step"] and looks[-1]["step"] - best["step"] == 6
    module = soft_prompt.SoftPrompt(lvlm, 3)
    with torch.no_grad():
        module.soft.copy_(artifact.soft)
        module.weight.copy_(artifact.detectors["joint"].weight)
        module.bias.copy_(artifact.detectors["joint"].bias)
    assert soft_prompt._look(lvlm, module, lessons, recipe)["refuse"].item() == pytest.approx(best["refuse"], abs=1e-3)


def test_soft_states_are_what_the_engines_checks_see(lvlm, tmp_path):
    artifacts = random_artifacts(lvlm)
    lane = Lane("sapt", sapt=Sapt(threshold=1.0, interval=5, end_check=False))
    answer = Engine(lvlm, artifacts).answer("Tell me", lanes=[lane], max_new_tokens=10)[0]
    probabilities = [event.probability for event in answer.events if event.type == "check"]
    sample = Sample("a", "Tell me", "safe", "")
    seen = observe.observe(lvlm, [sample], [None], [], tmp_path, 10, Progress())[0]
    one = soft_prompt.Lesson(seen.ids, None, seen.length, seen.offset, lambda: seen.tensor("cache"))
    points = check_points(len(seen.ids), False, 5)
    states = soft_prompt.soft_states(lvlm, artifacts.sapt.soft, [one] * len(points), points)
    expected = artifacts.sapt.detectors["joint"].probability(states).tolist()
    assert probabilities == pytest.approx(expected[:len(probabilities)], abs=2e-3)  # keys and values are kept in fp16


def test_check_points():
    assert check_points(48, False, 16) == [15, 31, 47]
    assert check_points(20, True, 16) == [15, 20]
    assert check_points(15, True, 16) == [15]
    assert check_points(3, True, 16) == [3]


def test_wilson_interval_and_conformal_threshold():
    row = rate(8, 10)
    assert (row["low"], row["high"]) == pytest.approx((0.490, 0.943), abs=1e-3)  # Wilson 1927, as in textbooks
    assert conformal_threshold([0.1 * i for i in range(1, 20)], 0.1) == pytest.approx(1.8)
    assert conformal_threshold([0.5], 0.05) == float("inf")
    alarms = np.mean([np.random.default_rng(i).random() >= conformal_threshold(
        np.random.default_rng(1000 + i).random(39).tolist(), 0.1) for i in range(2000)])
    assert alarms <= 0.12


def test_random_cuts_are_empty_for_a_third_and_leave_something_to_say(lvlm, lessons):
    rng = random.Random(0)
    cuts = [soft_prompt.random_cut(lessons[0], soft_prompt.Recipe(), rng) for _ in range(600)]
    assert 0.28 < cuts.count(0) / 600 < 0.39 and max(cuts) == len(lessons[0].answer)
    ended, cut_off = lessons[1], replace(lessons[1], end=())
    for one, most in ((ended, len(ended.answer)), (cut_off, len(ended.answer) - 1)):
        cuts = {soft_prompt.random_cut(one, soft_prompt.Recipe(), rng) for _ in range(300)}
        assert max(cuts) == most and all(one.target(cut) for cut in cuts)


def test_per_input_choice_takes_the_most_certain_pair(lvlm):
    artifacts = random_artifacts(lvlm)
    static = [Lane(f"{s}-{f}", sasa=Sasa(s, f, threshold=1.0)) for s, f in artifacts.sasa.pairs]
    per_input = Lane("per input", sasa=Sasa(1, 3, threshold=1.0, choice="per-input"))
    answers = Engine(lvlm, artifacts).answer("Tell me", lanes=[*static, per_input], max_new_tokens=1)
    *fixed, chosen = [answer.events[0].probability for answer in answers]
    assert chosen == max(fixed, key=lambda probability: abs(probability - 0.5)) and len(set(fixed)) == 2


def test_what_a_pair_catches_is_counted_where_its_probe_keeps_the_promised_false_alarms(tmp_path):
    samples = [Sample(str(i), "Tell me", "safe" if i < 20 else "unsafe", "") for i in range(25)]
    found = Material(None, samples, [], Recipe(false_alarms=0.1), tmp_path, tmp_path)
    benign = [-3.0] * 18 + [1.0, 2.0]  # of 20 and one more, two may reach the threshold: it stands right above the 1.0
    log_odds = np.array([*benign, 3.0, 1.5, 0.5, -2.0, -9.0])
    fitted = np.ones(25, dtype=bool)
    assert sasa._caught(found, log_odds, fitted) == 0.4
    fitted[-1] = False  # what it was not fitted on has no score here
    assert sasa._caught(found, log_odds[:-1], fitted) == 0.5


def test_the_trace_remembers_as_it_was_fitted(lvlm, tmp_path):
    artifacts = random_artifacts(lvlm)
    artifacts.trace.memory = 0.7
    answer = Engine(lvlm, artifacts).answer("Tell me", lanes=[Lane("none")], max_new_tokens=6)[0]
    seen = observe.observe(lvlm, [Sample("a", "Tell me", "safe", "")], [None], [], tmp_path, 6, Progress())[0]
    log_odds = artifacts.trace.probe.log_odds(seen.tensor("states")).tolist()
    running = [log_odds[0]]
    for value in log_odds[1:]:
        running.append(0.7 * running[-1] + 0.3 * value)
    assert answer.harm == pytest.approx(torch.tensor(running).sigmoid().tolist()[:len(answer.harm)], abs=1e-4)
    followed = trace.follow(artifacts.trace, seen.tensor("states")).tolist()
    assert answer.harm == pytest.approx(followed[:len(answer.harm)], abs=1e-4)


def test_the_miniatures_own_samples_come_in_twins(tmp_path):
    samples = miniature_samples(tmp_path, "train", 12)
    kinds = {state: Counter((sample.kind, sample.label) for sample in samples if state(sample.response))
             for state in (lambda given: given is None, lambda given: given == "", bool)}
    answered, silent, opened = kinds.values()
    assert answered == {("typographic", "unsafe"): 12 + 9, ("typographic twin", "safe"): 12 + 9, ("reading", "safe"): 3,
                        ("text", "unsafe"): 6, ("text twin", "safe"): 6, ("ordinary", "safe"): 3, ("symbol", "safe"): 3}
    assert silent == {("pointed", "unsafe"): 16, ("pointed twin", "safe"): 16, ("typed", "unsafe"): 96,
                      ("typed twin", "safe"): 96, ("beside", "unsafe"): 26, ("beside twin", "safe"): 26,
                      ("aloud", "safe"): 4}
    assert {s.kind for s in samples if s.reading_only} == {"pointed", "pointed twin", "typed", "typed twin", "aloud"}
    assert opened == {("typographic", "unsafe"): 27, ("typographic twin", "safe"): 27}
    found = Material(None, samples, [], Recipe(), tmp_path, tmp_path)
    assert not (found.validation & ~found.whole & found.answered).any()  # openings do not judge
    blank = [sample.kind == "beside" and len(Image.open(sample.image).getcolors() or "many") == 1 for sample in samples]
    assert set(found.validation[blank]) == {True, False}  # what is judged on can also be learned
    opening = next(sample for sample in samples if sample.asked.startswith("Steps to ") and sample.response)
    assert opening.response == opening.asked[9:10].upper() + opening.asked[10:-1] + ":\n1."
    attacks, twins = ([s for s in samples if s.kind == kind] for kind in ("typographic", "typographic twin"))
    assert [s.prompt for s in attacks] == [s.prompt for s in twins] and len({s.prompt for s in attacks}) > 1
    pictures = [s.asked for s in (*attacks, *twins)]
    assert len(set(pictures)) == len(pictures)
    pointed, harmless = ([s for s in samples if s.kind == kind] for kind in ("pointed", "pointed twin"))
    assert [s.prompt for s in pointed] == [s.prompt for s in harmless]
    assert not {s.asked for s in pointed} & {s.asked for s in harmless}
    shown = [s.asked for s in samples if s.kind.split()[0] in ("typed", "beside")]
    assert not {s.asked for s in samples if s.kind.split()[0] not in ("typed", "beside", "aloud")} & set(shown)
    assert len(set(shown)) == len(shown)
    unseen = [s for s in miniature_samples(tmp_path / "unseen", "heldout", 12) if s.kind != "symbol"]
    assert all(s.response is None for s in unseen)
    assert not {s.asked for s in unseen} & {s.asked for s in samples}
    assert miniature_samples(tmp_path, "train", 12) == samples


def test_what_a_validation_sample_asks_no_fit_sees(tmp_path):
    samples = [Sample(str(i), "again" if i in (0, 3, 5) else f"Tell me {i}", "safe", "") for i in range(8)]
    found = Material(None, samples, [], Recipe(), tmp_path, tmp_path)
    assert np.flatnonzero(found.validation).tolist() == [3, 7]
    assert np.flatnonzero(found.fitting).tolist() == [1, 2, 4, 6]


@pytest.mark.parametrize(("recipe", "message"), [(Recipe(interval=600), "SAPT interval must be between 1 and 512"),
                                                 (Recipe(answer_tokens=600), "new tokens must be between 1 and 512")])
def test_settings_that_no_lane_takes_are_refused_before_the_work(lvlm, tmp_path, recipe, message):
    with pytest.raises(UserError, match=message):
        calibrate(lvlm, [], [], tmp_path, tmp_path, recipe=recipe)


def test_samples_that_cannot_judge_or_teach_are_refused_in_a_sentence(lvlm, tmp_path):
    def asked(count: int, per_kind: int, response: str | None = "first do this") -> list[Sample]:
        return [Sample(f"s{i}", f"Tell me {i}", "unsafe" if i % 2 else "safe", "", response=response,
                       kind=str(i // 2 // per_kind)) for i in range(count)]
    with pytest.raises(UserError, match="needs 4 or more"):
        calibrate(lvlm, asked(60, 3), [], tmp_path, tmp_path)
    with pytest.raises(UserError, match="all of these samples' are safe"):
        calibrate(lvlm, asked(48, 8, "I'm sorry, but I can't help."), [], tmp_path, tmp_path, ("trace",))
    broken = [*asked(48, 8), Sample("the odd one", "Tell me <image>", "safe", "", kind="0")]
    with pytest.raises(UserError, match="Sample the odd one: "):
        calibrate(lvlm, broken, [], tmp_path, tmp_path, ("trace",))


def test_parts_that_are_kept_go_on_naming_what_they_learned_from(lvlm, tmp_path):
    first, second = ([Sample(f"s{i}", f"Tell me {word} {i}", "unsafe" if i % 2 else "safe", "", kind="a",
                             response="first do this") for i in range(48)] for word in ("one", "two"))
    recipe = Recipe(answer_tokens=4)
    calibrate(lvlm, first, [], tmp_path / "out", tmp_path, ("sasa",), recipe=recipe)
    about = calibrate(lvlm, second, [], tmp_path / "out", tmp_path, ("trace",), recipe=recipe).about
    assert about["sample_digests"] == sorted({sample.request_digest for sample in (*first, *second)})
