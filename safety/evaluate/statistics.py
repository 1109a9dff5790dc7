"""How sure are we: paired tests, correction for many of them, and intervals that respect what is alike.

Two things make answers alike. One request may be asked several times (typeset in two styles, or beside three pictures):
rates and tests count such answers for less. And requests of one scenario resemble each other: means and reductions are
resampled by whole scenarios.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from safety.statistics import rate

RESAMPLES = 2000
FEWEST = 5  # scenarios that a bootstrap needs: of two or three it would only give back their means


def mcnemar(first: Sequence[float], second: Sequence[float], requests: Sequence[str]) -> dict[str, Any]:
    """Exact paired test of two lanes on the same samples: {"up", "down", "p", "n"}.

    A request is one observation, however often it was asked: its scores are averaged. `n` counts requests, `up` and
    `down` those on which the second lane scores higher and lower. For scores of 0 and 1, each of another request, this
    is McNemar's exact test; otherwise it is the sign test, of which McNemar's is the special case.
    """
    names, index = np.unique(np.asarray(requests, dtype=object).astype(str), return_inverse=True)
    difference = np.bincount(index, np.asarray(second, float) - np.asarray(first, float), len(names))
    up, down = int((difference > 1e-9).sum()), int((difference < -1e-9).sum())  # sums of shares are inexact
    return {"up": up, "down": down, "p": float(binomtest(up, up + down).pvalue) if up + down else 1.0, "n": len(names)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the given order: p-values that bound the chance of even one false claim."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def clustered_rate(values: Sequence[float], requests: Sequence[str]) -> dict[str, Any]:
    """{"rate", "low", "high", "hits", "n", "requests"}: share of ones among zeros and ones, with its 95 % interval.

    Wilson's interval where every value belongs to another request. Where requests repeat, Wilson's for the effective
    number of answers: as many independent ones as would vary as much as the requests' rates do (Kish's design effect).
    Where the values do not vary, that is the number of requests.
    """
    x = np.asarray(values, float)
    names, index = np.unique(np.asarray(requests, dtype=object).astype(str), return_inverse=True)
    n, distinct, hits = len(x), len(names), int(x.sum())
    if distinct == n:
        return {**rate(hits, n), "requests": n}
    p = hits / n
    excess = np.bincount(index, x - p, distinct)
    variance = distinct / (distinct - 1) * float(excess @ excess) / n ** 2 if distinct > 1 else 0.0
    effective = min(n, p * (1 - p) / variance) if variance else distinct
    z = float(norm.ppf(0.975))
    middle, half = p + z * z / (2 * effective), z * (p * (1 - p) / effective + (z / (2 * effective)) ** 2) ** 0.5
    low, high = ((middle + side) / (1 + z * z / effective) for side in (-half, half))
    return {"rate": p, "low": min(p, max(0.0, low)), "high": max(p, min(1.0, high)), "hits": hits, "n": n,
            "requests": distinct}


def clusters(scenarios: Sequence[str], requests: Sequence[str]) -> list[str]:
    """What a bootstrap draws as a whole, for each sample: its scenario, or, where it has none or there are fewer than
    FEWEST scenarios, its request."""
    names = [f"scenario {scenario}" if scenario else f"request {request}"
             for scenario, request in zip(scenarios, requests, strict=True)]
    return names if len(set(names)) >= FEWEST else list(requests)


def resample_clusters(clusters: Sequence[str], seed: int = 0, count: int = RESAMPLES) -> np.ndarray:
    """Bootstrap weights [count, samples]: how often each sample is drawn when whole clusters are drawn with
    replacement. Samples of one scenario resemble each other; drawing them one by one would feign certainty."""
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(names), size=(count, len(names)))
    times = np.stack([np.bincount(row, minlength=len(names)) for row in drawn])
    return times[:, index]


def mean_interval(values: Sequence[float], where: Sequence[str]) -> dict[str, Any]:
    """{"mean", "low", "high", "n"}: mean with its 95 % bootstrap interval over the clusters `where`; without an
    interval (None) where there is one cluster only; empty: None throughout."""
    if not len(values):
        return {"mean": None, "low": None, "high": None, "n": 0}
    x = np.asarray(values, float)
    found = {"mean": float(x.mean()), "low": None, "high": None, "n": len(x)}
    if len(set(where)) > 1:
        weights = resample_clusters(where)
        found["low"], found["high"] = map(float, np.percentile(weights @ x / weights.sum(1), [2.5, 97.5]))
    return found


def auroc_interval(scores: Sequence[float] | np.ndarray, labels: Sequence[int] | np.ndarray,
                   requests: Sequence[str]) -> tuple[float, float]:
    """95 % interval of the area under the ROC curve of scores with labels 1 and 0, where answers to one request, or the
    tokens of one answer, are alike: Obuchowski's standard error (Biometrics 53, 1997), which sums each request's share
    of DeLong's. Without repeated requests it is DeLong's."""
    x, y = np.asarray(scores, float), np.asarray(labels) == 1
    names, index = np.unique(np.asarray(requests, dtype=object).astype(str), return_inverse=True)

    def above(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Of each value: the share of the others that it exceeds, ties counting half."""
        ordered = np.sort(others)
        return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2 / len(others)

    found, missed = above(x[y], x[~y]), above(x[~y], x[y])
    area = float(found.mean())
    share = np.empty(len(x))
    share[y], share[~y] = (found - area) / len(found), (1 - missed - area) / len(missed)
    sums = np.bincount(index, share, len(names))
    half = float(norm.ppf(0.975)) * (len(names) / (len(names) - 1) * float(sums @ sums)) ** 0.5
    return max(0.0, area - half), min(1.0, area + half)


def relative_reduction(before: Sequence[float], after: Sequence[float], where: Sequence[str]) -> dict[str, Any]:
    """{"reduction", "low", "high"}: 1 - mean(after) / mean(before) of paired scores, bootstrap over the clusters
    `where`; None where there is nothing to reduce, and no interval where there is one cluster only."""
    x, y = np.asarray(before, float), np.asarray(after, float)
    if not len(x) or x.mean() == 0:
        return {"reduction": None, "low": None, "high": None}
    found = {"reduction": float(1 - y.mean() / x.mean()), "low": None, "high": None}
    if len(set(where)) > 1:
        weights = resample_clusters(where)
        bottom = weights @ x
        ratios = 1 - (weights @ y)[bottom > 0] / bottom[bottom > 0]
        found["low"], found["high"] = map(float, np.percentile(ratios, [2.5, 97.5]))
    return found
