"""The report of an evaluation, from its summary alone: one self-contained HTML page and a Markdown table.

Everything that a model wrote, or that came in a sample, is escaped by the template engine.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from safety.errors import UserError
from safety.evaluate.figures import auroc, figures

MEASURES = {"attack_success": "attack success", "on_topic": "and on topic", "over_refusal": "over-refusal",
            "refusal": "refusal", "utility": "utility", "garbage": "garbage", "harmful": "harmful"}
FEW = 5  # attacks that must succeed without a defense before a reduction says anything
JUDGED = ("attack_success", "on_topic", "over_refusal", "refusal")


def percent(row: Mapping[str, Any] | None) -> str:
    """A rate with its interval for people: "17/24, 71 % (51–85)", "80/90 (40 requests), 89 % (78–95)" where requests
    repeat; a dash where there is none."""
    if row is None or row["rate"] is None or not row["n"]:
        return "–"
    count = f"{row['hits']}/{row['n']}" if row["hits"] is not None else f"n = {row['n']}"
    distinct = f" ({row['requests']} requests)" if row["requests"] < row["n"] else ""
    return f"{count}{distinct}, {100 * row['rate']:.0f} % ({100 * row['low']:.0f}–{100 * row['high']:.0f})"


def quantity(row: Mapping[str, Any]) -> str:
    """A mean with its interval for people; without one where all comes from one cluster."""
    if row["mean"] is None:
        return "–"
    digits = 0 if row["mean"] >= 10 else 1 if row["mean"] >= 1 else 2
    interval = "" if row["low"] is None else f" ({row['low']:.{digits}f}–{row['high']:.{digits}f})"
    return f"{row['mean']:.{digits}f}{interval}, n = {row['n']}"


def reduction(row: Mapping[str, Any] | None) -> str:
    """A relative reduction with its interval for people: "32 % (19 to 48)"; a dash where there is none, and words where
    so few attacks succeed without a defense that one more or less would be a large share."""
    if row is None or row["reduction"] is None:
        return "–"
    if row["before"] < FEW:
        return f"too few: {row['before']} of {row['n']} succeed without"
    return f"{100 * row['reduction']:.0f} %{_interval(row)}"


def difference(row: Mapping[str, Any] | None) -> str:
    """A paired difference of rates with its interval for people: "+3 points (-1 to 8)"; a dash where there is none, and
    words where no answer changed: a bootstrap would be certain of that."""
    if row is None:
        return "–"
    if not row["changed"]:
        return f"none of {row['n']} differ"
    return f"{100 * row['mean']:+.0f} points{_interval(row)}"


def _interval(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f" ({100 * row['low']:.0f} to {100 * row['high']:.0f})"


def small(p: float) -> str:
    """A p-value for people."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def kappa(summary: Mapping[str, Any]) -> str:
    """The refusal judge's agreement with human labels, as it stands beside every rate it judged."""
    measured = (summary["judge"]["agreement"] or {"judges": {}})["judges"].get(summary["judge"]["name"])
    return f"κ {measured['kappa']:.2f}" if measured else "κ not measured"


def headings(summary: Mapping[str, Any]) -> dict[str, str]:
    """Column titles by measure; those that the refusal judge decides say how well it agrees with people."""
    said = {name: f"{title} ({kappa(summary)})" if name in JUDGED else title for name, title in MEASURES.items()}
    judge = summary["judge"]["model"]
    return {**said, "harmful": f"harmful ({judge})"} if judge else {
        name: title for name, title in said.items() if name != "harmful"}


def headline(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table that says it in short, one row a lane: (column titles, rows)."""
    judged = kappa(summary)
    wanted = [("picture attacks", "attack_success", f"picture attacks that succeed ({judged})"),
              ("picture attacks", "on_topic", "and answer on topic"),
              ("text attacks", "attack_success", f"text attacks that succeed ({judged})"),
              ("benign requests", "over_refusal", f"benign requests refused ({judged})"),
              ("known answers", "utility", "right words where the answer is known")]
    wanted = [column for column in wanted if column[0] in summary["pooled"]]
    paired = {("picture attacks", "attack_success"): ("reduced by", reduction, "reductions"),
              ("benign requests", "over_refusal"): ("more refused", difference, "differences"),
              ("known answers", "utility"): ("more right words", difference, "differences")}
    columns: list[tuple[str, list[str]]] = []
    for group, measure, title in wanted:
        columns.append((title, [percent(summary["pooled"][group][lane][measure]) for lane in summary["lanes"]]))
        if (group, measure) in paired:
            heading, shown, where = paired[group, measure]
            rows = {row["lane"]: row for row in summary[where] if (row["suite"], row["measure"]) == (group, measure)}
            if rows:
                columns.append((heading, [shown(rows.get(lane)) for lane in summary["lanes"]]))
    cells = zip(summary["lanes"], *(values for _, values in columns), strict=True)
    return [title for title, _ in columns], [list(row) for row in cells]


def _environment(escape: bool) -> Environment:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=escape,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "quantity": quantity, "reduction": reduction, "difference": difference,
                            "auroc": auroc, "small": small,
                            "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " ")}
    return environment


def write_report(folder: Path) -> list[Path]:
    """Write report.html and report.md beside a summary.json; returns their paths.

    Raises:
        UserError: no summary there, or one that this version does not understand.
    """
    source = folder / "summary.json"
    try:
        summary = json.loads(source.read_text(encoding="utf-8"))
        for row in summary["reductions"]:
            place = summary["pooled" if row["suite"] in summary["pooled"] else "suites"][row["suite"]]
            row["before"] = place[row["against"]]["attack_success"]["hits"]
        drawn = [(caption, base64.b64encode(svg.encode()).decode()) for caption, svg in figures(summary)]
        context = {"summary": summary, "headings": headings(summary), "kappa": kappa(summary),
                   "headline": headline(summary)}
        pages = {folder / "report.md": _environment(False).get_template("report.md").render(context),
                 folder / "report.html": _environment(True).get_template("report.html").render(figures=drawn,
                                                                                              **context)}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{source} is missing or damaged ({error}). Evaluate first: python -m safety evaluate "
                        f"--out {folder}.") from error
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return list(pages)
