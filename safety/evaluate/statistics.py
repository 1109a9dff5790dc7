"""How sure are we: paired tests, correction for many of them, and intervals that respect scenarios."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 2000


def mcnemar(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Exact paired test of two lanes on the same samples: {"up", "down", "p"}.

    `up` and `down` count the samples on which the second lane scores higher and lower. For scores of 0 and 1 this is
    McNemar's exact test; for graded scores it is the sign test, of which McNemar's is the special case.
    """
    difference = np.asarray(second, float) - np.asarray(first, float)
    up, down = int((difference > 0).sum()), int((difference < 0).sum())
    return {"up": up, "down": down, "p": float(binomtest(up, up + down).pvalue) if up + down else 1.0}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the given order: p-values that bound the chance of even one false claim."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def resample_clusters(clusters: Sequence[str], seed: int = 0, count: int = RESAMPLES) -> np.ndarray:
    """Bootstrap weights [count, samples]: how often each sample is drawn when whole clusters are drawn with
    replacement. Samples of one scenario resemble each other; drawing them one by one would feign certainty."""
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(names), size=(count, len(names)))
    times = np.stack([np.bincount(row, minlength=len(names)) for row in drawn])
    return times[:, index]


def mean_interval(values: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    """{"mean", "low", "high", "n"}: mean with its 95 % bootstrap interval, clustered; empty: None throughout."""
    if not len(values):
        return {"mean": None, "low": None, "high": None, "n": 0}
    x, weights = np.asarray(values, float), resample_clusters(clusters)
    means = weights @ x / weights.sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(x.mean()), "low": float(low), "high": float(high), "n": len(x)}


def relative_reduction(before: Sequence[float], after: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    """{"reduction", "low", "high"}: 1 - mean(after) / mean(before) of paired scores, clustered bootstrap; None where
    there is nothing to reduce."""
    x, y = np.asarray(before, float), np.asarray(after, float)
    if not len(x) or x.mean() == 0:
        return {"reduction": None, "low": None, "high": None}
    weights = resample_clusters(clusters)
    bottom = weights @ x
    ratios = 1 - (weights @ y)[bottom > 0] / bottom[bottom > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"reduction": float(1 - y.mean() / x.mean()), "low": float(low), "high": float(high)}
