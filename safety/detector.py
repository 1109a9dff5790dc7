"""Logistic probes: the linear detectors of all three methods, fitted by scikit-learn, applied in torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # of C, tried by cross-validation


@dataclass(frozen=True)
class Probe:
    """P(harm | x) = sigmoid(<weight, x> + bias). weight: fp32 [features]; bias: fp32 scalar tensor."""

    weight: Tensor
    bias: Tensor

    def probability(self, x: Tensor) -> Tensor:
        """x [..., features], any float dtype -> fp32 [...], on the device of `x`."""
        return torch.sigmoid(self.log_odds(x))

    def log_odds(self, x: Tensor) -> Tensor:
        """x [..., features], any float dtype -> fp32 [...], on the device of `x`: <weight, x> + bias."""
        return x.float() @ self.weight.to(x.device) + self.bias.to(x.device)

    def to(self, device: torch.device) -> "Probe":
        """The same probe on another device."""
        return Probe(self.weight.to(device), self.bias.to(device))


@dataclass(frozen=True)
class Fit:
    """A probe and how well its recipe does across folds. c: the regularisation chosen; auroc: of the out-of-fold
    `scores` [samples] (log-odds)."""

    probe: Probe
    c: float
    auroc: float
    scores: np.ndarray


def fit_probe(x: np.ndarray, y: np.ndarray, *, c: float = 1.0, pca: int | None = None, seed: int = 0) -> Probe:
    """Fit standardised (and, with `pca`, dimension-reduced) logistic regression and fold it into one linear probe.

    Args:
        x: [samples, features]. y: [samples], 1 = harmful. Classes are weighted equally.
        c: inverse regularisation strength, as in scikit-learn.
        pca: number of principal components kept, as in SAPT's released detector; None keeps all features.
    """
    return _Reduced(x, pca, seed).fit(np.asarray(y), c)


def cross_fit(x: np.ndarray, y: np.ndarray, groups: Sequence[object] | None = None, *,
              strengths: Sequence[float] = STRENGTHS, folds: int = 5, seed: int = 0) -> Fit:
    """Fit a probe whose regularisation is chosen by cross-validated AUROC.

    Args:
        groups: samples of one group (say, the tokens of one answer) stay in one fold; None: each by itself.
        strengths: values of C to try.
    """
    y = np.asarray(y)
    names = np.unique(np.arange(len(y)) if groups is None else np.asarray(groups, dtype=str), return_inverse=True)[1]
    folds = min([folds, *(len(set(names[y == side])) for side in (0, 1))])
    if folds < 2:
        return Fit(fit_probe(x, y, c=strengths[0], seed=seed), strengths[0], float("nan"), np.zeros(len(y)))
    reduced = _Reduced(x, None, seed)
    splits = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(reduced.z, y, names))
    tried = {}
    for c in strengths:
        scores = np.zeros(len(y))
        for fit, test in splits:
            scores[test] = _regression(c).fit(reduced.z[fit], y[fit]).decision_function(reduced.z[test])
        tried[c] = (float(roc_auc_score(y, scores)), scores)
    best = max(tried, key=lambda c: tried[c][0])
    return Fit(reduced.fit(y, best), best, *tried[best])


def _regression(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=2000, class_weight="balanced")


class _Reduced:
    """Standardised samples in a basis with at most as many dimensions as there are samples.

    Logistic regression with an L2 penalty gives the same answer in every rotated basis that spans the samples, so
    49,000 logits of 300 samples are fitted in 300 dimensions, exactly, unless `pca` asks for fewer.
    """

    def __init__(self, x: np.ndarray, pca: int | None, seed: int) -> None:
        x = np.asarray(x, np.float64)
        self.mean, scale = x.mean(0), x.std(0)
        self.scale = np.where(scale > 0, scale, 1.0)
        standard = (x - self.mean) / self.scale
        if pca is not None:
            # The samples are centred, so the components need no mean of their own.
            self.basis = PCA(pca, random_state=seed).fit(standard).components_
        elif x.shape[1] > x.shape[0]:
            # An orthonormal basis of the samples' span, from the small Gram matrix.
            values, vectors = np.linalg.eigh(standard @ standard.T)
            kept = values > values.max() * 1e-10
            self.basis = (vectors[:, kept] / np.sqrt(values[kept])).T @ standard
        else:
            self.basis = None
        self.z = standard if self.basis is None else standard @ self.basis.T

    def fit(self, y: np.ndarray, c: float) -> Probe:
        """Every step is affine, so the whole pipeline's log-odds are one weight and one bias on the raw features."""
        regression = _regression(c).fit(self.z, y)
        weight = regression.coef_[0] if self.basis is None else regression.coef_[0] @ self.basis
        weight = weight / self.scale
        bias = float(regression.intercept_[0]) - float(weight @ self.mean)
        return Probe(torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32))
