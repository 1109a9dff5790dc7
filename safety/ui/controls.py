"""The defenses' controls: built from what the loaded model and its artifacts allow, and read back into lanes."""

from dataclasses import dataclass, fields, replace
from typing import Any

import gradio as gr

from safety.engine import Engine
from safety.errors import UserError
from safety.settings import MAX_NEW_TOKENS, Lane, Sampling

SASA_MODES = [("Gate (the paper)", "gate"), ("Probe only", "probe"), ("Project only", "project")]
LEVELS = [("Attention heads", "head"), ("Whole layer", "layer")]


@dataclass(frozen=True)
class Form:
    """Every control's value, in the order in which the page passes them. `Controls` has the same field names."""

    sasa: Any
    sasa_mode: Any
    sasa_strength: Any
    sasa_threshold: Any
    sasa_pair: Any
    revision: Any
    revision_alpha: Any
    revision_layer: Any
    revision_level: Any
    sapt: Any
    sapt_threshold: Any
    sapt_interval: Any
    sapt_end_check: Any
    separate: Any
    max_new_tokens: Any
    temperature: Any
    top_p: Any
    seed: Any

    def components(self) -> list[Any]:
        """The values in field order."""
        return [getattr(self, field.name) for field in fields(self)]


def lanes_of(form: Form, engine: Engine) -> list[Lane]:
    """Turn the form into lanes: the undefended one first, then one "Defended" lane, or one lane per defense.

    Settings that have no control come from the calibrated artifacts. Ranges are checked by the engine.

    Raises:
        UserError: a defense is on that this model has no artifacts for, or a value is missing.
    """
    base = engine.artifacts.settings
    on: dict[str, Any] = {}
    if form.sasa:
        safety_layer, fused_layer = _pair(form.sasa_pair)
        on["sasa"] = replace(
            _ready(base.sasa, "SASA"),
            mode=form.sasa_mode,
            strength=_number(form.sasa_strength, "SASA projection strength"),
            threshold=_number(form.sasa_threshold, "SASA threshold"),
            safety_layer=safety_layer,
            fused_layer=fused_layer,
        )
    if form.revision:
        on["revision"] = replace(
            _ready(base.revision, "activation revision"),
            alpha=_number(form.revision_alpha, "Revision strength alpha"),
            layer=_whole(form.revision_layer, "Revision layer"),
            level=form.revision_level,
        )
    if form.sapt:
        on["sapt"] = replace(
            _ready(base.sapt, "SAPT"),
            threshold=_number(form.sapt_threshold, "SAPT threshold"),
            interval=_whole(form.sapt_interval, "SAPT interval"),
            end_check=bool(form.sapt_end_check),
        )
    lanes = [Lane("No defense")]
    if on and not form.separate:
        lanes.append(Lane("Defended", **on))
    elif on:
        names = {"sasa": "SASA", "revision": "Revision", "sapt": "SAPT"}
        lanes += [Lane(names[key], **{key: settings}) for key, settings in on.items()]
        if len(on) > 1:
            lanes.append(Lane("All together", **on))
    return lanes


def sampling_of(form: Form) -> Sampling:
    """The sampling settings. Raises UserError when a value is missing."""
    return Sampling(_number(form.temperature, "Temperature"), _number(form.top_p, "Top-p"), _whole(form.seed, "Seed"))


def length_of(form: Form) -> int:
    """The number of new tokens. Raises UserError when it is missing."""
    return _whole(form.max_new_tokens, "The number of new tokens")


def _ready(settings: Any, name: str) -> Any:
    if settings is None:
        raise UserError(f"This model has no calibrated artifacts for {name}: switch it off.")
    return settings


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} is not a number: enter one.")
    return float(value)


def _whole(value: Any, name: str) -> int:
    number = _number(value, name)
    if number != number or number in (float("inf"), float("-inf")) or number != int(number):
        raise UserError(f"{name} must be a whole number.")
    return int(number)


def _pair(value: Any) -> tuple[int, int]:
    try:
        safety_layer, fused_layer = (int(part) for part in str(value).split("-"))
    except ValueError:
        raise UserError("Choose the two layers of SASA from the list.") from None
    return safety_layer, fused_layer


def build_defenses(engine: Engine) -> dict[str, Any]:
    """Create the three defenses' controls in the current Gradio context; returns them by their name in `Form`."""
    found: dict[str, Any] = {}
    for name, build in (("sasa", _sasa), ("revision", _revision), ("sapt", _sapt)):
        available = getattr(engine.artifacts, name) is not None
        with gr.Column(elem_classes=["defense", f"defense-{name}"]):
            found |= build(engine.artifacts, available)
    return found


def _switch(label: str, info: str, available: bool, name: str) -> gr.Checkbox:
    if not available:
        info = f"Not available: {_missing(name)}"
    return gr.Checkbox(value=available, label=label, info=info, interactive=available, elem_classes=["switch"])


def _missing(name: str) -> str:
    """Why a defense cannot be switched on, and what to do."""
    return f"this model has no calibrated {name} yet. Run `python -m safety calibrate`."


def _settings(available: bool) -> gr.Accordion:
    return gr.Accordion("Settings", open=False, visible=available, elem_classes=["settings"])


def _sasa(artifacts: Any, available: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"sasa": _switch("SASA", "Judges the request before the first word", available, "SASA")}
    ready = artifacts.settings.sasa
    pairs = artifacts.sasa.pairs if available else []
    choices = [(f"safety block {s}, fused block {f}", f"{s}-{f}") for s, f in pairs]
    chosen = f"{ready.safety_layer}-{ready.fused_layer}" if available else None
    with _settings(available):
        found["sasa_threshold"] = gr.Slider(
            0,
            1,
            ready.threshold if available else 0.5,
            step=0.01,
            label="Threshold",
            info="Refuse when the probe's probability is at least this",
            interactive=True,
        )
        found["sasa_strength"] = gr.Slider(
            0,
            1,
            ready.strength if available else 1,
            step=0.05,
            label="Projection strength λ",
            info="1 is the paper, 0 leaves the model as it is",
            interactive=True,
        )
        found["sasa_pair"] = gr.Dropdown(
            choices,
            value=chosen,
            label="Layers",
            info="Blocks that have a calibrated probe",
            interactive=True,
        )
        found["sasa_mode"] = gr.Radio(
            SASA_MODES,
            value=ready.mode if available else "gate",
            label="Mode",
            interactive=True,
            elem_classes=["segmented"],
        )
    return found


def _revision(artifacts: Any, available: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "revision": _switch("Activation revision", "Nudges every step towards safety", available, "revision vectors")
    }
    ready = artifacts.settings.revision
    layers = list(artifacts.revision.layers) if available else [0]
    default = ready.alpha if available else 2.0
    top = min(20.0, max(6.0, round(3 * default)))
    with _settings(available):
        found["revision_alpha"] = gr.Slider(
            0,
            top,
            default,
            step=0.1,
            label="Strength α",
            info="0 changes nothing; the paper's best is 2",
            interactive=True,
        )
        if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
            found["revision_layer"] = gr.Slider(
                layers[0],
                layers[-1],
                ready.layer,
                step=1,
                label="Layer",
                info="Block that is revised",
                interactive=True,
            )
        else:
            choices = [(f"block {layer}", layer) for layer in layers]
            found["revision_layer"] = gr.Dropdown(
                choices,
                value=ready.layer if available else layers[0],
                label="Layer",
                info="Blocks that have a vector",
                interactive=len(layers) > 1,
            )
        found["revision_level"] = gr.Radio(
            LEVELS,
            value=ready.level if available else "head",
            label="What is revised",
            interactive=True,
            elem_classes=["segmented"],
        )
    return found


def _sapt(artifacts: Any, available: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"sapt": _switch("SAPT", "Watches the answer, steps in mid-way", available, "soft prompt")}
    ready = artifacts.settings.sapt
    with _settings(available):
        found["sapt_threshold"] = gr.Slider(
            0,
            1,
            ready.threshold if available else 0.9,
            step=0.01,
            label="Threshold",
            info="Inject the reminder when the detector is at least this sure",
            interactive=True,
        )
        found["sapt_interval"] = gr.Slider(
            1,
            64,
            ready.interval if available else 16,
            step=1,
            label="Interval",
            info="Tokens between two checks",
            interactive=True,
        )
        found["sapt_end_check"] = gr.Checkbox(
            value=ready.end_check if available else True,
            label="Also check before the answer ends",
            info="Ours: the paper never checks an answer shorter than the interval",
            interactive=True,
        )
    return found


def build_generation() -> dict[str, Any]:
    """Create the controls of length and sampling in the current Gradio context, by their name in `Form`."""
    return {
        "max_new_tokens": gr.Slider(8, MAX_NEW_TOKENS, 96, step=8, label="Longest answer", info="In tokens"),
        "temperature": gr.Slider(
            0, 2, 0, step=0.05, label="Temperature", info="0 always takes the likeliest token: runs repeat exactly"
        ),
        "top_p": gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="Only matters when the temperature is above 0"),
        "seed": gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed"),
    }
