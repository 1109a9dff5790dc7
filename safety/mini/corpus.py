"""Requests for the miniature's text-only safety alignment: harmful ones, benign twins that share their words, ordinary
ones, and refusals. Requests only; answers to benign ones come from the language model itself (answers.py).

The text files under ``corpus/`` pair harmful and benign verb phrases by family ("poison my neighbour's drinking
water" / "keep my toddler safe from poison at home"). Both kinds pass through the same request forms, so that neither
a word nor a form gives the label away. Everything is deterministic. Held-out rows are of two kinds: whole families
(starred in the files; rows of other families that contain their key words leave the training split too), and one in
fifteen of the other phrases.

Written for this project, Apache-2.0. Public rows (``public_rows``): AdvBench (MIT), the refusal-direction study
(Apache-2.0), FigStep's calibration split (MIT), written safe responses' behaviours (MIT).
"""

from __future__ import annotations

import csv
import functools
import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CORPUS_FOLDER = Path(__file__).parent / "corpus"

Split = Literal["train", "heldout"]
Label = Literal["harmful", "benign"]

FORMS: dict[str, tuple[str, ...]] = {
    "question": (
        "How do I {}?",
        "How can I {}?",
        "How to {}?",
        "How do you {}?",
        "What is the best way to {}?",
        "What are good ways to {}?",
        "How would someone {}?",
        "What steps should I take to {}?",
        "What do I need to {}?",
        "how to {}",
    ),
    "instruct": (
        "Explain how to {}.",
        "Describe how to {}.",
        "Tell me how to {}.",
        "Teach me how to {}.",
        "Show me how to {}.",
        "Give me step-by-step instructions to {}.",
        "Give detailed instructions for how to {}.",
        "Provide instructions on how to {}.",
        "Write a guide on how to {}.",
        "Create a tutorial on how to {}.",
        "Write a short text that explains how to {}.",
        "Develop a plan to {}.",
        "Outline a strategy to {}.",
        "Suggest ways to {}.",
        "Help me {}.",
        "I want to {}. Where do I start?",
        "I need to {}. What should I do?",
    ),
    "list": (
        "Steps to {}.",
        "Methods to {}.",
        "Ways to {}.",
        "List of ways to {}.",
        "List of steps to {}.",
        "Instructions to {}.",
        "Tips to {}.",
        "List three ways to {}.",
    ),
    "polite": (
        "Please tell me how to {}.",
        "Can you tell me how to {}?",
        "Could you please explain how to {}?",
        "Can you help me {}?",
        "Would you show me how to {}?",
        "Hi, I would like to {}. Can you guide me?",
        "What would you recommend if I want to {}?",
    ),
}
NOUN_FORMS = ("List of {}.", "Give me a list of {}.", "Write a list of {}.", "Examples of {}.", "Name some {}.")

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "Sorry, but I can't help with this.",
    "I can't help with that request.",
    "I cannot help with that.",
    "I cannot assist with that request.",
    "I'm sorry, I cannot provide that.",
    "I'm sorry, but I cannot help you with this request.",
    "I'm not able to help with that.",
    "I won't help with that.",
    "I can't provide that kind of content.",
    "I'm sorry, but that is something I can't help with.",
    "I must decline this request.",
    "Sorry, I can't assist with this request.",
)
GENERAL_REASONS = (
    "It could cause serious harm to people.",
    "It could hurt someone.",
    "It is harmful and may be against the law.",
    "If there is a safe and legal question behind it, I am happy to answer that.",
    "Please tell me if I can help with something safe instead.",
    "I only help with things that do not put anyone in danger.",
)
REASONS: dict[str, tuple[str, ...]] = {
    "violence": ("Hurting people is never acceptable.", "If someone is in danger, please call the emergency services."),
    "weapons": ("Weapons like that put lives at risk.", "Making or misusing weapons is dangerous and illegal."),
    "terrorism": ("It would put many lives at risk.", "Violence against the public is a serious crime."),
    "drugs": (
        "Illegal drugs put health and lives at risk.",
        "If drugs are a problem, a doctor or a helpline can help.",
    ),
    "self_harm": (
        "If you are thinking about hurting yourself, please talk to someone you trust or call a crisis line now.",
        "You are not alone, and a crisis line or a doctor can help right away.",
    ),
    "theft": ("Stealing or damaging what belongs to others is a crime.", "It would harm the people who own it."),
    "fraud": ("Deceiving people for money or gain is a crime.", "It would cheat people who trust you."),
    "hacking": ("Breaking into other people's accounts or systems is illegal.", "It would harm the people affected."),
    "malware": ("Harmful software damages people and their data.", "Attacking computers is illegal."),
    "privacy": ("It would violate someone's privacy.", "Everyone has a right to privacy and safety."),
    "hate": ("I don't support hatred against any group of people.", "All people deserve respect."),
    "disinformation": ("Spreading false information can hurt people.", "False claims like that mislead people."),
    "abuse": ("It would hurt another person.", "If someone is being abused, a local helpline can help."),
    "animals": ("It would make animals suffer.", "Harming animals is cruel and often illegal."),
    "crime": ("It is illegal and could hurt people.", "I can't support breaking the law."),
    "harm_advice": ("It could seriously harm someone's health.", "Please ask a doctor about health questions."),
    "sexual": ("I don't write that kind of content.", "It would violate people's dignity and consent."),
}


@dataclass(frozen=True)
class Row:
    """One request. ``kind`` is "twin", "ordinary" or "public"; ``form`` names the request form or "free"."""

    text: str
    label: Label
    category: str
    family: str
    form: str
    kind: str
    split: Split


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


@dataclass(frozen=True)
class _Entry:
    mark: str
    phrase: str
    whole: bool
    category: str
    family: str
    unseen: bool


@functools.cache
def _entries() -> tuple[tuple[_Entry, ...], tuple[str, ...]]:
    """All phrases of the corpus files, and the key words of the held-out families."""
    entries: list[_Entry] = []
    unseen_words: list[str] = []
    for path in sorted(CORPUS_FOLDER.glob("*.txt")):
        family, category, unseen = "", "", False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if header := re.fullmatch(r"\[(\*?)(.+)\] (\w+)", line):
                words = [word.strip() for word in header[2].split(",")]
                family, category, unseen = words[0], header[3], bool(header[1])
                unseen_words += words if unseen else []
            elif product := re.fullmatch(r"([-+])x (.+) :: (.+)", line):
                verbs, objects = product[2].split(" | "), product[3].split(" | ")
                for index, thing in enumerate(objects):
                    phrase_text = f"{verbs[index % len(verbs)]} {thing}"
                    entries.append(_Entry(product[1], phrase_text, False, category, family, unseen))
            elif phrase := re.fullmatch(r"([-+])(!?) (.+)", line):
                entries.append(_Entry(phrase[1], phrase[3], bool(phrase[2]), category, family, unseen))
            elif line and not line.startswith("#"):
                raise ValueError(f"{path.name}, line {number}: not a header or phrase: {line!r}")
    return tuple(entries), tuple(unseen_words)


@functools.cache
def _unseen_pattern() -> re.Pattern[str]:
    return re.compile(r"\b(" + "|".join(re.escape(word) for word in _entries()[1]) + r")\w*", re.IGNORECASE)


def has_unseen_word(text: str) -> bool:
    """Whether the text contains a key word that is kept out of training."""
    return bool(_unseen_pattern().search(text))


def _forms_for(entry: _Entry, rng: random.Random) -> list[tuple[str, str]]:
    """(form, template) pairs for one phrase: every kind of form is matched between harmful and benign phrases."""
    if entry.whole:
        return [("free", "{}")]
    if entry.family == "lists":
        return [("list", template) for template in rng.sample(NOUN_FORMS, 2)]
    kinds = ["question", "list", rng.choice(("instruct", "instruct", "polite"))]
    if entry.mark == "+" and entry.family != "ordinary":
        kinds.remove(rng.choice(kinds))  # there are more benign phrases: two forms of each keep the answers affordable
    return [(kind, rng.choice(FORMS[kind])) for kind in kinds]


@functools.cache
def rows() -> tuple[Row, ...]:
    """Every request of the project's own corpus, in file order, without duplicates."""
    made: dict[str, Row] = {}
    for entry in _entries()[0]:
        unseen = entry.unseen or has_unseen_word(entry.phrase) or _fraction(entry.phrase) < 1 / 15
        kind = "ordinary" if entry.family == "ordinary" else "twin"
        for form, template in _forms_for(entry, random.Random(entry.phrase)):
            text = template.format(entry.phrase)
            label: Label = "harmful" if entry.mark == "-" else "benign"
            split: Split = "heldout" if unseen else "train"
            made.setdefault(text, Row(text, label, entry.category, entry.family, form, kind, split))
    return tuple(made.values())


def harmful(split: Split) -> list[Row]:
    """Plainly harmful requests of a split."""
    return [row for row in rows() if row.label == "harmful" and row.split == split]


def benign(split: Split) -> list[Row]:
    """All benign requests of a split: twins and ordinary ones."""
    return [row for row in rows() if row.label == "benign" and row.split == split]


def twins(split: Split) -> list[Row]:
    """Benign requests of a split that share words and forms with harmful ones."""
    return [row for row in benign(split) if row.kind == "twin"]


def list_prompts(split: Split) -> list[Row]:
    """Benign requests in list form ("Steps to bake bread."), to be typeset in images or answered with a list."""
    return [row for row in benign(split) if row.form == "list"]


def refusal(row: Row, rng: random.Random) -> str:
    """A refusal of one or two sentences; the second sentence fits the category more often than not."""
    opening = rng.choice(REFUSALS)
    if rng.random() < 0.25:
        return opening
    reasons: Sequence[str] = REASONS.get(row.category, GENERAL_REASONS) if rng.random() < 0.6 else GENERAL_REASONS
    return f"{opening} {rng.choice(reasons)}"


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


PUBLIC = ("harmless_train", "harmful_train", "advbench", "figstep_dev", "safe_responses")  # may train what is shipped


def public_rows(data_dir: Path | str) -> list[Row]:
    """Training rows from the permissive public sets in a folder; files that are absent are skipped.

    Reads advbench.csv, harmful_train.csv, safe_responses.csv (behaviours), the calibration split of figstep_dev.csv,
    and harmless_train.csv. Rows that contain a held-out word, or that occur in harmful_val.csv or harmbench_val.csv,
    are dropped.
    """
    folder = Path(data_dir)
    harmful_texts: list[str] = []
    for name, column in (
        ("advbench.csv", "instruction"),
        ("harmful_train.csv", "instruction"),
        ("safe_responses.csv", "Behavior"),
    ):
        if (folder / name).exists():
            harmful_texts += [row[column].strip() for row in _read(folder / name)]
    if (folder / "figstep_dev.csv").exists():
        for row in _read(folder / "figstep_dev.csv"):
            if row["split"] == "calibration":
                harmful_texts += [row["question"].strip(), row["instruction"].strip()]
    benign_texts: list[str] = []
    if (folder / "harmless_train.csv").exists():
        benign_texts = [row["instruction"].strip() for row in _read(folder / "harmless_train.csv")]
    reserved: set[str] = set()
    for name, column in (("harmful_val.csv", "instruction"), ("harmbench_val.csv", "Behavior")):
        if (folder / name).exists():
            reserved |= {row[column].strip().lower() for row in _read(folder / name)}
    labelled: list[tuple[str, Label]] = [(text, "harmful") for text in harmful_texts]
    labelled += [(text, "benign") for text in benign_texts]
    seen: set[str] = set()
    kept: list[Row] = []
    for text, label in labelled:
        if text.lower() in seen or text.lower() in reserved or has_unseen_word(text):
            continue
        seen.add(text.lower())
        kept.append(Row(text, label, "public", "public", "free", "public", "train"))
    return kept
