"""What the page explains, as trusted static markup: each defense with a drawing of where it acts, and the glossary.

Nothing that a visitor or a model wrote passes through here.
"""

import re
from collections.abc import Iterator

from safety.ui.names import DEFENSES

GLOSSARY = {
    "LVLM": "Large vision-language model: it reads pictures and text and answers in text.",
    "token": "The piece of text that a model writes at a time: a short word or a part of one.",
    "block": "One of the model's layers. Each rewrites the inner state and hands it to the next.",
    "activation": "The numbers inside the model while it works: its inner state at one place.",
    "probe": "A small linear detector that reads a probability off an activation.",
    "soft prompt": "A few trained vectors put in as if they were tokens. They are no words and cannot be typed.",
    "harm probability": "What a probe estimates, from 0 to 1. Evidence, not a verdict: it errs both ways.",
    "alarm line": "The probability from which a token is marked. Calibration sets it for few false alarms on "
    "harmless answers.",
    "threshold": "The probability from which a defense acts.",
    "false alarm": "A harmless request that is refused or marked. A defense that refuses everything is useless.",
    "twin": "A harmless request that differs from an attack in one word, to see what a detector really reacts to.",
    "over-refusal": "Refusing harmless requests because they sound dangerous.",
    "undefended": "The same model in the same batch, with nothing in its way.",
    "held out": "Never seen while the defenses were calibrated.",
}

_EXPLANATIONS = (
    (
        "sasa",
        DEFENSES["sasa"].full,
        "before the first word",
        "Inside the model, an early “safety” [block] and a later one that has understood the request see it "
        "differently. SASA puts what the later one has understood in the early block’s place (the early state, "
        "projected onto the later one’s), so that safety gets to see what the request means; a small [probe] then "
        "reads off how harmful it is. At or above the [threshold] the answer is a refusal; below it the model "
        "answers exactly as it would have [undefended]. A mode of ours also has the model say what is in the "
        "picture, and judges those words as though somebody had typed them.",
    ),
    (
        "revision",
        DEFENSES["revision"].full,
        "at every step",
        "From pairs of safe and unsafe answers to the same question one learns a direction in the model’s "
        "[activation|activations] that points from unsafe to safe. Revision adds a little of it (α) at one [block], "
        "at every step. Too little changes nothing, too much makes the model babble: sweep α and see.",
    ),
    (
        "sapt",
        f"{DEFENSES['sapt'].full}, the safety reminder",
        "mid-way",
        "Every few [token|tokens], a trained [soft prompt] is slipped in behind what was written so far, and a "
        "detector reads the state it produces. Not alarmed, it is taken out as if nothing had happened; alarmed, "
        "it stays, and the model turns to a refusal from there. What was already written stays visible and counts.",
    ),
    (
        "trace",
        "The trace",
        "under every answer",
        "A small [probe] estimates, for every [token], how likely the answer so far is turning harmful: its "
        "[harm probability]. It only watches, the undefended column too. Above the [alarm line] a word is marked.",
    ),
)

ORDER = (
    '<div class="order"><h2 class="section">Who acts when, in a defended answer</h2><ol>'
    '<li class="order-sasa"><b>SASA</b> judges the request once. It refuses, or the answer begins.</li>'
    '<li class="order-revision"><b>Revision</b> then nudges every step of the answer towards safety.</li>'
    '<li class="order-sapt"><b>SAPT</b> watches as it is written; alarmed, it injects a reminder. '
    "Revision stays on.</li></ol></div>"
)

FOOTER = (
    "<p>Methods: SASA (<a href='https://arxiv.org/abs/2507.21637'>arXiv 2507.21637</a>), activation revision "
    "(<a href='https://arxiv.org/abs/2501.16378'>arXiv 2501.16378</a>), SAPT "
    "(<a href='https://arxiv.org/abs/2506.15734'>arXiv 2506.15734</a>). "
    "For research on model safety: nothing shown here is advice.</p>"
)


def explanations() -> str:
    """A drawing and a plain paragraph for each defense and for the trace, and the glossary."""
    tips = iter(range(1000))
    cards = "".join(
        f'<section class="explain explain-{key}"><h3>{name} <small>{when}</small></h3>{drawing(key)}'
        f"<p>{_with_terms(words, tips)}</p></section>"
        for key, name, when, words in _EXPLANATIONS
    )
    words = "".join(f"<div><dt>{word}</dt><dd>{meaning}</dd></div>" for word, meaning in sorted(GLOSSARY.items()))
    return (
        f'<details class="fold" open><summary>How each defense works</summary><div class="explanations">{cards}</div>'
        f'</details><details class="fold"><summary>Glossary</summary><dl class="glossary">{words}</dl></details>'
    )


def _with_terms(words: str, tips: Iterator[int]) -> str:
    """Turn [term] or [term|as written] into a button with a tooltip from the glossary."""

    def term(found: re.Match[str]) -> str:
        key, _, shown = found[1].partition("|")
        tip = f"tip-{next(tips)}"
        return (
            f'<span class="term"><button type="button" aria-describedby="{tip}">{shown or key}</button>'
            f'<span role="tooltip" id="{tip}">{GLOSSARY[key]}</span></span>'
        )

    return re.sub(r"\[([^\]]+)\]", term, words)


_CAPTIONS = {
    "sasa": "Drawing: the state of a late block is projected onto an early one; the result runs to the top, where a "
    "probe decides between refusing and passing.",
    "revision": "Drawing: at one block, a vector from unsafe to safe is added, again for each token.",
    "sapt": "Drawing: behind every few tokens four soft tokens are tried; a detector keeps them or takes them back.",
    "trace": "Drawing: a detector above the last block gives each token a probability, drawn as a line.",
}


def drawing(key: str) -> str:
    """Where a defense acts in the network, as an SVG whose colours follow the page's (light and dark)."""
    draw = {"sasa": _sasa, "revision": _revision, "sapt": _sapt, "trace": _trace}[key]
    return (
        f'<svg class="drawing drawing-{key}" viewBox="0 0 360 118" role="img" aria-label="{_CAPTIONS[key]}">'
        '<defs><marker id="tip-arrow-' + key + '" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path class="d-tip" d="M0 0 8 4 0 8Z"/></marker></defs>' + draw() + "</svg>"
    )


def _box(x: float, y: float, width: float, height: float, kind: str = "") -> str:
    return f'<rect class="d-box {kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="3"/>'


def _say(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text class="d-text {kind}" x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def _arrow(path: str, key: str, kind: str = "") -> str:
    return f'<path class="d-arrow {kind}" d="{path}" marker-end="url(#tip-arrow-{key})"/>'


def _network(lit: dict[int, str]) -> str:
    """Twelve blocks between the request on the left and the answer on the right."""
    blocks = "".join(_box(84 + 15 * i, 44, 10, 40, lit.get(i, "")) for i in range(12))
    return (
        _box(6, 44, 56, 17)
        + _say(34, 56, "image")
        + _box(6, 67, 56, 17)
        + _say(34, 79, "prompt")
        + '<path class="d-line" d="M64 64H80M263 64H278"/>'
        + blocks
    )


def _sasa() -> str:
    return (
        _network({4: "d-on", 6: "d-on", 5: "d-soft", 7: "d-soft", 8: "d-soft", 9: "d-soft", 10: "d-soft", 11: "d-soft"})
        + _arrow("M179 42C176 14 152 14 150 38", "sasa", "d-hot")
        + _say(164, 12, "project onto", "d-hot")
        + _say(149, 98, "safety", "d-small")
        + _say(181, 98, "fused", "d-small")
        + '<path class="d-diamond" d="M292 46 310 64 292 82 274 64Z"/>'
        + _say(292, 67, "probe", "d-small")
        + _arrow("M304 52 320 36", "sasa")
        + _arrow("M304 76 320 92", "sasa")
        + _say(340, 33, "refuse", "d-alarm")
        + _say(340, 103, "answer", "d-good")
    )


def _revision() -> str:
    tokens = "".join(_box(282 + 18 * i, 56, 14, 16) + _arrow(f"M{289 + 18 * i} 96V76", "revision", "d-calm")
                     for i in range(4))  # fmt: skip
    return (
        _network({7: "d-calm"})
        + _arrow("M194 16V40", "revision", "d-calm")
        + _say(202, 24, "+ α · (safe − unsafe)", "d-calm", "start")
        + _say(194, 98, "one block", "d-small")
        + tokens
        + _say(316, 110, "again for each token", "d-small")
    )


def _sapt() -> str:
    words = "".join(_box(16 + 17 * i, 52, 13, 16) for i in range(8))
    soft = "".join(_box(154 + 13 * i, 52, 10, 16, "d-inject") for i in range(4))
    turned = "".join(_box(290 + 17 * i, 52, 13, 16, "d-calm") for i in range(4))
    return (
        _say(81, 42, "what was written", "d-small")
        + words
        + soft
        + turned
        + _say(180, 42, "reminder?", "d-inject")
        + '<circle class="d-eye" cx="180" cy="92" r="10"/>'
        + _say(180, 95.5, "p", "d-small")
        + _arrow("M180 70V79", "sapt")
        + _arrow("M206 60H284", "sapt", "d-hot")
        + _say(246, 52, "alarmed: it stays", "d-small")
        + _arrow("M166 92H148", "sapt")
        + _say(144, 96, "calm: taken back", "d-small", "end")
        + _say(323, 84, "refusal", "d-good")
    )


def _trace() -> str:
    return (
        _network({})
        + '<circle class="d-eye" cx="272" cy="64" r="8"/>'
        + '<path class="d-line" d="M286 90H352M286 34V90"/>'
        + '<path class="d-alarm-line" d="M286 48H352"/>'
        + '<path class="d-trace" d="M288 80 298 74 308 78 318 56 328 42 338 46 348 66"/>'
        + _say(319, 104, "token", "d-small")
        + _say(319, 28, "P(harm)", "d-small")
    )
