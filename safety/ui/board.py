"""The board: one live column per lane, as a single gr.HTML, and the plain value that it draws.

Gradio sends only the differences of the value; static/board.js appends new tokens with textContent (model text is
never parsed as HTML) and redraws the trace. A view is rebuilt as fresh lists for every update: Gradio compares it
with the previous one, so a list that was changed in place would look unchanged.
"""

from pathlib import Path
from typing import Any

import gradio as gr

from safety.engine import Answer, Event
from safety.settings import Lane

STATIC = Path(__file__).parent / "static"
View = dict[str, Any]

_EMPTY = {
    "No defense": "Run an example or ask something: the model's own answer appears here, with nothing in its way.",
    "Defended": "The same model with the defenses switched on answers here, at the same time.",
}


def board(**kwargs: Any) -> gr.HTML:
    """All lanes side by side. Its value is a view: see `empty_view` and `view_of`.

    A configured gr.HTML rather than a subclass: Gradio writes a .pyi file next to every component class it meets.
    """
    return gr.HTML(
        value=empty_view(),
        html_template=(STATIC / "board.html").read_text("utf-8"),
        js_on_load=(STATIC / "board.js").read_text("utf-8"),
        apply_default_css=False,
        **kwargs,
    )


def empty_view() -> View:
    """What the board shows before the first run."""
    lanes = [
        _lane(name, defended=name != "No defense", chips=[], state="empty", hint=hint) for name, hint in _EMPTY.items()
    ]
    return {"run": "empty", "threshold": None, "axis": 64, "lanes": lanes}


def view_of(
    run: str,
    answers: list[Answer],
    lanes: list[Lane],
    states: list[str],
    *,
    threshold: float | None,
    max_new_tokens: int,
    wait: str,
) -> View:
    """Describe the answers so far, in fresh plain values.

    Args:
        run: changes with every run; the board then starts afresh.
        states: per lane: waiting, streaming, done, limit, refused, stopped or error.
        threshold: the trace's alarm threshold, None without a trace.
        max_new_tokens: bounds the shared token axis.
        wait: what a column says while it waits for its first token.
    """
    longest = max(len(answer.tokens) for answer in answers)
    axis = min(max_new_tokens, max(32, -(-(longest + 1) // 32) * 32))
    views = []
    for lane, answer, state in zip(lanes, answers, states, strict=True):
        ended = state in ("done", "limit", "refused", "stopped")
        views.append(
            _lane(
                lane.name,
                defended=bool(lane.sasa or lane.revision or lane.sapt),
                chips=chips(lane),
                state=state,
                wait=wait,
                tokens=list(answer.tokens),
                harm=[None if p is None else round(p, 3) for p in answer.harm],
                marks=[_mark(event) for event in answer.events if event.type in ("check", "injection")],
                badge=_badge(lane, answer),
                summary=answer.summary() if ended and answer.tokens else "",
                speed=_speed(answer) if answer.tokens else "",
            )
        )
    return {"run": run, "threshold": threshold, "axis": axis, "lanes": views}


def chips(lane: Lane) -> list[dict[str, str]]:
    """The defenses that act on a lane, each with its most telling setting."""
    found = []
    if lane.sasa is not None:
        detail = {
            "gate": f"λ {lane.sasa.strength:g}",
            "probe": "probe only",
            "project": f"projection λ {lane.sasa.strength:g}",
        }
        found.append({"key": "sasa", "label": f"SASA {detail[lane.sasa.mode]}"})
    if lane.revision is not None:
        found.append({"key": "revision", "label": f"Revision α {lane.revision.alpha:g}"})
    if lane.sapt is not None:
        found.append({"key": "sapt", "label": f"SAPT every {lane.sapt.interval}"})
    return found or [{"key": "none", "label": "nothing intervenes"}]


def _lane(name: str, **values: Any) -> View:
    start: View = {
        "name": name,
        "tokens": [],
        "harm": [],
        "marks": [],
        "badge": None,
        "summary": "",
        "speed": "",
        "hint": "",
        "wait": "",
    }
    return start | values


def _mark(event: Event) -> View:
    return {
        "type": event.type,
        "token": event.token,
        "p": round(event.probability, 3),
        "t": event.threshold,
        "fired": event.fired,
    }


def _badge(lane: Lane, answer: Answer) -> View | None:
    if lane.sasa is None or lane.sasa.mode == "project":
        return None
    gate = next((event for event in answer.events if event.type == "gate"), None)
    if gate is None:
        return {"p": None, "t": lane.sasa.threshold, "fired": False}
    return {"p": round(gate.probability, 3), "t": gate.threshold, "fired": gate.fired}


def _speed(answer: Answer) -> str:
    count = len(answer.tokens)
    return (
        f"{count} token{'s' if count != 1 else ''} · {answer.tokens_per_second:.1f} tokens/s · {answer.seconds:.1f} s"
    )
