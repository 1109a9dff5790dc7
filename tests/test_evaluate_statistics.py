"""The statistics of an evaluation, against numbers worked out by hand or by another formula."""

import math

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from safety.evaluate.statistics import (
    auroc_interval,
    clustered_rate,
    clusters,
    holm,
    mcnemar,
    mean_interval,
    relative_reduction,
    resample_clusters,
)
from safety.evaluate.summary import curve
from safety.statistics import rate


def test_wilson_interval_is_the_textbook_formula():
    hits, n, z = 17, 24, 1.959963984540054
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = rate(hits, n)
    assert found["low"] == pytest.approx((middle - half) / (1 + z * z / n))
    assert found["high"] == pytest.approx((middle + half) / (1 + z * z / n))


def test_mcnemar_is_the_exact_binomial_tail_of_discordant_pairs():
    before = [1] * 10 + [0] * 2 + [1] * 5 + [0] * 7
    after = [0] * 10 + [1] * 2 + [1] * 5 + [0] * 7
    found = mcnemar(before, after, list(map(str, range(24))))
    assert (found["up"], found["down"], found["n"]) == (2, 10, 24)
    assert found["p"] == pytest.approx(2 * binom.cdf(2, 12, 0.5))  # 158/4096
    assert mcnemar([1, 0, 1], [1, 0, 1], list("abc"))["p"] == 1.0


def test_a_request_that_is_asked_again_is_no_further_evidence():
    assert mcnemar([1] * 9, [0] * 9, list("aaabbbccc")) == {"up": 0, "down": 3, "p": 0.25, "n": 3}
    mixed = mcnemar([1, 0, 0.1, 0.2], [0, 1, 0.2, 0.1], list("aabb"))  # up once and down once: no change
    assert (mixed["up"], mixed["down"], mixed["p"]) == (0, 0, 1.0)


def test_graded_scores_are_tested_by_their_signs():
    assert mcnemar([0.2, 0.5, 0.5, 0.5], [0.3, 0.9, 0.5, 1.0], list("abcd")) == {
        "up": 3, "down": 0, "p": pytest.approx(0.25), "n": 4}


def drawn_readings(rng, requests, times):
    """Scores, labels and requests: each request asked so many times, with nearly the same score."""
    of_request = np.concatenate([rng.normal(1.5, 1, requests), rng.normal(0, 1, requests)])
    scores = np.repeat(of_request, times) + rng.normal(0, 0.1, 2 * requests * times)
    labels = np.repeat([1, 0], requests * times)
    return scores, labels, [str(i // times) for i in range(len(scores))]


@pytest.mark.parametrize("times", (1, 6))
def test_auroc_interval_covers_what_repeated_draws_give(times):
    rng = np.random.default_rng(0)
    draws = [drawn_readings(rng, 40, times) for _ in range(600)]
    spread = 1.96 * np.std([roc_auc_score(labels, scores) for scores, labels, _ in draws])
    halves = [(high - low) / 2 for low, high in (auroc_interval(*draw) for draw in draws[:100])]
    assert np.mean(halves) == pytest.approx(spread, rel=0.1)


def test_auroc_interval_is_delongs_where_no_request_repeats():
    scores, labels = [0.9, 0.8, 0.4, 0.6, 0.4, 0.1], [1, 1, 1, 0, 0, 0]
    wins = np.array([[float(p > q) + 0.5 * (p == q) for q in scores[3:]] for p in scores[:3]])
    area = wins.mean()
    shares = [*((wins.mean(1) - area) / 3), *((wins.mean(0) - area) / 3)]
    half = 1.959963984540054 * math.sqrt(6 / 5 * sum(share ** 2 for share in shares))
    assert auroc_interval(scores, labels, list("abcdef")) == (pytest.approx(area - half), min(1.0, area + half))
    assert auroc_interval([3, 4, 1, 2], [1, 1, 0, 0], list("abcd")) == (1.0, 1.0)


def test_rates_count_repeated_requests_for_less():
    ones = [1.0] * 20 + [0.0] * 10
    distinct = clustered_rate(ones, list(map(str, range(30))))
    assert distinct == {**rate(20, 30), "requests": 30}
    thrice = clustered_rate([value for value in ones for _ in range(3)], [str(i // 3) for i in range(90)])
    # Answers that repeat exactly: 30 requests, of which one degree of freedom goes into the mean.
    assert thrice["low"] == pytest.approx(distinct["low"], abs=0.01)
    assert thrice["high"] == pytest.approx(distinct["high"], abs=0.01)
    assert (thrice["hits"], thrice["n"], thrice["requests"]) == (60, 90, 30)
    alike = clustered_rate([0.0, 1.0] * 20, [str(i // 2) for i in range(40)])  # no request stands out
    assert (alike["low"], alike["high"]) == (pytest.approx(rate(10, 20)["low"]), pytest.approx(rate(10, 20)["high"]))
    none = clustered_rate([0.0] * 30, [str(i // 3) for i in range(30)])
    assert (none["rate"], none["low"], none["high"]) == (0.0, 0.0, pytest.approx(rate(0, 10)["high"]))
    assert clustered_rate([1.0, 1.0], ["a", "a"])["low"] < 0.25  # one request, asked twice


def test_a_bootstrap_needs_some_scenarios():
    requests = list(map(str, range(12)))
    assert clusters(list("abcdef") * 2, requests) == [f"scenario {name}" for name in "abcdef" * 2]
    assert clusters(list("ab") * 6, requests) == requests  # two scenarios: their two means and nothing else
    assert len(set(clusters([""] * 12, requests))) == 12  # no scenario is not one scenario
    assert mean_interval([0.5, 0.7], ["a", "a"]) == {"mean": 0.6, "low": None, "high": None, "n": 2}
    assert relative_reduction([1, 1], [1, 0], ["a", "a"]) == {"reduction": 0.5, "low": None, "high": None}


def test_holm_by_hand_keeps_order_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_bootstrap_draws_whole_scenarios():
    weights = resample_clusters(["a", "a", "b", "b", "b", "c"], count=50)
    assert weights.shape == (50, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 2] == weights[:, 3]).all()
    assert (weights[:, [0, 2, 5]].sum(1) == 3).all()


def test_clustered_intervals_are_wider_when_scenarios_differ():
    values, scenarios = [1.0] * 20 + [0.0] * 20, ["a"] * 20 + ["b"] * 20
    clustered = mean_interval(values, scenarios)
    single = mean_interval(values, [str(i) for i in range(40)])
    assert clustered["mean"] == single["mean"] == 0.5
    assert clustered["high"] - clustered["low"] > 2 * (single["high"] - single["low"])
    assert mean_interval([], []) == {"mean": None, "low": None, "high": None, "n": 0}


def test_relative_reduction():
    found = relative_reduction([1, 1, 1, 1], [0, 0, 0, 1], list("abcd"))
    assert found["reduction"] == 0.75
    assert found["low"] <= 0.75 <= found["high"]
    assert relative_reduction([0, 0], [0, 0], list("ab"))["reduction"] is None


def test_detector_curve_of_a_perfect_and_a_useless_detector():
    perfect = curve([(0.9, 1, "a"), (0.8, 1, "b"), (0.2, 0, "c"), (0.15, 0, "d")])
    assert perfect["auroc"] == 1.0
    assert [(b["predicted"], b["observed"], b["n"]) for b in perfect["calibration"]] == [
        (0.15, 0.0, 1), (0.2, 0.0, 1), (0.8, 1.0, 1), (0.9, 1.0, 1)]
    assert curve([(0.5, 1, "a"), (0.5, 0, "b")])["auroc"] == 0.5


def test_a_detector_gets_an_interval_from_ten_requests_of_each_label_on():
    few = [(0.1 * (i % 7) + 0.2 * label, label, f"{label} {i % 9}") for label in (0, 1) for i in range(30)]
    assert curve(few)["low"] is None and curve(few)["requests"] == 18
    enough = [*few, (0.1, 0, "one more"), (0.9, 1, "and one more")]
    found = curve(enough)
    assert found["low"] < found["auroc"] < found["high"]
