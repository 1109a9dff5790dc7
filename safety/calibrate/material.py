"""What the fits work on: the samples as the model saw them, which of them judge, and what was learned on the way."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from safety.calibrate import soft_prompt
from safety.calibrate.observe import Observed
from safety.calibrate.progress import Progress
from safety.lvlm import LVLM
from safety.refusal import refusal_start
from safety.samples import Sample
from safety.settings import Sapt
from safety.statistics import conformal_threshold

PARTS = ("sasa", "revision", "sapt", "trace")
JUDGES = 4  # every so many-th sample of a label and kind takes part in no fit
Construction = Literal["multi-response", "multi-instruction", "text-response"]


@dataclass(frozen=True)
class Recipe:
    """What a person can choose about a calibration.

    Attributes:
        answer_tokens: length of the undefended answers that are learned from.
        false_alarms: share of benign requests of any kind that a threshold may stop (split conformal).
        per_scenario: samples of each scenario, label and kind that SASA's probes are fitted on; the paper takes 10.
            None: all.
        construction: how revision's contrasting pairs are made; see `safety.calibrate.revision`.
        pairs: how many of them at most; the paper takes 200.
        detector: SAPT's, "joint" (the paper) or "frozen" (the authors' code).
        soft: hyperparameters of SAPT's training. interval: generated tokens between SAPT's checks.
        seed: of everything that is drawn.
    """

    answer_tokens: int = 48
    false_alarms: float = 0.05
    per_scenario: int | None = None
    construction: Construction = "multi-response"
    pairs: int = 200
    detector: Literal["joint", "frozen"] = Sapt.detector
    soft: soft_prompt.Recipe = field(default_factory=soft_prompt.Recipe)
    interval: int = Sapt.interval
    seed: int = 0


@dataclass
class Material:
    """Observed samples. A quarter of every label and kind is kept out of every fit, with all that asks the same, to set
    thresholds and to judge."""

    lvlm: LVLM
    samples: Sequence[Sample]
    observed: Sequence[Observed]
    recipe: Recipe
    work: Path
    out: Path
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def unsafe(self) -> np.ndarray:
        """[samples] bool: is the request harmful?"""
        return np.array([sample.unsafe for sample in self.samples])

    @cached_property
    def requests(self) -> np.ndarray:
        """[samples] str: the same for samples that ask the same. One asked again in another picture says nothing new,
        so cross-validation keeps them in one fold."""
        return np.array([sample.request_digest for sample in self.samples])

    @cached_property
    def openly(self) -> np.ndarray:
        """[samples] bool: does the prompt or its picture ask for it? Where only the given answer shows what was asked,
        detectors of answers can learn from a sample, those of prompts cannot."""
        return np.array([sample.request is None or sample.image is not None for sample in self.samples])

    @cached_property
    def answered(self) -> np.ndarray:
        """[samples] bool: is there an answer? A sample whose given response is empty shows a request to probes of
        prompts and nothing else."""
        return np.array([sample.response != "" for sample in self.samples])

    @cached_property
    def reading_only(self) -> np.ndarray:
        """[samples] bool: shows its request to the probe of SASA's mode "reading" alone. Thousands of texts are cheap
        there, as logits they are not; and requests whose harm first-token logits do not show (innocent words about a
        symbol) would set the threshold for all others."""
        return np.array([sample.reading_only for sample in self.samples])

    @cached_property
    def validation(self) -> np.ndarray:
        """[samples] bool: the fourth, eighth, … of every label and kind of those openly asked, answered or not."""
        count: Counter[tuple[str, str, bool]] = Counter()
        marks = []
        for sample, openly in zip(self.samples, self.openly, strict=True):
            key = (sample.label, sample.kind, sample.response != "")
            count[key] += 1
            marks.append(bool(openly) and count[key] % JUDGES == 0)
        return np.array(marks)

    @cached_property
    def fitting(self) -> np.ndarray:
        """[samples] bool: open to fits, neither a validation sample nor one that asks what a validation sample asks."""
        return ~np.isin(self.requests, self.requests[self.validation])

    @cached_property
    def whole(self) -> np.ndarray:
        """[samples] bool: is there an answer of which more than its opening is known?"""
        return self.answered & ~np.array([sample.partial for sample in self.samples])

    @cached_property
    def judging(self) -> np.ndarray:
        """[samples] bool: validation samples by whose whole answers what acts on answers is judged."""
        return self.validation & self.whole

    @cached_property
    def complied(self) -> np.ndarray:
        """[samples] bool: a harmful request that the undefended model answered. A refusal or nothing is a safe text."""
        return self.answered & np.array([sample.unsafe and bool(seen.ids) and refusal_start(seen.answer) is None
                                         for sample, seen in zip(self.samples, self.observed, strict=True)])

    @cached_property
    def understood(self) -> np.ndarray:
        """[samples] bool: does the answer show that the request was read? Only asked of requests that stand in the
        picture: at least half of their telling words (four letters or more, in at most 2 % of all requests) must come
        up. A misread request's answer is about something else, so detectors of *answers* are not fitted on it;
        whatever is *measured*, here and in the trial, is measured on all of them."""
        words = [set(re.findall(r"[a-z]{4,}", sample.asked.lower())) for sample in self.samples]
        seen_in = Counter(word for row, openly in zip(words, self.openly, strict=True) if openly for word in row)
        telling = [{word for word in row if seen_in[word] <= max(2, 0.02 * self.openly.sum())} for row in words]
        marks = []
        for sample, row, seen in zip(self.samples, telling, self.observed, strict=True):
            said = set(re.findall(r"[a-z]{4,}", seen.answer.lower()))
            marks.append(sample.request is None or refusal_start(seen.answer) is not None
                         or len(row & said) >= 0.5 * len(row))
        return self.answered & np.array(marks)

    def prompts(self, block: int, which: np.ndarray) -> np.ndarray:
        """[chosen, width] outputs of one block at the last prompt position; reads that block alone."""
        return torch.stack([self.observed[i].row("prompt.layers", block) for i in indices(which)]).numpy()

    def threshold(self, scores: Sequence[float] | np.ndarray, which: np.ndarray, otherwise: float
                  ) -> tuple[float, dict[str, float]]:
        """(threshold that benign requests reach with probability at most `false_alarms`, share of each kind that does).

        Split conformal, for all benign validation samples together and for each kind with enough of them (2 / rate:
        with fewer, its threshold would be its single highest score); the highest of these thresholds holds for all.
        `otherwise`: the paper's fixed value, where there are too few for any promise. Scores that are 1.0 to the last
        digit are reached whatever the threshold is; the shares tell.

        Args:
            scores: one per sample of `which`, all of them benign and none of them used in fitting.
        """
        values = np.asarray(scores, float)
        kinds = np.array([self.samples[i].kind for i in indices(which)])
        enough = [kind for kind in sorted(set(kinds)) if (kinds == kind).sum() * self.recipe.false_alarms >= 2]
        groups = [values, *(values[kinds == kind] for kind in enough)]
        found = [limit for limit in (conformal_threshold(group.tolist(), self.recipe.false_alarms) for group in groups)
                 if np.isfinite(limit)]
        # Rounded up, so that no calibration score that was below reaches it.
        chosen = min(1.0, float(np.ceil(max(found) * 1e4 + 1e-9) / 1e4)) if found else otherwise
        return chosen, {kind: round(float(np.mean(values[kinds == kind] >= chosen)), 4) for kind in sorted(set(kinds))}


def indices(which: np.ndarray) -> list[int]:
    """Positions at which a [samples] bool array is true."""
    return [int(index) for index in np.flatnonzero(which)]


def auroc(positive: Sequence[float] | np.ndarray, negative: Sequence[float] | np.ndarray) -> float | None:
    """Area under the ROC curve, or None where one side is empty."""
    if not len(positive) or not len(negative):
        return None
    return round(float(roc_auc_score([1] * len(positive) + [0] * len(negative), [*positive, *negative])), 4)

