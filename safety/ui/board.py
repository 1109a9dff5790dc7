"""The board: one live column per lane, as a single gr.HTML, and the plain value that it draws.

Gradio sends only the differences of the value; the scripts under static/board append new tokens with textContent
(model text is never parsed as HTML) and redraw the trace. A view is rebuilt as fresh lists for every update: Gradio
compares it with the previous one, so a list that was changed in place would look unchanged.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from safety.engine import Answer, Event
from safety.settings import Lane
from safety.ui.names import DEFENDED, DEFENSES, UNDEFENDED
from safety.ui.words import ENDED, overhead, verdict, went_on

# What each reason to end is called on the page.
STATE = {None: "streaming", "eos": "done", "length": "limit", "gate": "refused"}
STATIC = Path(__file__).parent / "static"
SCRIPTS = ("columns", "trace", "inspect", "remark", "layers", "keep", "history", "replay", "draw")
View = dict[str, Any]
DIGITS = 6  # of a probability that is compared with a threshold: rounded coarser, it could fall on the other side

_EMPTY = {
    UNDEFENDED: "Run an example or ask something: the model's own answer appears here, with nothing in its way.",
    DEFENDED: "The same model with the defenses switched on answers here, at the same time.",
}


def script(*names: str) -> str:
    """The files of static/ joined into one script for gr.HTML, after what they share."""
    return "\n".join((STATIC / f"{name}.js").read_text("utf-8") for name in ("html", *names))


def board(**kwargs: Any) -> gr.HTML:
    """All lanes side by side. Its value is a view: see `empty_view` and `view_of`. Triggers "reveal" with {"run"}.

    A configured gr.HTML rather than a subclass: Gradio writes a .pyi file next to every component class it meets.
    """
    return gr.HTML(
        value=empty_view(),
        html_template=(STATIC / "board.html").read_text("utf-8"),
        js_on_load=script(*(f"board/{name}" for name in SCRIPTS)),
        apply_default_css=False,
        **kwargs,
    )


def empty_view() -> View:
    """What the board shows before the first run."""
    lanes = [
        _lane(name, chips=[] if name == UNDEFENDED else [{"key": "any", "label": "defenses on"}], state="empty",
              hint=hint) for name, hint in _EMPTY.items()
    ]  # fmt: skip
    lanes[1]["defended"] = True
    return {"run": "empty", "threshold": None, "axis": 64, "lanes": lanes, "verdict": "", "about": {}, "layers": None}


def view_of(
    run: str,
    answers: list[Answer],
    lanes: list[Lane],
    states: list[str],
    *,
    threshold: float | None,
    max_new_tokens: int,
    wait: str = "",
    cover: bool = False,
    blocks: int = 0,
    soft_tokens: int = 0,
    pairs: Sequence[Sequence[int]] = (),
    about: View | None = None,
) -> View:
    """Describe the answers so far, in fresh plain values.

    Args:
        run: changes with every run; the board then starts afresh.
        states: per lane: queued, waiting, streaming, done, limit, refused, stopped, error or memory.
        threshold: the trace's alarm threshold, None without a trace.
        max_new_tokens: bounds the shared token axis.
        wait: what a column says while it waits for its first token.
        cover: hide the text of every lane from the token on that reaches the alarm.
        blocks, soft_tokens, pairs: of the model, the soft prompt and SASA's probes, to count each lane's work.
        about: what was asked and of whom, for exports; "harmful" says whether that is known to be harmful.
    """
    longest = max(len(answer.tokens) for answer in answers)
    about = about or {}
    return {
        "run": run,
        "threshold": threshold,
        "axis": min(max_new_tokens, max(32, -(-(longest + 1) // 32) * 32)),
        "lanes": [
            _lane_view(lane, answer, state, wait, threshold if cover else None, cover)
            | {"overhead": _share(overhead(lane, answer, blocks, soft_tokens, pairs))}
            for lane, answer, state in zip(lanes, answers, states, strict=True)
        ],
        "verdict": verdict(lanes, answers, states, about.get("harmful")),
        "about": about,
        "layers": next(([round(p, 3) for p in answer.layers] for answer in answers if answer.layers), None),
    }


def _share(work: float | None) -> float | None:
    return None if work is None else round(work, 4)


def _lane_view(lane: Lane, answer: Answer, state: str, wait: str, alarm: float | None, cover: bool) -> View:
    count = len(answer.tokens)
    hidden = _covered_from(answer, alarm) if cover else count
    return _lane(
        lane.name,
        defended=bool(lane.sasa or lane.revision or lane.sapt),
        chips=chips(lane),
        # An answer that refuses in its own words is a refusal, too, however it ended.
        state="refused" if state in ("done", "limit") and answer.refused and not went_on(answer) else state,
        wait=wait,
        tokens=[token if i < hidden else _blot(token) for i, token in enumerate(answer.tokens)],
        harm=[None if p is None else round(p, DIGITS) for p in answer.harm],
        chances=[None if p is None or i >= hidden else round(p, 3) for i, p in enumerate(answer.probability)],
        others=[
            [[text, round(p, 3)] for text, p in pairs[:4]] if i < hidden else []
            for i, pairs in enumerate(answer.alternatives)
        ],
        marks=[_mark(event) for event in answer.events if event.type in ("check", "injection")],
        badge=_badge(lane, answer, state),
        judges=_judges(lane),
        covered=hidden if hidden < count else None,
        summary=answer.summary() if state in ENDED and count else "",
        speed=_speed(answer) if count else "",
    )


def _covered_from(answer: Answer, alarm: float | None) -> int:
    """Index of the first token that is hidden; without a detector nobody watches, so all are."""
    if answer.gated:
        return len(answer.tokens)  # the fixed refusal
    if alarm is None or any(p is None for p in answer.harm):
        return 0
    return next((i for i, p in enumerate(answer.harm) if p is not None and p >= alarm), len(answer.tokens))


def _blot(token: str) -> str:
    """A token of the same shape that says nothing."""
    return "".join(sign if sign.isspace() else "▒" for sign in token)


def chips(lane: Lane) -> list[dict[str, str]]:
    """The defenses that act on a lane, each with its most telling setting."""
    found = []
    if lane.sasa is not None:
        detail = {
            "gate": f"λ {lane.sasa.strength:g}",
            "probe": "probe only",
            "project": f"projection λ {lane.sasa.strength:g}",
            "reading": "reads pictures",
        }
        found.append({"key": "sasa", "label": f"{DEFENSES['sasa'].short} {detail[lane.sasa.mode]}"})
    if lane.revision is not None:
        found.append({"key": "revision", "label": f"{DEFENSES['revision'].short} α {lane.revision.alpha:g}"})
    if lane.sapt is not None:
        found.append({"key": "sapt", "label": f"{DEFENSES['sapt'].short} every {lane.sapt.interval}"})
    return found or [{"key": "none", "label": "nothing intervenes"}]


def _lane(name: str, **values: Any) -> View:
    start: View = {
        "name": name,
        "defended": False,
        "tokens": [],
        "harm": [],
        "chances": [],
        "others": [],
        "marks": [],
        "badge": None,
        "judges": {},
        "covered": None,
        "summary": "",
        "speed": "",
        "overhead": None,
        "hint": "",
        "wait": "",
    }
    return start | values


def _mark(event: Event) -> View:
    return {
        "type": event.type,
        "token": event.token,
        "p": round(event.probability, DIGITS),
        "t": event.threshold,
        "fired": event.fired,
    }


def _judges(lane: Lane) -> View:
    """What gave the probabilities of this lane. A moved threshold says something about them only while the settings of
    its column (static/editor.js, judges) name the same: another probe would have seen something else."""
    found: View = {}
    if lane.sasa is not None:
        found["sasa"] = [lane.sasa.way, lane.sasa.strength if lane.sasa.mode == "gate" else None]
    if lane.sapt is not None:
        found["sapt"] = [lane.sapt.detector, lane.sapt.interval, lane.sapt.end_check]
    return found


def _badge(lane: Lane, answer: Answer, state: str) -> View | None:
    if lane.sasa is None or lane.sasa.mode == "project":
        return None
    gate = next((event for event in answer.events if event.type == "gate"), None)
    if gate is None:
        if state in ("stopped", "error", "memory"):
            return None  # it was never judged
        return {"p": None, "t": lane.sasa.threshold, "fired": False}
    return {"p": round(gate.probability, DIGITS), "t": gate.threshold, "fired": gate.fired}


def _speed(answer: Answer) -> str:
    count = len(answer.tokens)
    return (
        f"{count} token{'s' if count != 1 else ''} · {answer.tokens_per_second:.1f} tokens/s · "
        f"first after {answer.prefill_seconds:.1f} s"
    )
