"""The model card of a folder of artifacts: what it is for, what it was fitted on, what was measured, its limits."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

CARD = "README.md"
MARK = "<!-- made by python -m safety artifacts push; a card without this line is left alone -->"
TAGS = ["safety", "vision-language-model", "representation-engineering", "safetensors"]
METRICS = ("auroc", "accuracy", "recall", "false_alarms", "crossing")  # those that say how good a detector is
WHAT = {
    "sasa": "SASA (arXiv 2507.21637): the blocks to project between and the probes that refuse or pass a prompt",
    "revision": "activation revision (arXiv 2501.16378): vectors from unsafe to safe activations, with head ranking",
    "sapt": "SAPT, the Safety Reminder (arXiv 2506.15734): a soft prompt and the detectors that decide to use it",
    "trace": "the detector that draws the probability of harm under every token",
    "layers": "a probe for every block, which shows where harm becomes visible",
}
LIMITS = """\
- The detectors are linear probes fitted on one set of requests. A high probability is a sign, not a verdict, and an
  adaptive attacker can aim at them. No defense here is a guarantee.
- They fit the model and revision named above; loading refuses any other. In another number format, measure again.
- Refusal is not harmlessness: see which judge the numbers come from before comparing them.
"""


def write_card(folder: Path, config: Mapping[str, Any], name: str) -> None:
    """Write the folder's README.md, unless somebody has written one of their own.

    Args:
        config: as `read_config` returns it. name: of the repository that it will be in.
    """
    path = folder / CARD
    if not path.exists() or MARK in path.read_text(encoding="utf-8"):
        path.write_text(card(config, name), encoding="utf-8")


def card(config: Mapping[str, Any], name: str) -> str:
    """The text of the card; see `write_card`."""
    expected, about = config["fingerprint"], config["about"]
    model = str(expected.get("model"))
    base = model if model.count("/") == 1 else None  # a folder's name, or the miniature's, means nothing on the Hub
    head = ModelCardData(license="apache-2.0", library_name="lvlm-safety-demo", tags=TAGS, base_model=base)
    parts = [file.removesuffix(".safetensors") for file in config["files"]]
    settings = [(part, key, value) for part, chosen in config["settings"].items() for key, value in chosen.items()]
    lines = ["---", head.to_yaml(), "---", MARK, "", f"# Safety artifacts for {model}", "",
             "Calibrated inference-time defenses for one vision-language model, whose weights stay as they are:", ""]
    lines += [f"- **{part}**: {WHAT[part]}" for part in parts if part in WHAT]
    lines += ["", "## Use", "", "```", f"python -m safety artifacts pull {name}",
              f"python app.py --model {model} --artifacts FOLDER", "```", "", "## Made for", "",
              *_table(("", ""), [(key, value) for key, value in expected.items()]
                      + [("number format", config.get("number_format", "not recorded"))]),
              "", "## Recommended settings", "",
              *_table(("defense", "setting", "value"),
                      [*settings, ("trace", "threshold", config.get("trace_threshold"))]), ""]
    lines += _measured(about)
    lines += ["## Limits", "", LIMITS]
    return "\n".join(lines)


def _measured(about: Mapping[str, Any]) -> list[str]:
    lines = ["## Measured", ""]
    metrics = [(" ".join(path), value) for path, value in _leaves(about)
               if path[0] != "held_out" and any(word in key for key in path for word in METRICS)]
    if metrics:
        lines += [*_table(("measurement", "value"), metrics), ""]
    held_out = about.get("held_out")
    rows = [(lane, kind, f"{found['refused']['hits']} of {found['refused']['n']}")
            for lane, kinds in (held_out.items() if isinstance(held_out, dict) else ())
            for kind, found in (kinds.items() if isinstance(kinds, dict) else ())
            if isinstance(found, dict) and isinstance(found.get("refused"), dict)]
    if rows:
        lines += ["Refused on held-out requests:", "", *_table(("lane", "requests", "refused"), rows), ""]
    facts = [(key, about[key]) for key in ("date", "command") if isinstance(about.get(key), str)]
    lines += [*_table(("", ""), facts), ""] if facts else []
    return lines if len(lines) > 2 else [*lines, "Nothing was recorded: measure before use.", ""]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """((key, key, …), number) of every number in nested dictionaries."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif path and isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")
    return [f"| {' | '.join(map(cell, row))} |" for row in (head, ("---",) * len(head), *rows)]
