"""Fit SAPT: the soft prompt by gradient descent, then its detectors on what a check behind it would see."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safety.artifacts import Artifacts
from safety.calibrate import soft_prompt
from safety.calibrate.caches import pack
from safety.calibrate.material import Material, auroc, indices
from safety.calibrate.observe import digest, reading, refusal_for
from safety.calibrate.soft_prompt import Lesson
from safety.detector import Probe, cross_fit, fit_probe
from safety.errors import UserError
from safety.inputs import open_image
from safety.lvlm import LVLM
from safety.parts import SaptArtifact
from safety.quantize import Int8Linear
from safety.settings import Sapt

LOOKS = 16  # held-out lessons of each side that decide when training stops
BATCH = 16  # checks that are computed together
CURVES = "sapt-losses.png"
PAPERS = {"joint": Sapt.threshold, "frozen": 0.8}  # fixed thresholds of the paper and of the authors' code


def fit(material: Material, artifacts: Artifacts) -> dict:
    """Add the SAPT part and its recommended settings to `artifacts`; returns losses and how well its detectors do."""
    recipe = material.recipe
    lessons = {index: lesson for index in range(len(material.samples)) if (lesson := _lesson(material, index))}
    fitted = [index for index in lessons if material.fitting[index] and material.understood[index]]
    # Openings of answers, and answers to requests that only they show, teach the detectors only.
    whole = [index for index in fitted if material.openly[index] and material.whole[index]]
    held_out = [index for side in (True, False)
                for index in [i for i in whole if bool(lessons[i].refusal) == side][::6][:LOOKS]]
    trained = [index for index in whole if index not in set(held_out)]
    if min(sum(bool(lessons[index].refusal) == side for index in trained) for side in (True, False)) < 2:
        raise UserError("SAPT learns from harmful requests that the undefended model answers, and there are none among "
                        "these samples. Give attacks that work.")
    stems = [[material.observed[i].path.stem for i in part] for part in (trained, held_out)]
    soft, curves = _train(material, [lessons[i] for i in trained], [lessons[i] for i in held_out], digest(stems))
    material.out.mkdir(parents=True, exist_ok=True)
    _draw(material.out / CURVES, curves)

    checks = _checks(material, soft.soft, lessons)
    x = torch.cat([checks[i] for i in fitted]).numpy()
    y = np.array([bool(lessons[i].refusal) for i in fitted for _ in checks[i]])
    # The joint detector shaped the soft prompt while both were trained; on the final soft prompt it is fitted anew, to
    # convergence, since a few hundred steps of gradient descent are far from it.
    result = cross_fit(x, y, [i for i in fitted for _ in checks[i]])
    detectors = {"joint": result.probe}
    frozen = _frozen(material, soft.soft)
    if frozen is not None:
        detectors["frozen"] = frozen
    if recipe.detector not in detectors:
        raise UserError("The frozen detector needs at least 8 safe and 8 unsafe samples without an image.")
    artifacts.sapt = SaptArtifact(soft.soft, detectors)
    points = {name: _operating_point(material, probe, name, lessons, checks) for name, probe in detectors.items()}
    artifacts.settings.sapt = Sapt(points[recipe.detector]["threshold"], recipe.interval, detector=recipe.detector)
    return {"recipe": asdict(recipe.soft), "interval": recipe.interval, "lessons": len(trained), "curves": CURVES,
            "stopped_after": len(curves["curve"]), "best_step": curves["best_step"], "held_out": curves["held_out"],
            "loss_curve": curves["curve"], "cross_validated_auroc": round(result.auroc, 4), "c": result.c,
            "fitted_on_checks": len(y), "detectors": points,
            "thresholds_hold_for": f"answers of up to {recipe.answer_tokens} tokens"}


def _lesson(material: Material, index: int) -> Lesson | None:
    """What a sample teaches. Where there is no answer, or the undefended model already refuses a harmful request, there
    is nothing to learn."""
    if not material.answered[index] or (material.unsafe[index] and not material.complied[index]):
        return None
    seen = material.observed[index]
    refusal, end = None, sorted(material.lvlm.eos_ids)[:1]
    if material.unsafe[index]:
        said = refusal_for(material.samples[index], index)
        refusal = material.lvlm.tokenizer(said, add_special_tokens=False)["input_ids"] + end
    elif not seen.ids and not end:
        return None
    ended = material.samples[index].response is not None or len(seen.ids) < material.recipe.answer_tokens
    return Lesson(seen.ids, refusal, seen.length, seen.offset, _cache_of(material, index), tuple(end) if ended else ())


def _cache_of(material: Material, index: int) -> Callable[[], Tensor]:
    """Reads a sample's keys and values, or computes them again where the disk budget did not hold them."""
    seen, sample = material.observed[index], material.samples[index]

    def compute() -> Tensor:
        lvlm = material.lvlm  # its lock is held by whoever asks for the lesson's cache
        inputs = lvlm.prepare(sample.prompt, open_image(sample.image) if sample.image else None, len(seen.ids))
        trunk = lvlm.prefill(inputs, set())
        if seen.ids:
            reading(lvlm, trunk, seen.ids)
        return pack(trunk.cache)
    return (lambda: seen.tensor("cache")) if seen.has("cache") else compute


def _train(material: Material, lessons: list[Lesson], held_out: list[Lesson], samples: str
           ) -> tuple[SaptArtifact, dict[str, Any]]:
    """Train, from where an earlier start with the same recipe and samples stopped."""
    path = material.work / f"soft-prompt-{digest(asdict(material.recipe.soft), samples)}.pt"
    state = torch.load(path, weights_only=True, map_location=material.lvlm.device) if path.exists() else None

    def save(state: dict[str, Any]) -> None:
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    done = len(state["progress"]["curve"]) if state else 0
    stage = material.progress.stage("training the soft prompt", material.recipe.soft.steps, done)
    with stage as tick:
        return soft_prompt.train(material.lvlm, _trainable(material.lvlm), lessons, held_out, material.recipe.soft,
                                 lambda step, steps: tick(), state, save)


def _trainable(lvlm: LVLM) -> LVLM:
    """The same weights in a number format that gradients can pass through."""
    if any(isinstance(module, Int8Linear) for module in lvlm.model.modules()):
        from safety.loading import load
        return load(lvlm.name, "none")
    return lvlm


def check_points(tokens: int, ended: bool, interval: int) -> list[int]:
    """Answer lengths at which a lane with this interval looks: k-1, 2k-1, … and, if the answer ended, its end."""
    points = [cut for cut in range(interval - 1, tokens + 1, interval)]
    return points if not ended or tokens in points else [*points, tokens]


def _checks(material: Material, soft: Tensor, lessons: dict[int, Lesson]) -> dict[int, Tensor]:
    """{sample: [checks, width]}: what each check of its undefended answer would see, by the model as it is served."""
    rows = [(index, cut) for index, lesson in lessons.items()
            for cut in check_points(len(lesson.answer), bool(lesson.end), material.recipe.interval)]
    found: dict[int, list[Tensor]] = {index: [] for index in lessons}
    with material.progress.stage("states at SAPT's checks", len(rows)) as tick:
        for start in range(0, len(rows), BATCH):
            part = rows[start:start + BATCH]
            with material.lvlm.lock:
                states = soft_prompt.soft_states(material.lvlm, soft, [lessons[index] for index, _ in part],
                                                 [cut for _, cut in part]).cpu()
            for (index, _), state in zip(part, states, strict=True):
                found[index].append(state)
                tick()
    width = soft.shape[1]
    return {index: torch.stack(states) if states else torch.empty(0, width) for index, states in found.items()}


def _frozen(material: Material, soft: Tensor) -> Probe | None:
    """The released code's kind of detector: PCA to 4 components and logistic regression on text-only instructions, each
    followed by the soft prompt. None without enough of them."""
    usable = material.answered & material.openly & material.fitting
    chosen = [i for i in indices(usable) if material.samples[i].image is None]
    labels = [bool(material.unsafe[i]) for i in chosen]
    if min(labels.count(True), labels.count(False)) < 8:
        return None
    lessons = []
    for index in chosen:
        seen = material.observed[index]
        lessons.append(Lesson([], None, seen.length, seen.offset, _cache_of(material, index)))
    states = []
    for start in range(0, len(lessons), BATCH):
        part = lessons[start:start + BATCH]
        with material.lvlm.lock:
            states.append(soft_prompt.soft_states(material.lvlm, soft, part, [0] * len(part)).cpu())
    return fit_probe(torch.cat(states).numpy(), np.array(labels), pca=4)


def _operating_point(material: Material, probe: Probe, name: str, lessons: dict[int, Lesson],
                     checks: dict[int, Tensor]) -> dict[str, Any]:
    """What a detector does to validation answers. An answer scores the highest of its checks, since any may fire."""
    def peaks(which: np.ndarray) -> np.ndarray:
        return np.array([probe.probability(checks[i]).max().item() if len(checks[i]) else 0.0
                         for i in indices(which)])
    benign = material.judging & ~material.unsafe
    harmful = material.judging & material.complied
    quiet, loud = peaks(benign), peaks(harmful)
    threshold, alarms = material.threshold(quiet, benign, PAPERS[name])
    fixed = PAPERS[name]
    return {"validation_auroc": auroc(loud, quiet), "threshold": threshold, "false_alarms": alarms,
            "recall": round(float(np.mean(loud >= threshold)), 4) if len(loud) else None, "papers_threshold": fixed,
            "recall_at_papers": round(float(np.mean(loud >= fixed)), 4) if len(loud) else None,
            "false_alarms_at_papers": round(float(np.mean(quiet >= fixed)), 4),
            "validated_on": len(loud) + len(quiet)}


def _draw(path: Any, curves: dict[str, Any]) -> None:
    """Save the loss curves as a PNG: every step's losses, and those on held-out lessons."""
    from matplotlib.figure import Figure  # not pyplot: no global state, works in any thread
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    steps = range(1, len(curves["curve"]) + 1)
    for name, colour in (("refuse", "#B34700"), ("benign", "#0072B2"), ("detector", "#AA4488")):
        axis.plot(steps, [row[name] for row in curves["curve"]], color=colour, alpha=0.35, linewidth=0.8)
        axis.plot([row["step"] for row in curves["held_out"]], [row[name] for row in curves["held_out"]], color=colour,
                  marker="o", markersize=3, label=f"{name} (held out)")
    axis.axvline(curves["best_step"], color="#555555", linestyle=":", label="shipped")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
