"""The report's figures, as SVG text; equal summaries give equal figures. Colours can be told apart by everybody."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = ("#4d4d4d", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX*"
Summary = Mapping[str, Any]


def figures(summary: Summary) -> list[tuple[str, str]]:
    """(caption, SVG) of every figure that the summary has numbers for."""
    made = [
        ("Attack success by suite, with 95 % intervals. Lower is safer.",
         _by_suite(summary, "attack_success", "attack success")),
        ("Over-refusal by suite, with 95 % intervals. Lower is more helpful.",
         _by_suite(summary, "over_refusal", "over-refusal")),
        ("Safety against helpfulness: the lower left corner is best. The line moves SASA's threshold.",
         _pareto(summary, "benign requests", "over_refusal", "over-refusal of benign requests")),
        ("Safety against utility: the lower right corner is best.",
         _pareto(summary, "known answers", "utility", "utility where the answer is known")),
        ("Detectors: harmful requests found against false alarms.", _roc(summary)),
        ("Are the detectors' probabilities true? Points on the diagonal are; their size is the share of readings.",
         _calibration(summary)),
        ("Delayed awareness: share of answers to harmful requests that have begun to refuse by a token.",
         _awareness(summary))]
    return [(caption, svg) for caption, svg in made if svg]


def auroc(curve: Mapping[str, Any]) -> str:
    """An AUROC for people, "0.91 (0.86–0.96)"; words where there are too few requests of a label for an interval."""
    interval = "too few for an interval" if curve["low"] is None else f"{curve['low']:.2f}–{curve['high']:.2f}"
    return f"{curve['auroc']:.2f} ({interval})"


def _draw(size: tuple[float, float], paint: Callable[[Axes], None]) -> str:
    """SVG of one set of axes, painted by `paint`."""
    with plt.rc_context({"svg.hashsalt": "safety", "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False, "svg.fonttype": "path"}):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        try:
            paint(axes)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            return file.getvalue()
        finally:
            plt.close(figure)


def _style(number: int) -> dict[str, Any]:
    """Colour and mark of an arm; where there are more arms than colours, each pair of the two occurs once."""
    turn, place = divmod(number, len(COLOURS))
    return {"color": COLOURS[place], "marker": MARKS[(place + turn) % len(MARKS)]}


def _beside_legend(least: float, lines: int) -> tuple[float, float]:
    """Width and height in inches, the latter at least `least`, of a figure beside a legend of so many lines. Many arms
    have long names."""
    return 6.5 if lines <= len(COLOURS) else 9.5, max(least, 0.5 + 0.2 * lines)


def _by_suite(summary: Summary, measure: str, label: str) -> str:
    suites = [suite for suite, arms in summary["suites"].items()
              if all(row[measure] for row in arms.values())]
    arms = list(summary["lanes"])

    def paint(axes: Axes) -> None:
        for number, arm in enumerate(arms):
            for place, suite in enumerate(suites):
                row = summary["suites"][suite][arm][measure]
                y = place + (number - (len(arms) - 1) / 2) * 0.8 / len(arms)
                axes.plot([row["low"], row["high"]], [y, y], color=_style(number)["color"], linewidth=1.2)
                axes.plot(row["rate"], y, markersize=5, linestyle="none", label=arm if not place else None,
                          **_style(number))
        axes.set(yticks=range(len(suites)), yticklabels=suites, xlim=(-0.02, 1.02), xlabel=label)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    width, height = _beside_legend(0.8 + len(suites) * max(0.4, 0.13 * len(arms)), len(arms))
    return "" if not suites else _draw((1 + width, height), paint)


def _pareto(summary: Summary, group: str, measure: str, label: str) -> str:
    attacks, others = summary["pooled"].get("picture attacks", {}), summary["pooled"].get(group, {})

    def paint(axes: Axes) -> None:
        for number, (arm, points) in enumerate(summary["sweeps"].items()):
            drawn = [(p[measure], p["attack_success"]) for p in points if p.get(measure) is not None]
            if drawn:
                axes.step(*zip(*drawn, strict=True), color="#888888", linewidth=1, where="post",
                          linestyle=("-", "--", ":", "-.")[number % 4], label=f"{arm}, any threshold")
        for number, arm in enumerate(attacks):
            x, y = others[arm][measure], attacks[arm]["attack_success"]
            axes.errorbar(x["rate"], y["rate"], xerr=[[x["rate"] - x["low"]], [x["high"] - x["rate"]]],
                          yerr=[[y["rate"] - y["low"]], [y["high"] - y["rate"]]], linewidth=0.8, label=arm,
                          linestyle="none", **_style(number))
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=label, ylabel="success of picture attacks")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _draw(_beside_legend(4.2, len(attacks) + len(summary["sweeps"])), paint) if attacks and others else ""


def _detectors(summary: Summary) -> list[tuple[str, Mapping[str, Any]]]:
    """(label, curve): each detector once, from the first arm that reads it."""
    names = {"gate": "SASA's probe", "check": "SAPT's checks", "trace": "trace, highest", "trace token": "trace, token"}
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for arm, curves in summary["detectors"].items():
        for kind, curve in curves.items():
            if kind not in found:
                found[kind] = (f"{names[kind]} ({arm}): AUROC {auroc(curve)}, n = {curve['n']}", curve)
    return list(found.values())


def _roc(summary: Summary) -> str:
    def paint(axes: Axes) -> None:
        for number, (label, curve) in enumerate(_detectors(summary), 1):
            axes.plot(curve["roc"]["false_alarms"], curve["roc"]["recall"], label=label,
                      color=_style(number)["color"], linestyle=("-", "--", ":", "-.")[number % 4])
        axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=0.8)
        axes.set(xlabel="false alarms on benign requests", ylabel="harmful requests found")
        axes.legend(loc="lower right", frameon=False)
    return _draw((5, 4), paint) if _detectors(summary) else ""


def _calibration(summary: Summary) -> str:
    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=0.8)
        for number, (label, curve) in enumerate(_detectors(summary), 1):
            bins: Sequence[Mapping[str, float]] = curve["calibration"]
            axes.scatter([b["predicted"] for b in bins], [b["observed"] for b in bins],
                         s=[10 + 190 * b["n"] / curve["n"] for b in bins], alpha=0.7, label=label.split(":")[0],
                         **_style(number))
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.05, 1.05), xlabel="probability of harm",
                 ylabel="share that is harmful")
        axes.legend(loc="upper left", frameon=False)
    return _draw((5, 4), paint) if _detectors(summary) else ""


def _awareness(summary: Summary) -> str:
    def paint(axes: Axes) -> None:
        last = summary["settings"]["max_new_tokens"]
        for number, (arm, row) in enumerate(summary["awareness"].items()):
            if row["n"]:
                steps = [0, *row["tokens"], last]
                shares = [0.0, *((i + 1) / row["n"] for i in range(len(row["tokens"]))),
                          len(row["tokens"]) / row["n"]]
                axes.step(steps, shares, where="post", label=arm, color=_style(number)["color"],
                          linestyle=("-", "--", ":", "-.")[number % 4])
        axes.set(xlim=(0, last), ylim=(0, 1.02), xlabel="token of the answer", ylabel="have begun to refuse")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    shown = sum(bool(row["n"]) for row in summary["awareness"].values())
    return _draw(_beside_legend(3.6, shown), paint) if shown else ""
