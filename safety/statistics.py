"""Rates with their uncertainty."""

import math
from collections.abc import Sequence

from scipy.stats import binomtest


def rate(hits: int, n: int) -> dict[str, float]:
    """{"rate", "low", "high", "hits", "n"}: a proportion with its Wilson 95 % interval."""
    if n == 0:
        return {"rate": math.nan, "low": 0.0, "high": 1.0, "hits": 0, "n": 0}
    interval = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return {"rate": hits / n, "low": float(interval.low), "high": float(interval.high), "hits": hits, "n": n}


def conformal_threshold(benign_scores: Sequence[float], false_alarms: float) -> float:
    """The score that a new benign sample reaches with probability at most `false_alarms` (split conformal): the
    ceil((n+1)(1-a))-th smallest of n calibration scores; infinity when n is too small for such a promise."""
    rank = math.ceil((len(benign_scores) + 1) * (1 - false_alarms))
    return sorted(benign_scores)[rank - 1] if rank <= len(benign_scores) else math.inf
