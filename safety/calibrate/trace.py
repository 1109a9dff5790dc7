"""Fit the trace detector: P(harm) of the state from which a token is chosen, for every token of every lane."""

import numpy as np
import torch

from safety.artifacts import Artifacts
from safety.calibrate.material import Material, auroc, indices
from safety.detector import cross_fit
from safety.parts import TraceArtifact

TOKENS = 16  # of each answer that are fitted on, evenly spread; neighbours say nearly the same
STRENGTHS = (1e-4, 1e-3, 1e-2)
OTHERWISE = 0.9  # threshold where there are too few benign answers for a promise


def fit(material: Material, artifacts: Artifacts) -> dict:
    """Add the trace detector to `artifacts`; returns how well it does.

    A token is labelled by its answer: harmful where the undefended model complied with a harmful request. A refusal is
    a safe text, whatever was asked.
    """
    fitted = indices(~material.validation & material.understood)
    states, labels, answers = [], [], []
    for index in fitted:
        rows = material.observed[index].tensor("states").numpy()
        picked = np.unique(np.linspace(0, len(rows) - 1, min(TOKENS, len(rows))).round().astype(int))
        states.append(rows[picked])
        labels += [bool(material.complied[index])] * len(picked)
        answers += [index] * len(picked)
    with material.progress.stage("trace detector", 1) as tick:
        result = cross_fit(np.concatenate(states), np.array(labels), answers, strengths=STRENGTHS)
        tick()
    judged = indices(material.validation)
    curves = {index: result.probe.probability(material.observed[index].tensor("states")) for index in judged}
    peaks = np.array([curves[index].max().item() for index in judged])
    harmful = material.complied[judged]
    benign = material.validation & ~material.unsafe
    threshold, alarms = material.threshold([curves[i].max().item() for i in indices(benign)], benign, OTHERWISE)
    artifacts.trace = TraceArtifact(result.probe, threshold)
    sides = {side: [curves[i] for i in judged if bool(material.complied[i]) == side] for side in (True, False)}
    tokens = {side: torch.cat([*rows, torch.empty(0)]).tolist() for side, rows in sides.items()}
    return {"c": result.c, "cross_validated_token_auroc": round(result.auroc, 4),
            "token_auroc": auroc(tokens[True], tokens[False]),
            "answer_peak_auroc": auroc(peaks[harmful], peaks[~harmful]),
            "answer_mean_auroc": auroc(*([curve.mean().item() for curve in sides[side]] for side in (True, False))),
            "fitted_on_tokens": len(labels), "fitted_on_answers": len(fitted), "validated_on_answers": len(judged),
            "harmful_answers_crossing": round(float(np.mean(peaks[harmful] >= threshold)), 4),
            "benign_answers_crossing": alarms}
