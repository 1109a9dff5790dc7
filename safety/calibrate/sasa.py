"""Fit SASA: its safety and fused blocks, and a probe on the projected stream's first-token logits for each pair."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.special import expit
from torch import Tensor

from safety.artifacts import Artifacts
from safety.calibrate import layers
from safety.calibrate.material import Material, auroc, indices
from safety.calibrate.observe import digest, save_whole
from safety.defenses.sasa import projected_hidden
from safety.detector import cross_fit
from safety.errors import UserError
from safety.inputs import open_image
from safety.lvlm import LVLM
from safety.parts import LayersArtifact, SasaArtifact
from safety.samples import Sample
from safety.settings import Sasa

QUERIES = 8  # text queries of each side whose last-token states make the matrix that heads are ranked with
DEPTHS = (0.53, 0.67, 0.8)  # of the pairs that are tried beside the paper's rule; f lies two blocks behind s
ROWS = 64  # samples whose logits are computed together
LEAST = 2  # samples of each label that the probes are fitted on
SCREEN = 120  # samples on which the rule's pair and the others are compared
CURVES = "sasa-curves.png"


def fit(material: Material, artifacts: Artifacts) -> dict:
    """Add the SASA part and its recommended settings to `artifacts`; returns how they were found."""
    lvlm = material.lvlm
    harmful, ordinary = _importance(material, text_queries(material.samples))
    curve = layers.safety_curve(harmful, ordinary)
    every = _chosen(material)
    pictures = any(sample.image for sample in material.samples)
    chosen = every & ~material.reading_only  # for every probe but that of mode "reading"
    if min((chosen & material.fitting & (material.unsafe == side)).sum() for side in (True, False)) < LEAST:
        raise UserError(f"SASA's probes need at least {LEAST} safe and {LEAST} unsafe samples, beside those that judge "
                        'and those that are "reading_only".')
    separable, artifacts.layers = _separability(material, chosen)
    rule = layers.choose_blocks(curve, separable, max(1, lvlm.deepstack))
    pairs = tried_pairs(lvlm)
    ranked = _screen(material, chosen, sorted({rule, *pairs}))
    # The rule's pair was run on the screened samples only; it gets a probe if it leads, or if those are all there are.
    leads = max(ranked, key=lambda pair: ranked[pair]) == rule
    shipped = sorted({*pairs, *([rule] if leads or chosen.sum() <= SCREEN else [])})
    probes, found, certain, standing = {}, {}, [], {}
    named = {f"{s}-{f}": (s, f) for s, f in shipped}
    views: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "clean": partial(_logits, material, pair=None),
        **{name: partial(_logits, material, pair=pair) for name, pair in named.items()},
        **({"reading": partial(_read, material)} if pictures else {})}
    for name, view in views.items():
        shown = every if name == "reading" else chosen
        fitted, judged = shown & material.fitting, shown & material.validation
        result = cross_fit(view(fitted), material.unsafe[fitted], material.requests[fitted])
        scores = result.probe.probability(torch.from_numpy(view(judged))).numpy()
        probes[name] = result.probe
        found[name] = {"fitted_on": int(fitted.sum()), "validated_on": int(judged.sum()), "c": result.c,
                       "cross_validated_auroc": round(result.auroc, 4),
                       "caught_out_of_fold": _caught(material, result.scores, fitted),
                       **_operating_point(material, scores, judged)}
        if name in named:
            certain.append(scores)
            standing[named[name]] = found[name]["caught_out_of_fold"], np.nan_to_num(result.auroc, nan=0.5)
    best = max(standing, key=lambda pair: standing[pair])
    per_input = _per_input(material, certain, chosen & material.validation)
    thresholds = {name: row["threshold"] for name, row in (found | {"per-input": per_input}).items()}
    artifacts.sasa = SasaArtifact({pair: probes[f"{pair[0]}-{pair[1]}"] for pair in shipped}, probes["clean"],
                                  thresholds, probes.get("reading"))
    artifacts.settings.sasa = Sasa(*best, threshold=found[f"{best[0]}-{best[1]}"]["threshold"])
    material.out.mkdir(parents=True, exist_ok=True)
    layers.draw_curves(material.out / CURVES, curve, separable, rule, best)
    whose = "which is the pair of the rule itself" if best == rule else "not the pair of the rule"
    return {"pair_by_the_papers_rule": list(rule), "shipped_pair": list(best),
            "why": f"The safety-specific heads concentrate around block {rule[0]} (centre of mass of the upper curve); "
                   f"behind it harmful and benign separate best at block {rule[1]} (lower curve). Beside evenly "
                   "spaced pairs it is a candidate if it leads on the screened samples. "
                   f"{best[0]}-{best[1]} ships, {whose}: of the candidates' probes its catches most harmful requests "
                   "out of fold at the promised false alarms.",
            "curves": CURVES, "safety_curve": [round(v, 2) for v in curve.tolist()],
            "safety_heads": [list(head) for head in layers.safety_heads(harmful, ordinary)],
            "separability": [round(v, 3) for v in separable.tolist()],
            "screened_on": int((_screened(chosen) & material.fitting).sum()),
            "screen": {f"{s}-{f}": round(value, 4) for (s, f), value in ranked.items()}, "streams": found,
            "per_input": per_input,
            "papers_threshold": Sasa.threshold}


def text_queries(samples: Sequence[Sample]) -> dict[bool, list[str]]:
    """{unsafe: QUERIES requests as text} that heads are ranked on: those asked without a picture and, where there are
    too few of them, what the pictures ask for, typed out."""
    def openly_typed(sample: Sample) -> bool:
        return sample.image is None and sample.request is None
    return {side: [sample.asked for sample in sorted((s for s in samples if s.unsafe == side), key=openly_typed,
                                                     reverse=True)][:QUERIES] for side in (True, False)}


def tried_pairs(lvlm: LVLM) -> list[tuple[int, int]]:
    """Evenly spaced pairs that every sample's projected streams are run for."""
    first = max(1, lvlm.deepstack)
    starts = {max(first, round(share * lvlm.blocks)) for share in DEPTHS}
    return sorted((s, min(s + 2, lvlm.blocks - 1)) for s in starts if s < lvlm.blocks - 1)


def _importance(material: Material, text: dict[bool, list[str]]) -> tuple[Tensor, Tensor]:
    """Head importance on harmful and on ordinary queries; kept in the work folder."""
    path = material.work / f"heads-{digest(text[True], text[False])}.safetensors"
    if not path.exists():
        stage = material.progress.stage("ranking heads", 2 * material.lvlm.blocks)
        with stage as tick:
            found = {name: layers.head_importance(material.lvlm, text[side], tick)
                     for name, side in (("harmful", True), ("ordinary", False))}
        save_whole(found, path)
    stored = load_file(path)
    return stored["harmful"], stored["ordinary"]


def _chosen(material: Material) -> np.ndarray:
    """[samples] bool: at most `per_scenario` of each scenario, label and kind, and a third as many for validation."""
    most = material.recipe.per_scenario
    marks = material.openly.copy()
    if most is not None:
        count: dict[tuple, int] = {}
        for index, sample in enumerate(material.samples):
            key = (sample.scenario, sample.label, sample.kind, bool(material.validation[index]))
            count[key] = count.get(key, 0) + 1
            marks[index] &= count[key] <= (-(-most // 3) if material.validation[index] else most)
    return marks


def _separability(material: Material, chosen: np.ndarray) -> tuple[Tensor, LayersArtifact]:
    """[blocks] cross-validated AUROC of a probe on last-prompt-position states, harmful against benign, and the probes.
    Where there are enough pictures, on those alone, since it is there that meaning must form first."""
    pictures = np.array([sample.image is not None for sample in material.samples])
    fitted, validation = chosen & material.fitting, chosen & material.validation
    for which, least in ((fitted, 10), (validation, 1)):
        if min((which & pictures & (material.unsafe == side)).sum() for side in (True, False)) < least:
            pictures = np.ones_like(pictures)
    which, judged = fitted & pictures, validation & pictures
    curve, probes, judgements = [], [], []
    with material.progress.stage("separability", material.lvlm.blocks) as tick:
        for block in range(material.lvlm.blocks):
            result = cross_fit(material.prompts(block, which), material.unsafe[which], material.requests[which],
                               strengths=(1e-3, 1e-2))
            scores = result.probe.probability(torch.from_numpy(material.prompts(block, judged))).numpy()
            unsafe = material.unsafe[judged]
            curve.append(result.auroc)
            probes.append(result.probe)
            judgements.append(auroc(scores[unsafe], scores[~unsafe]) or 0.5)
            tick()
    layers_part = LayersArtifact(torch.stack([probe.weight for probe in probes]),
                                 torch.stack([probe.bias for probe in probes]), torch.tensor(judgements))
    return torch.tensor(curve).nan_to_num(0.5), layers_part


def _screened(chosen: np.ndarray) -> np.ndarray:
    """[samples] bool: at most SCREEN of the chosen samples, evenly spread."""
    numbers = np.flatnonzero(chosen)
    marks = np.zeros_like(chosen)
    marks[numbers[np.unique(np.linspace(0, len(numbers) - 1, min(SCREEN, len(numbers))).round().astype(int))]] = True
    return marks


def _screen(material: Material, chosen: np.ndarray, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Cross-validated AUROC of every pair's probe on the same samples."""
    which = _screened(chosen) & material.fitting
    with material.progress.stage("comparing pairs", len(pairs)) as tick:
        ranked = {}
        for pair in pairs:
            result = cross_fit(_logits(material, which, pair), material.unsafe[which], material.requests[which])
            ranked[pair] = 0.5 if np.isnan(result.auroc) else result.auroc
            tick()
    return ranked


def _logits(material: Material, which: np.ndarray, pair: tuple[int, int] | None) -> np.ndarray:
    """[chosen, vocabulary] first-token logits of one projected stream, or of the clean one (None)."""
    numbers = indices(which)
    name = "clean" if pair is None else f"{pair[0]}-{pair[1]}"
    if material.observed[numbers[0]].has(name):
        rows = [material.observed[number].tensor(name) for number in numbers]
    else:
        assert pair is not None  # the clean stream is always observed
        rows = _run_pair(material, numbers, pair)
    logits = []
    for start in range(0, len(rows), ROWS):  # a large vocabulary's logits of all samples would not fit beside the model
        hidden = torch.stack(rows[start:start + ROWS]).to(material.lvlm.device, material.lvlm.embed.weight.dtype)
        with material.lvlm.lock:
            logits.append(material.lvlm.logits(hidden).cpu())
    return torch.cat(logits).numpy()


def _read(material: Material, which: np.ndarray) -> np.ndarray:
    """[chosen, 4 * width] what mode "reading" judges: see `safety.reading`."""
    return torch.stack([torch.cat([material.observed[i].tensor("clean"), material.observed[i].tensor("typed")])
                        for i in indices(which)]).numpy()


def _run_pair(material: Material, numbers: list[int], pair: tuple[int, int]) -> list[Tensor]:
    """[width] projected states of a pair that was not observed; kept in the work folder, one file per sample."""
    folder = material.work / "projected"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{material.observed[number].path.stem}-{pair[0]}-{pair[1]}.safetensors" for number in numbers]
    missing = [place for place, path in enumerate(paths) if not path.exists()]
    if missing:
        with material.progress.stage(f"projected stream {pair[0]}-{pair[1]}", len(paths),
                                     len(paths) - len(missing)) as tick:
            for place in missing:
                sample = material.samples[numbers[place]]
                inputs = material.lvlm.prepare(sample.prompt, open_image(sample.image) if sample.image else None, 0)
                with material.lvlm.lock:
                    trunk = material.lvlm.prefill(inputs, set(pair))
                    state = projected_hidden(material.lvlm, trunk, *pair, 1.0).float().cpu()
                save_whole({"state": state}, paths[place])
                tick()
    return [load_file(path)["state"] for path in paths]


def _operating_point(material: Material, scores: np.ndarray, judged: np.ndarray) -> dict:
    """Threshold for the chosen false-alarm rate, and what it does to the samples that judge."""
    unsafe = material.unsafe[judged]
    threshold, alarms = material.threshold(scores[~unsafe], judged & ~material.unsafe, Sasa.threshold)
    return {"validation_auroc": auroc(scores[unsafe], scores[~unsafe]), "threshold": threshold, "false_alarms": alarms,
            "recall": round(float(np.mean(scores[unsafe] >= threshold)), 4)}


def _caught(material: Material, log_odds: np.ndarray, fitted: np.ndarray) -> float:
    """Share of the harmful among the `fitted` samples that out-of-fold scores catch at the promised false alarms."""
    unsafe = material.unsafe[fitted]
    scores = expit(log_odds)
    threshold, _ = material.threshold(scores[~unsafe], fitted & ~material.unsafe, Sasa.threshold)
    return round(float(np.mean(scores[unsafe] >= threshold)), 4)


def _per_input(material: Material, certain: list[np.ndarray], judged: np.ndarray) -> dict:
    """Our extension: every input takes the pair whose probe is most certain about it."""
    scores = np.stack(certain)
    taken = np.abs(scores - 0.5).argmax(0)
    return _operating_point(material, scores[taken, np.arange(scores.shape[1])], judged)
