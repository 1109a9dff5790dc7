"""The engine against the slow oracle, on a tiny random LLaVA in fp32."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import Oracle
from PIL import Image
from tiny import random_artifacts, tiny_llava

from safety.decoding import REFUSAL
from safety.defenses.revision import delta
from safety.engine import Engine, Request
from safety.errors import UserError
from safety.parts import LayersArtifact, RevisionArtifact
from safety.settings import Lane, Revision, Sampling, Sapt, Sasa

STEPS = 24
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
PROMPT = "What is in this picture?"
NEVER, ALWAYS = 1.0, 0.0

SAPT = Sapt(interval=5, threshold=ALWAYS)
LANES = {
    "none": Lane("none"),
    "gate passes": Lane("l", sasa=Sasa(1, 3, threshold=NEVER)),
    "gate fires": Lane("l", sasa=Sasa(2, 4, threshold=ALWAYS)),
    "probe fires": Lane("l", sasa=Sasa(2, 4, threshold=ALWAYS, mode="probe")),
    "project": Lane("l", sasa=Sasa(1, 3, mode="project")),
    "reading passes": Lane("l", sasa=Sasa(1, 3, threshold=NEVER, mode="reading")),
    "reading fires": Lane("l", sasa=Sasa(1, 3, threshold=ALWAYS, mode="reading")),
    "project half": Lane("l", sasa=Sasa(2, 4, mode="project", strength=0.5)),
    "revision heads": Lane("l", revision=Revision(3, alpha=0.7)),
    "revision random heads, pwd, std": Lane("l", revision=Revision(2, heads="random", vector="pwd", units="std")),
    "revision layer": Lane("l", revision=Revision(2, alpha=0.4, level="layer")),
    "revision layer, all positions": Lane("l", revision=Revision(2, alpha=0.4, level="layer", positions="all")),
    "revision heads, all positions": Lane("l", revision=Revision(1, alpha=0.7, positions="all")),
    "sapt fires": Lane("l", sapt=SAPT),
    "sapt watches": Lane("l", sapt=replace(SAPT, threshold=NEVER)),
    "sapt frozen, every token": Lane("l", sapt=Sapt(interval=1, threshold=0.6, detector="frozen")),
    "all three": Lane("l", Sasa(2, 4, threshold=NEVER), Revision(3, alpha=0.5), SAPT),
    "project + revision below + sapt": Lane("l", Sasa(1, 3, mode="project"), Revision(0, alpha=0.5), SAPT),
    "project + revision inside + sapt": Lane("l", Sasa(1, 3, mode="project"), Revision(2, alpha=0.5), SAPT),
    "project + revision at the fused block": Lane("l", Sasa(1, 3, mode="project"), Revision(3, 0.3, "layer"), SAPT),
    "project + revision at the safety block": Lane("l", Sasa(1, 3, mode="project"), Revision(1, 0.3, "layer"), SAPT),
    "project + revision everywhere": Lane("l", Sasa(1, 3, mode="project"), Revision(2, 0.3, positions="all"), SAPT),
}


@pytest.fixture(scope="module")
def lvlm():
    return tiny_llava()


@pytest.fixture(scope="module")
def engine(lvlm):
    return Engine(lvlm, random_artifacts(lvlm))


def run(engine, lanes, prompt=PROMPT, image=IMAGE, **kwargs):
    """[(token ids, events, harm)] per lane."""
    result = [([], [], []) for _ in lanes]
    for step in engine.stream(prompt, image, lanes=lanes, max_new_tokens=STEPS, **kwargs):
        result[step.lane][0].append(step.token_id)
        result[step.lane][1].extend(step.events)
        result[step.lane][2].append(step.harm)
    return result


def assert_like_oracle(engine, lane, outcome, prompt=PROMPT, image=IMAGE):
    tokens, events, harm = outcome
    refusal = engine.lvlm.tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]
    oracle = Oracle(engine.lvlm, engine.artifacts, prompt, image).run(lane, STEPS, refusal)
    assert tokens == oracle.tokens
    checks = [(event.token, event.probability) for event in events if event.type == "check"]
    assert [index for index, _ in checks] == [index for index, _ in oracle.checks]
    assert np.allclose([p for _, p in checks], [p for _, p in oracle.checks], atol=1e-4)
    gates = [event.probability for event in events if event.type == "gate"]
    assert gates == pytest.approx([] if oracle.gate is None else [oracle.gate], abs=1e-4)
    if oracle.harm:
        assert harm == pytest.approx(oracle.harm, abs=1e-4)


def test_revision_points_from_unsafe_to_safe_with_the_best_heads_by_hand():
    vectors = {f"{level}_{kind}": torch.full((2, 4, 3) if level == "head" else (2, 3), value)
               for level in ("head", "layer") for kind, value in (("mms", 2.0), ("pwd", 5.0))}
    scales = {name: torch.full(vector.shape[:-1], 7.0) for name, vector in vectors.items()}
    part = RevisionArtifact(vectors, scales, torch.tensor([[0.5] * 4, [0.6, 0.9, 0.7, 0.8]]))
    assert delta(Revision(1, alpha=2.0, level="layer"), part).tolist() == [4.0] * 3  # towards safe: alpha times
    assert delta(Revision(1, alpha=-2.0, level="layer", vector="pwd"), part).tolist() == [-10.0] * 3
    std = delta(Revision(1, alpha=2.0, level="layer", units="std"), part)
    assert std.norm().item() == pytest.approx(14.0) and len(set(std.tolist())) == 1  # two standard deviations
    heads = delta(Revision(1, alpha=1.0, fraction=0.5), part).view(4, 3)
    assert heads.tolist() == [[0.0] * 3, [2.0] * 3, [0.0] * 3, [2.0] * 3]  # the second and the fourth are best


@pytest.mark.parametrize("name", LANES)
def test_each_lane_alone_equals_the_oracle(engine, name):
    assert_like_oracle(engine, LANES[name], run(engine, [LANES[name]])[0])


@pytest.mark.parametrize("names", [list(LANES)[:6], list(LANES)[6:12], list(LANES)[12:18], list(LANES)[16:22]])
def test_lanes_in_one_batch_equal_the_oracle_and_leave_each_other_alone(engine, names):
    lanes = [LANES[name] for name in names]
    for lane, outcome in zip(lanes, run(engine, lanes), strict=True):
        assert_like_oracle(engine, lane, outcome)


def test_defenses_change_the_answer(engine):
    """Guards the tests above: an engine that ignored its lanes would differ from an oracle that does not."""
    plain = run(engine, [LANES["none"]])[0][0]
    for name in ("project", "revision heads", "revision layer", "sapt fires", "gate fires"):
        assert run(engine, [LANES[name]])[0][0] != plain, name


def test_a_text_only_prompt_equals_the_oracle(engine):
    outcome = run(engine, [LANES["all three"]], image=None)[0]
    assert_like_oracle(engine, LANES["all three"], outcome, image=None)


def test_requests_of_different_length_in_one_batch_equal_the_oracle(engine):
    requests = [Request(PROMPT, IMAGE), Request("Why?"), Request("A much longer question about nothing at all, really")]
    lanes = [LANES[name] for name in ("none", "all three", "project + revision inside + sapt")]
    tokens = {}
    for step in engine.stream_batch(requests, lanes=lanes, max_new_tokens=STEPS):
        tokens.setdefault((step.request, step.lane), []).append(step.token_id)
    for r, request in enumerate(requests):
        for index, lane in enumerate(lanes):
            oracle = Oracle(engine.lvlm, engine.artifacts, request.prompt, request.image).run(lane, STEPS, [])
            assert tokens[r, index] == oracle.tokens, (r, lane)


@pytest.mark.parametrize("lane", [
    Lane("l", sasa=Sasa(1, 3, mode="project", strength=0.0)), Lane("l", revision=Revision(3, alpha=0.0)),
    Lane("l", revision=Revision(3, fraction=0.0)), Lane("l", sasa=Sasa(1, 3, threshold=NEVER)),
    Lane("l", revision=Revision(2, alpha=0.0, level="layer")),
    Lane("l", revision=Revision(2, alpha=0.0, level="layer", positions="all")),
    Lane("l", revision=Revision(2, alpha=0.0, units="std", vector="pwd")),
    Lane("l", sapt=replace(SAPT, threshold=NEVER)),
    Lane("l", Sasa(1, 3, mode="project", strength=0.0), Revision(2, 0.0), replace(SAPT, threshold=NEVER))])
def test_zero_strength_is_the_identity(engine, lane):
    (tokens, _, harm), (plain_tokens, _, plain_harm) = run(engine, [lane])[0], run(engine, [LANES["none"]])[0]
    assert tokens == plain_tokens
    assert harm == pytest.approx(plain_harm, abs=1e-4)


def test_the_end_check_sees_answers_shorter_than_the_interval(lvlm, engine):
    """Every token ends an answer: the paper's rule would never check; ours looks, and an injection goes on."""
    before = lvlm.eos_ids
    try:
        lvlm.eos_ids = frozenset(range(lvlm.vocabulary))
        for threshold, end_check in ((ALWAYS, True), (NEVER, True), (ALWAYS, False)):
            lane = Lane("l", sapt=Sapt(threshold=threshold, end_check=end_check))
            outcome = run(engine, [LANES["none"], lane])
            assert_like_oracle(engine, lane, outcome[1])
            assert len([event for event in outcome[1][1] if event.type == "check"]) == int(end_check)
    finally:
        lvlm.eos_ids = before


def test_rows_that_end_early_leave_the_others_untouched(lvlm, engine):
    plain = run(engine, [LANES["none"]])[0][0]
    before = lvlm.eos_ids
    try:
        lvlm.eos_ids = frozenset({plain[7]})
        lanes = [LANES["none"], LANES["revision layer"], LANES["sapt fires"], LANES["project"]]
        for lane, outcome in zip(lanes, run(engine, lanes), strict=True):
            assert_like_oracle(engine, lane, outcome)
    finally:
        lvlm.eos_ids = before


def test_sampling_is_seeded_per_lane(engine):
    lanes = [LANES["none"], LANES["gate passes"], LANES["none"]]
    hot = Sampling(temperature=1.0, top_p=0.9, seed=7)
    first, second = run(engine, lanes, sampling=hot), run(engine, lanes, sampling=hot)
    assert first == second
    assert run(engine, lanes[:1], sampling=Sampling(temperature=1e-40))[0][0] == run(engine, lanes[:1])[0][0]
    assert first[0][0] == first[1][0] == first[2][0]  # equal logits, equal draws
    assert run(engine, lanes[:1], sampling=replace(hot, seed=8))[0][0] != first[0][0]


def test_two_runs_in_a_row_are_identical(engine):
    lanes = [LANES[name] for name in ("none", "all three", "project", "revision heads")]
    assert run(engine, lanes) == run(engine, lanes)


def hook_count(lvlm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lvlm.model.modules())


@pytest.mark.parametrize("call", [2, 9, 40, 60, 150], ids=lambda call: f"block call {call}")  # reading, prefill, …
def test_an_exception_and_a_closed_generator_leave_the_model_as_it_was(lvlm, engine, monkeypatch, call):
    lanes = [LANES[name] for name in ("none", "all three", "project + revision everywhere", "reading passes")]
    expected = run(engine, lanes)
    hooks, weights = hook_count(lvlm), {name: p.clone() for name, p in lvlm.model.named_parameters()}

    stream = engine.stream(PROMPT, IMAGE, lanes=lanes, max_new_tokens=STEPS)
    next(stream)
    assert hook_count(lvlm) == hooks  # nothing stays on the model between two tokens
    stream.close()

    calls = []
    forward = type(lvlm.layers[4]).forward

    def broken(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("out of memory")
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(type(lvlm.layers[4]), "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(engine, lanes)
    monkeypatch.undo()

    assert hook_count(lvlm) == hooks
    assert all(torch.equal(weights[name], p) for name, p in lvlm.model.named_parameters())
    assert not lvlm.lock.locked()
    assert run(engine, lanes) == expected


@pytest.mark.parametrize("name", ["gate passes", "project"])
def test_a_block_that_keeps_to_the_clean_cache_is_refused(engine, lvlm, name, monkeypatch):
    """As transformers 5.24's did when the cache's argument got another name: the clean stream was overwritten."""
    kind, first = type(lvlm.layers[0]), {}
    forward = kind.forward

    def stubborn(self, states, cache=None, **kwargs):
        return forward(self, states, cache=first.setdefault(self, cache), **kwargs)
    monkeypatch.setattr(kind, "forward", stubborn)
    with pytest.raises(UserError, match=r"requirements\.txt"):
        run(engine, [LANES[name]])


def test_cancel_stops_between_two_tokens_and_frees_the_model(lvlm, engine):
    cancel, seen = threading.Event(), []
    for step in engine.stream(PROMPT, IMAGE, lanes=[LANES["none"]], max_new_tokens=STEPS, cancel=cancel):
        seen.append(step.token_id)
        if len(seen) == 3:
            cancel.set()
    assert seen == run(engine, [LANES["none"]])[0][0][:3]
    assert not lvlm.lock.locked()


def test_a_second_run_waits_for_the_first_and_can_be_cancelled_while_it_waits(engine):
    first = engine.stream(PROMPT, lanes=[LANES["none"]], max_new_tokens=STEPS)
    next(first)
    cancel = threading.Event()
    waiting = threading.Thread(target=lambda: list(engine.stream(PROMPT, lanes=[LANES["none"]], cancel=cancel)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    cancel.set()
    waiting.join(5)
    assert not waiting.is_alive()
    first.close()


def test_the_image_is_encoded_once_and_the_prompt_prefilled_once(lvlm, engine):
    lanes = [LANES[name] for name in ("none", "gate passes", "revision heads", "sapt fires", "all three")]
    images, prompts = [], []
    handles = [lvlm.model.base_model.vision_tower.register_forward_hook(lambda m, a, o: images.append(1)),
               lvlm.layers[0].register_forward_hook(lambda m, a, o: prompts.append(o.shape[0]) if o.shape[1] > 4
                                                    else None)]
    run(engine, lanes)
    for handle in handles:
        handle.remove()
    assert (len(images), prompts) == (1, [1])


@pytest.mark.parametrize(("lanes", "message"), [
    ([], "Between 1 and"), ([Lane("l")] * 7, "Between 1 and"),
    ([Lane("l", sasa=Sasa(3, 1))], "fused layer"), ([Lane("l", sasa=Sasa(0, 5))], "no probe"),
    ([Lane("l", sasa=Sasa(1, 3, threshold=float("nan")))], "SASA threshold"),
    ([Lane("l", revision=Revision(99))], "Revision layer"), ([Lane("l", revision=Revision(1, alpha=1e9))], "alpha"),
    ([Lane("l", revision=Revision(1, alpha=float("inf")))], "alpha"),
    ([Lane("l", sapt=Sapt(interval=0))], "interval"), ([Lane("l", sapt=Sapt(interval=2.5))], "whole number")])
def test_bad_lanes_are_refused_before_any_model_work(lvlm, engine, lanes, message):
    handle = lvlm.layers[0].register_forward_hook(lambda *a: pytest.fail("the model was run"))
    try:
        with pytest.raises(UserError, match=message):
            next(iter(engine.stream(PROMPT, lanes=lanes)))
    finally:
        handle.remove()
    assert not lvlm.lock.locked()


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"max_new_tokens": 0}, "new tokens"), ({"max_new_tokens": 10**6}, "new tokens"),
    ({"sampling": Sampling(temperature=-1)}, "Temperature"), ({"sampling": Sampling(top_p=0)}, "Top-p"),
    ({"prompt": "  "}, "empty"), ({"prompt": "x" * 100_000}, "100,000 characters"),
    ({"prompt": "see <image> here"}, "control marker"), ({"prompt": "bye <eos>"}, "control marker"),
    ({"prompt": None}, "must be text")])
def test_bad_requests_are_refused(engine, kwargs, message):
    with pytest.raises(UserError, match=message):
        next(iter(engine.stream(kwargs.pop("prompt", PROMPT), lanes=[LANES["none"]], **kwargs)))


def test_a_step_names_the_likeliest_tokens_and_its_own_chance(lvlm, engine):
    steps = list(engine.stream(PROMPT, lanes=[LANES["none"], LANES["gate fires"]], max_new_tokens=4))
    greedy = [step for step in steps if step.lane == 0]
    for step in greedy:
        chances = [p for _, p in step.alternatives]
        assert len(chances) == 5 and chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1 + 1e-5
        assert step.probability == pytest.approx(chances[0]) and step.prompt_tokens > 3
    forced = next(step for step in steps if step.lane == 1)  # not what the model would have said
    assert forced.probability is not None and forced.probability < forced.alternatives[0][1]


def test_the_first_step_says_where_in_the_model_harm_shows(lvlm, engine):
    weight, bias = torch.randn(lvlm.blocks, lvlm.width), torch.randn(lvlm.blocks)
    artifacts = replace(engine.artifacts, layers=LayersArtifact(weight, bias, torch.ones(lvlm.blocks)))
    inputs = lvlm.prepare(PROMPT, None, 2)
    with torch.inference_mode():  # transformers' own taps; the last entry is behind the norm, so it is left out
        states = lvlm.model(**inputs, output_hidden_states=True).hidden_states[1:-1]
    expected = [torch.sigmoid(state[0, -1] @ w + b).item() for state, w, b in zip(states, weight, bias, strict=False)]
    before = hook_count(lvlm)  # transformers leaves its own
    steps = list(Engine(lvlm, artifacts).stream(PROMPT, lanes=[LANES["none"], LANES["gate fires"]], max_new_tokens=2))
    for step in steps:
        assert len(step.layers) == (lvlm.blocks if step.index == 0 else 0)
        if step.index == 0:
            assert step.layers[:-1] == pytest.approx(expected, abs=1e-5)
    assert hook_count(lvlm) == before
    assert all(step.layers == () for step in engine.stream(PROMPT, lanes=[LANES["none"]], max_new_tokens=2))
