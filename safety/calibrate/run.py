"""python -m safety calibrate: samples in, artifacts out, in stages that a later start takes up again."""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
import transformers
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm import tqdm

from safety.artifacts import SHIPPED, Artifacts, SasaArtifact, TraceArtifact, load_artifacts, save_artifacts
from safety.calibrate import activations, layers, soft_prompt, trial, vectors
from safety.calibrate.samples import miniature_samples
from safety.defenses.sasa import projected_hidden
from safety.detector import fit_probe
from safety.engine import Engine
from safety.errors import UserError
from safety.inputs import open_image
from safety.loading import load
from safety.lvlm import LVLM, MINIATURE
from safety.quantize import Int8Linear
from safety.refusal import refusal_start
from safety.samples import Sample, read_samples, write_samples
from safety.settings import Lane, Revision, Sapt, Sasa
from safety.statistics import conformal_threshold

PARTS = ("sasa", "revision", "sapt", "trace")
ANSWER_TOKENS = 48
PER_SCENARIO = 10  # samples of each scenario for SASA's probe, as in the paper
FALSE_ALARMS = 0.05
HELD_OUT = 24  # samples of each kind for the closing trial
BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--data", type=Path, help="samples (JSONL, see the README); the miniature brings its own")
    parser.add_argument("--out", type=Path, help="where the artifacts go (default artifacts/<model>/defenses)")
    parser.add_argument("--work", type=Path, help="intermediate results, taken up again (default build/calibrate/…)")
    parser.add_argument("--per-kind", type=int, default=44, help="the miniature's samples of each kind (default 44)")
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true", help=f"fit {part} (default: everything)")


def run(lvlm: LVLM, arguments: argparse.Namespace) -> int:
    """Calibrate, save, and try the result on held-out samples."""
    name = lvlm.name.rstrip("/").rpartition("/")[2]
    out = arguments.out or SHIPPED / name / "defenses"
    # Samples depend on their number, so another number does not take up these results.
    work = arguments.work or Path("build") / "calibrate" / f"{name}-{arguments.per_kind}"
    work.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if getattr(arguments, part)] or list(PARTS)
    if arguments.data:
        samples, held_out = read_samples(arguments.data), []
    elif lvlm.name == MINIATURE:
        samples = miniature_samples(work / "images", "train", arguments.per_kind)
        held_out = miniature_samples(work / "images", "heldout", HELD_OUT)
    else:
        raise UserError("Give --data: only the miniature brings samples of its own.")
    write_samples(samples, work / "samples.jsonl")
    if min(sum(sample.unsafe for sample in samples), sum(not sample.unsafe for sample in samples)) < 20:
        raise UserError("Calibration needs at least 20 safe and 20 unsafe samples; a few hundred are better.")

    calibration = _Calibration(lvlm, samples, work)
    artifacts = load_artifacts(lvlm, out) if (out / "config.json").exists() and len(parts) < len(PARTS) else Artifacts()
    about = artifacts.about
    for part in parts:
        began = time.perf_counter()
        about[part] = getattr(calibration, part)(artifacts)
        print(f"{part}: {json.dumps(about[part])}  ({time.perf_counter() - began:.0f} s)", flush=True)
    about |= {"samples": {kind: sum(sample.kind == kind for sample in samples) for kind in {s.kind for s in samples}},
              "command": f"python -m safety calibrate --per-kind {arguments.per_kind}",
              "date": datetime.now(UTC).date().isoformat(),
              "number_format": lvlm.label,
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "transformers": transformers.__version__, "scikit-learn": sklearn.__version__}}
    save_artifacts(artifacts, lvlm, out)  # before the trial, so that nothing is lost if it is stopped
    if held_out and len(parts) == len(PARTS):
        about["held_out"] = _try_lanes(Engine(lvlm, artifacts), held_out)
        save_artifacts(artifacts, lvlm, out)
    print(f"Saved to {out}.")
    return 0


class _Calibration:
    """The stages. Answers and activations are kept in the work folder, so a second start does not redo them."""

    def __init__(self, lvlm: LVLM, samples: Sequence[Sample], work: Path) -> None:
        self.lvlm = lvlm
        self.samples = samples
        self.work = work
        self.validation = _every_fourth(samples)
        self.answers = self._answers()
        # Where the undefended model already refuses, there is no unsafe answer to learn from.
        self.complied = [sample.unsafe and refusal_start(answer) is None
                         for sample, answer in zip(samples, self.answers, strict=True)]

    def _answers(self) -> list[str]:
        """The undefended model's own answer to every sample that brings none."""
        path = self.work / "answers.jsonl"
        known: dict[str, str] = {}
        if path.exists():
            known = {row["id"]: row["answer"] for row in map(json.loads, path.read_text().splitlines())}
        missing = [s for s in self.samples if s.response is None and s.id not in known]
        engine = Engine(self.lvlm, Artifacts())
        with path.open("a") as file, tqdm(total=len(missing), desc="undefended answers", disable=not missing) as bar:
            for start in range(0, len(missing), BATCH):
                part = missing[start:start + BATCH]
                rows = trial.answer_all(engine, part, [Lane("none")], ANSWER_TOKENS, BATCH, bar.update)
                for sample, (answer,) in zip(part, rows, strict=True):
                    known[sample.id] = answer.text
                    file.write(json.dumps({"id": sample.id, "answer": answer.text}) + "\n")
                file.flush()
        return [s.response if s.response is not None else known[s.id] for s in self.samples]

    def _pairs(self) -> list[tuple[int, str]]:
        """(sample, refusal) where the undefended model complied with a harmful request: Multi-Response pairs."""
        from safety.mini.corpus import REFUSALS
        return [(index, REFUSALS[index % len(REFUSALS)]) for index, complied in enumerate(self.complied) if complied]

    def revision(self, artifacts: Artifacts) -> dict[str, Any]:
        """Vectors from Multi-Response pairs; block, level and alpha chosen on validation samples."""
        pairs = [(index, refusal) for index, refusal in self._pairs() if not self.validation[index]][:200]
        if len(pairs) < 8:
            raise UserError(f"Only {len(pairs)} harmful samples were answered; revision vectors need at least 8.")
        sides: dict[str, list[Tensor]] = {"safe_layers": [], "unsafe_layers": [], "safe_heads": [], "unsafe_heads": []}
        for index, refusal in tqdm(pairs, desc="revision activations"):
            sample = self.samples[index]
            for side, answer in (("safe", refusal), ("unsafe", self.answers[index])):
                features = activations.read(self.lvlm, sample.prompt, sample.image, answer)
                sides[f"{side}_layers"].append(features.layers)
                sides[f"{side}_heads"].append(features.heads)
        artifacts.revision = vectors.fit_revision(
            torch.stack(sides["safe_layers"]), torch.stack(sides["unsafe_layers"]),
            torch.stack(sides["safe_heads"]), torch.stack(sides["unsafe_heads"]))
        artifacts.settings.revision, scores = self._choose_revision(artifacts)
        best = artifacts.revision.accuracy[artifacts.settings.revision.layer]
        return {"pairs": len(pairs), "construction": "Multi-Response", "vector": "mms",
                "head_accuracy_at_layer": [round(a, 3) for a in best.tolist()], "candidates": scores}

    def _choose_revision(self, artifacts: Artifacts) -> tuple[Revision, list[dict[str, Any]]]:
        harmful = [s for i, s in enumerate(self.samples) if self.validation[i] and self.complied[i]][:12]
        benign = [s for i, s in enumerate(self.samples) if self.validation[i] and not s.unsafe][::2][:12]
        depths = sorted({round(share * self.lvlm.blocks) for share in (0.35, 0.5, 0.65, 0.8)})
        candidates = [Revision(layer, alpha, "head") for layer in depths for alpha in (2.0, 6.0)]
        candidates += [Revision(layer, alpha, "layer") for layer in depths for alpha in (0.5, 1.0)]
        engine = Engine(self.lvlm, Artifacts(revision=artifacts.revision))
        scores: list[dict[str, Any]] = []
        safe: list[float] = []
        with tqdm(total=len(candidates), desc="revision settings") as bar:
            for start in range(0, len(candidates), 6):
                part = candidates[start:start + 6]
                lanes = [Lane(str(number), revision=candidate) for number, candidate in enumerate(part)]
                answers = trial.answer_all(engine, [*harmful, *benign], lanes, 24, BATCH)
                for number, candidate in enumerate(part):
                    refused = np.mean([row[number].refused for row in answers[:len(harmful)]])
                    helped = np.mean([not row[number].refused and not trial.is_garbage(row[number].text)
                                      for row in answers[len(harmful):]])
                    safe.append(float(refused + helped))
                    scores.append({"level": candidate.level, "layer": candidate.layer, "alpha": candidate.alpha,
                                   "harmful_refused": round(float(refused), 3),
                                   "benign_helped": round(float(helped), 3)})
                bar.update(len(part))
        # Helpfulness is worth as much as safety; the gentler of two equals wins.
        best = max(range(len(candidates)), key=lambda i: (safe[i], -candidates[i].alpha))
        return candidates[best], scores

    def sasa(self, artifacts: Artifacts) -> dict[str, Any]:
        """Safety block, fused block, and a probe for every pair on offer."""
        features = self._prompt_features()
        unsafe = np.array([sample.unsafe for sample in self.samples])
        images = [i for i, s in enumerate(self.samples) if s.image]
        text = {label: [s.prompt for s in self.samples if not s.image and s.unsafe == label][:16]
                for label in (True, False)}
        if min(map(len, text.values())) < 8:
            raise UserError("SASA ranks heads on text requests: give at least 8 safe and 8 unsafe samples "
                            "without an image.")
        with tqdm(total=2 * self.lvlm.blocks * self.lvlm.heads, desc="safety heads") as bar:
            harmful = layers.head_importance(self.lvlm, text[True], lambda: bar.update() and None)
            ordinary = layers.head_importance(self.lvlm, text[False], lambda: bar.update() and None)
        curve = layers.safety_curve(harmful, ordinary)
        separable = layers.separability(features[images], unsafe[images])
        s, f = layers.choose_blocks(curve, separable)
        step = self.lvlm.blocks // 6
        pairs = sorted({(s, f), *((block, block + 2) for block in range(step, self.lvlm.blocks - 3, step))})
        chosen = self._per_scenario()
        logits = self._projected_logits(chosen, pairs)
        fit = np.array([not self.validation[index] for index in chosen])
        y = unsafe[chosen]
        probes, auroc, alarms = {}, {}, {}
        for key, x in logits.items():
            probes[key] = fit_probe(x[fit], y[fit], c=0.01)
            scores = probes[key].probability(torch.tensor(x[~fit])).numpy()
            auroc[key] = float(roc_auc_score(y[~fit], scores))
            alarms[key] = _threshold(scores[~y[~fit]].tolist(), Sasa.threshold)
        artifacts.sasa = SasaArtifact({pair: probes[f"{pair[0]}-{pair[1]}"] for pair in pairs}, probes["clean"])
        # The paper's rule names one pair; of that and the evenly spaced ones we ship the best on validation samples.
        best = max(pairs, key=lambda pair: auroc[f"{pair[0]}-{pair[1]}"])
        artifacts.settings.sasa = Sasa(*best, threshold=alarms[f"{best[0]}-{best[1]}"])
        return {"pair_by_the_papers_rule": [s, f], "shipped_pair": list(best),
                "safety_curve": [round(v, 2) for v in curve.tolist()],
                "separability": [round(v, 3) for v in separable.tolist()],
                "validation_auroc": {k: round(v, 4) for k, v in auroc.items()},
                "fitted_on": int(fit.sum()), "validated_on": int((~fit).sum()), "thresholds": alarms}

    def _per_scenario(self) -> list[int]:
        """At most PER_SCENARIO samples of each scenario, kind and half (fit, validation third of it)."""
        count: dict[tuple, int] = {}
        chosen = []
        for index, sample in enumerate(self.samples):
            key = (sample.scenario, sample.kind, self.validation[index])
            count[key] = count.get(key, 0) + 1
            if count[key] <= (PER_SCENARIO if not self.validation[index] else PER_SCENARIO // 3):
                chosen.append(index)
        return chosen

    def _prompt_features(self) -> Tensor:
        """[samples, blocks, width] states at the last prompt position."""
        path = self.work / "prompts.safetensors"
        if path.exists() and len(stored := load_file(path)["layers"]) == len(self.samples):
            return stored
        rows = [activations.read(self.lvlm, s.prompt, s.image, None).layers
                for s in tqdm(self.samples, desc="prompt activations")]
        save_file({"layers": torch.stack(rows)}, path)
        return torch.stack(rows)

    def _projected_logits(self, chosen: Sequence[int], pairs: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """{"s-f" and "clean": [chosen, vocabulary]} first-token logits of each projected stream and the clean one."""
        rows: dict[str, list[np.ndarray]] = {"clean": [], **{f"{s}-{f}": [] for s, f in pairs}}
        taps = {block for pair in pairs for block in pair}
        for index in tqdm(chosen, desc="projected streams"):
            sample = self.samples[index]
            image = open_image(sample.image) if sample.image else None
            trunk = self.lvlm.prefill(self.lvlm.prepare(sample.prompt, image, 0), taps)
            rows["clean"].append(self.lvlm.logits(trunk.hidden).cpu().numpy())
            for s, f in pairs:
                hidden = projected_hidden(self.lvlm, trunk, s, f, 1.0)
                rows[f"{s}-{f}"].append(self.lvlm.logits(hidden).cpu().numpy())
        return {name: np.stack(values) for name, values in rows.items()}

    def sapt(self, artifacts: Artifacts) -> dict[str, Any]:
        """Soft prompt and joint detector, then the frozen detector on text-only instructions."""
        refusals = dict(self._pairs())
        lessons: list[soft_prompt.Lesson] = []
        checks: list[soft_prompt.Lesson] = []
        for index, sample in enumerate(self.samples):
            if sample.unsafe and index not in refusals:
                continue
            lesson = soft_prompt.Lesson(sample.prompt, sample.image, self.answers[index], refusals.get(index))
            (checks if self.validation[index] else lessons).append(lesson)
        path, curve = self.work / "soft_prompt.pt", []
        state = torch.load(path, weights_only=True) if path.exists() else None
        with tqdm(desc="soft prompt") as bar:
            def report(row: dict[str, float]) -> None:
                curve.append({key: round(value, 4) for key, value in row.items()})
                bar.total, bar.n = int(row["steps"]), int(row["step"])
                bar.set_postfix_str(f"refuse {row['refuse']:.2f} benign {row['benign']:.2f} "
                                    f"detector {row['detector']:.2f}")
            artifacts.sapt = soft_prompt.train(self.lvlm, self._trainable(), lessons, report=report, state=state,
                                               save=lambda state: torch.save(state, path))
        soft = artifacts.sapt.soft
        text = {label: [s.prompt for s in self.samples if not s.image and s.unsafe == label] for label in (True, False)}
        if min(map(len, text.values())) >= 8:
            artifacts.sapt.detectors["frozen"] = soft_prompt.frozen_detector(self.lvlm, soft, text[True], text[False])
        scores: dict[str, list[float]] = {"harmful": [], "benign": []}
        for lesson in tqdm(checks, desc="detector check"):
            half = lesson.answer[:len(lesson.answer) // 2]
            state_ = soft_prompt.soft_state(self.lvlm, soft, lesson.prompt, lesson.image, half)
            scores["harmful" if lesson.refusal else "benign"].append(
                artifacts.sapt.detectors["joint"].probability(state_).item())
        artifacts.settings.sapt = Sapt(threshold=_threshold(scores["benign"], Sapt.threshold))
        return {"recipe": asdict(soft_prompt.Recipe()), "lessons": len(lessons), "loss_curve": curve[::20],
                "detector_auroc": _auroc(scores["harmful"], scores["benign"]), "validated_on": len(checks),
                "recall_at_0.9": round(float(np.mean(np.array(scores["harmful"]) >= 0.9)), 4),
                "false_alarms_at_0.9": round(float(np.mean(np.array(scores["benign"]) >= 0.9)), 4),
                "threshold": artifacts.settings.sapt.threshold}

    def _trainable(self) -> LVLM:
        """The same weights in a number format that gradients can pass through."""
        if any(isinstance(module, Int8Linear) for module in self.lvlm.model.modules()):
            return load(self.lvlm.name, "none")
        return self.lvlm

    def trace(self, artifacts: Artifacts) -> dict[str, Any]:
        """Per-token probe on the states from which the tokens of whole answers were chosen."""
        states: list[np.ndarray] = []
        labels: list[int] = []
        held: list[tuple[int, Tensor]] = []
        rng = np.random.default_rng(0)
        for index, sample in enumerate(tqdm(self.samples, desc="trace activations")):
            rows = activations.read(self.lvlm, sample.prompt, sample.image, self.answers[index]).states
            harmful = int(self.complied[index])  # a refusal is a safe text, whatever was asked
            if self.validation[index]:
                held.append((harmful, rows))
            else:
                picked = rng.choice(len(rows), min(12, len(rows)), replace=False)
                states.append(rows.numpy()[picked])
                labels += [harmful] * len(picked)
        probe = fit_probe(np.concatenate(states), np.array(labels), c=0.01)
        tokens = {side: torch.cat([probe.probability(rows) for harmful, rows in held if harmful == side]).tolist()
                  for side in (0, 1)}
        peaks = {side: [probe.probability(rows).max().item() for harmful, rows in held if harmful == side]
                 for side in (0, 1)}
        threshold = min(max(conformal_threshold(peaks[0], FALSE_ALARMS), 0.5), 0.95)
        artifacts.trace = TraceArtifact(probe, round(threshold, 3))
        return {"token_auroc": _auroc(tokens[1], tokens[0]), "answer_peak_auroc": _auroc(peaks[1], peaks[0]),
                "fitted_on_tokens": len(labels), "validated_on_answers": len(held),
                "harmful_answers_crossing": round(float(np.mean(np.array(peaks[1]) >= threshold)), 4),
                "benign_answers_crossing": round(float(np.mean(np.array(peaks[0]) >= threshold)), 4)}


def _every_fourth(samples: Sequence[Sample]) -> list[bool]:
    """Which samples are for validation: the fourth, eighth, … of every label and kind."""
    count: dict[tuple[str, str], int] = {}
    marks = []
    for sample in samples:
        key = (sample.label, sample.kind)
        count[key] = count.get(key, 0) + 1
        marks.append(count[key] % 4 == 0)
    return marks


def _threshold(benign_scores: Sequence[float], otherwise: float) -> float:
    """Threshold that benign samples reach with a probability of at most FALSE_ALARMS, rounded up; `otherwise` (the
    paper's) when there are too few samples to promise that."""
    threshold = conformal_threshold(benign_scores, FALSE_ALARMS)
    return otherwise if np.isinf(threshold) else min(1.0, float(np.ceil(threshold * 1000) / 1000))


def _auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    return round(float(roc_auc_score([1] * len(positive) + [0] * len(negative), [*positive, *negative])), 4)


def _try_lanes(engine: Engine, samples: Sequence[Sample]) -> dict[str, Any]:
    """Refusals of each shipped lane on samples that calibration has not seen."""
    lanes = engine.artifacts.standard_lanes("none,sasa,revision,sapt,all")
    with tqdm(total=len(samples), desc="held-out trial") as bar:
        answers = trial.answer_all(engine, samples, lanes, ANSWER_TOKENS, BATCH, bar.update)
    table = {lane.name: trial.tally(samples, answers, number) for number, lane in enumerate(lanes)}
    for lane, kinds in table.items():
        print(f"{lane:9}", *(f"{kind}: refused {row['refused']['hits']}/{row['refused']['n']}"
                             f" garbage {row['garbage']['hits']}" for kind, row in kinds.items()), sep="  ")
    return table
