"""Fit the trace detector: P(harm) of the state from which a token is chosen, for every token of every lane."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold

from safety.artifacts import Artifacts
from safety.calibrate.material import Material, auroc, indices
from safety.detector import Probe, cross_fit, fit_probe
from safety.errors import UserError
from safety.parts import TraceArtifact

TOKENS = 16  # of each answer that are fitted on, evenly spread; neighbours say nearly the same
STRENGTHS = (1e-4, 1e-3, 1e-2)
MEMORIES = (0.0, 0.5, 0.8, 0.9, 0.95)
OTHERWISE = 0.9  # threshold where there are too few benign answers for a promise


def fit(material: Material, artifacts: Artifacts) -> dict:
    """Add the trace detector to `artifacts`; returns how well it does.

    A token is labelled by its answer: harmful where the undefended model complied with a harmful request. A refusal is
    a safe text, whatever was asked. How long the trace remembers is chosen by cross-validation.
    """
    fitted, judged = (indices(which) for which in (material.fitting & material.understood, material.judging))
    states = {index: material.observed[index].tensor("states") for index in (*fitted, *judged)}
    x = {index: _spread(states[index].numpy()) for index in fitted}
    labels = np.array([bool(material.complied[index]) for index in fitted for _ in x[index]])
    if labels.all() or not labels.any():
        raise UserError("The trace detector learns from harmful and from safe answers, and all of these samples' are "
                        f"{'harmful' if labels.any() else 'safe'}. Give attacks that work, and ordinary requests.")
    groups = [index for index in fitted for _ in x[index]]
    with material.progress.stage("trace detector", 2) as tick:
        result = cross_fit(np.concatenate([x[index] for index in fitted]), labels, groups, strengths=STRENGTHS)
        tick()
        memories = _compare_memories(material, states, x, fitted, result.c)
        tick()
    memory = max(memories, key=lambda value: memories[value])
    trace = TraceArtifact(result.probe, OTHERWISE, memory)
    curves = {index: follow(trace, states[index]) for index in judged}
    peaks = {index: float(curves[index].max()) for index in judged}
    benign = material.judging & ~material.unsafe
    trace.threshold, alarms = material.threshold([peaks[i] for i in indices(benign)], benign, OTHERWISE)
    artifacts.trace = trace
    harmful, harmless = ([i for i in judged if bool(material.complied[i]) == side] for side in (True, False))

    def told_apart(score: dict[int, np.ndarray]) -> float | None:
        return auroc(*(np.concatenate([score[i] for i in side] or [np.empty(0)]) for side in (harmful, harmless)))
    return {"c": result.c, "cross_validated_token_auroc_by_memory": memories, "memory": memory,
            "token_auroc": told_apart(curves),
            "token_auroc_without_memory": told_apart({i: result.probe.log_odds(states[i]).numpy() for i in judged}),
            "answer_peak_auroc": auroc([peaks[i] for i in harmful], [peaks[i] for i in harmless]),
            "answer_end_auroc": told_apart({i: curves[i][-1:] for i in judged}),
            "fitted_on_tokens": len(labels), "fitted_on_answers": len(fitted), "validated_on_answers": len(judged),
            "harmful_answers_crossing": float(np.mean([peaks[i] >= trace.threshold for i in harmful] or [False])),
            "benign_answers_crossing": alarms}


def follow(trace: TraceArtifact, states: torch.Tensor) -> np.ndarray:
    """[m] P(harm) along an answer whose m tokens are chosen from states [m, width], as the engine draws it."""
    running, before = [], None
    for log_odds in trace.probe.log_odds(states).tolist():
        before = trace.follow(before, log_odds)
        running.append(before)
    return torch.tensor(running).sigmoid().numpy()


def _spread(rows: np.ndarray) -> np.ndarray:
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(TOKENS, len(rows))).round().astype(int))]


def _compare_memories(material: Material, states: dict[int, torch.Tensor], x: dict[int, np.ndarray],
                      fitted: Sequence[int], c: float) -> dict[float, float]:
    """{memory: AUROC over all tokens of answers that the probe was not fitted on}."""
    numbers, harmful = np.array(fitted), material.complied[list(fitted)]
    folds = min(5, int(harmful.sum()), int((~harmful).sum()))
    if folds < 2:
        return {0.0: 0.5}
    probes: dict[int, Probe] = {}
    for kept, left in StratifiedKFold(folds, shuffle=True, random_state=material.recipe.seed).split(numbers, harmful):
        labels = np.concatenate([np.full(len(x[i]), bool(material.complied[i])) for i in numbers[kept].tolist()])
        probe = fit_probe(np.concatenate([x[i] for i in numbers[kept].tolist()]), labels, c=c)
        probes |= {index: probe for index in numbers[left].tolist()}
    found = {}
    for memory in MEMORIES:
        curves = {i: follow(TraceArtifact(probes[i], OTHERWISE, memory), states[i]) for i in fitted}
        sides = [np.concatenate([curves[i] for i in fitted if bool(material.complied[i]) == side])
                 for side in (True, False)]
        found[memory] = auroc(*sides) or 0.5
    return found
