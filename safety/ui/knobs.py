"""The knobs: which settings a visitor may turn on the loaded model, and how the turned knobs become lanes.

`knobs_of` describes every control as plain data (bounds and availability come from the model and its artifacts);
static/editor.js draws them and sends back a form, which is plain data from a stranger: `lanes_of`, `sampling_of` and
`length_of` check its shape, and the engine checks its ranges.
"""

from dataclasses import MISSING, asdict, fields, replace
from typing import Any

from safety.engine import Engine
from safety.errors import UserError
from safety.settings import MAX_LANES, MAX_NEW_TOKENS, Lane, Revision, Sampling, Sapt, Sasa
from safety.ui.names import DEFENDED, DEFENSES, TOGETHER, UNDEFENDED

NEW_TOKENS = 96  # of an answer, until a visitor chooses otherwise; the recordings have as many
# What the papers fix, which is what the settings default to. Blocks belong to a model: those stay the calibrated ones.
PAPER: dict[str, dict[str, Any]] = {
    key: {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    for key, settings in (("sasa", Sasa), ("revision", Revision), ("sapt", Sapt))
}
PAPER["sapt"]["end_check"] = False  # ours
Knobs = dict[str, Any]


def _range(key: str, label: str, info: str, low: float, high: float, step: float, sign: str = "") -> Knobs:
    return {"key": key, "type": "range", "label": label, "info": info, "min": low, "max": high, "step": step,
            "sign": sign or label}  # fmt: skip


def _choice(key: str, label: str, info: str, options: list[tuple[str, Any]]) -> Knobs:
    return {"key": key, "type": "choice", "label": label, "info": info, "options": [list(pair) for pair in options]}


def _check(key: str, label: str, info: str) -> Knobs:
    return {"key": key, "type": "check", "label": label, "info": info}


def knobs_of(engine: Engine | None, max_new_tokens: int = MAX_NEW_TOKENS) -> Knobs:
    """Describe the controls, the calibrated and the papers' values, and the two ready-made sets of lanes.

    Args:
        engine: None while no model is loaded: every defense is then unavailable.
        max_new_tokens: the longest answer that may be asked for.
    """
    defenses = [_defense(key, engine) for key in DEFENSES]
    return {
        "defenses": defenses,
        "sampling": _sampling(max_new_tokens),
        "layouts": {name: [_plain(lane) for lane in lanes] for name, lanes in layouts(engine).items()},
        "max_lanes": MAX_LANES - 1,
        "undefended": UNDEFENDED,
        "start": starting_form(engine, max_new_tokens),
    }


def layouts(engine: Engine | None) -> dict[str, list[Lane]]:
    """The ready-made sets of defended lanes: "together" in one column, or "each" in a column of its own."""
    if engine is None:
        return {"together": [], "each": []}
    on = {key: value for key, value in vars(engine.artifacts.settings).items() if value is not None}
    each = [Lane(DEFENSES[key].short, **{key: settings}) for key, settings in on.items()]
    together = Lane(DEFENDED, **on)
    return {
        "together": [together] if on else [],
        "each": [*each, replace(together, name=TOGETHER)] if len(on) > 1 else each,
    }


def starting_form(engine: Engine | None, max_new_tokens: int = MAX_NEW_TOKENS) -> Knobs:
    """The form as a visitor finds it."""
    lanes = [_plain(lane) for lane in layouts(engine)["together"]]
    return {"lanes": lanes, "max_new_tokens": min(NEW_TOKENS, max_new_tokens), **asdict(Sampling())}


def _plain(lane: Lane) -> Knobs:
    """A lane as the form has it: a name, and per defense its settings with "on"."""
    found: Knobs = {"name": lane.name}
    for key in DEFENSES:
        settings = getattr(lane, key)
        if settings is not None:
            found[key] = {"on": True} | _values(settings)
    return found


def _values(settings: Sasa | Revision | Sapt) -> Knobs:
    values = asdict(settings)
    if isinstance(settings, Sasa):
        values["pair"] = f"{values.pop('safety_layer')}-{values.pop('fused_layer')}"
    return values


def _defense(key: str, engine: Engine | None) -> Knobs:
    base = None if engine is None else getattr(engine.artifacts.settings, key)
    name = DEFENSES[key]
    found: Knobs = {"key": key, "name": name.full, "short": name.short, "hint": name.hint, "available": True}
    if engine is None or base is None:
        why = "no model is loaded yet" if engine is None else f"this model has no calibrated {name.full} yet"
        return found | {"available": False, "hint": f"Not available: {why}", "controls": [], "calibrated": {}}
    calibrated = _values(base)
    make: Any = {"sasa": _sasa, "revision": _revision, "sapt": _sapt}[key]
    controls = make(engine.artifacts, base)
    # Per way to judge, as `SasaArtifact.threshold` tells them apart: the page moves on to it with the layers and mode.
    found["thresholds"] = engine.artifacts.sasa.thresholds if key == "sasa" and engine.artifacts.sasa else {}
    return found | {"controls": controls, "calibrated": calibrated, "paper": calibrated | PAPER[key]}


def _sasa(artifacts: Any, _: Sasa) -> list[Knobs]:
    pairs = [(f"safety {s}, fused {f}", f"{s}-{f}") for s, f in artifacts.sasa.pairs]
    modes = [("Gate (the paper)", "gate"), ("Probe only", "probe"), ("Project only", "project")]
    modes += [("Reading too (ours)", "reading")] if artifacts.sasa.reading else []
    judges = {"when": {"mode": ["gate", "probe", "reading"]}}  # not shown where it would do nothing
    projects = {"when": {"mode": ["gate", "project"]}}
    return [
        _range("threshold", "Threshold", "Refuse when the probe's probability is at least this", 0, 1, 0.001) | judges,
        _range("strength", "Projection strength λ", "1 is the paper, 0 leaves the model as it is", 0, 1, 0.05, "λ")
        | projects,
        _choice("pair", "Layers", "Blocks that have a calibrated probe", pairs) | projects,
        _choice("mode", "Mode", "The paper's gate, one half of it, or the picture's words judged as if typed", modes),
        _choice(
            "choice",
            "Choice of layers",
            "Ours: the pair whose probe is surest about this input",
            [("As above (the paper)", "static"), ("Per input", "per-input")],
        )
        | {"when": {"mode": ["gate"]}},
    ]


def _revision(artifacts: Any, base: Revision) -> list[Knobs]:
    layers = list(artifacts.revision.layers)
    top = min(20.0, max(6.0, round(3 * base.alpha)))
    whole = len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))
    info = "Block that is revised"
    of_heads = {"when": {"level": ["head"]}}
    return [
        _range("alpha", "Strength α", "0 changes nothing; the paper's best is 2", 0, top, 0.1, "α"),
        _range("layer", "Layer", info, layers[0], layers[-1], 1)
        if whole
        else _choice("layer", "Layer", info, [(f"block {layer}", layer) for layer in layers]),
        _choice("level", "What is revised", "", [("Attention heads", "head"), ("Whole layer", "layer")]),
        _range("fraction", "Share of heads", "0.7 is the paper", 0, 1, 0.05) | of_heads,
        _choice("heads", "Which heads", "Random ones are a control", [("Best ranked", "top"), ("Random", "random")])
        | of_heads,
        _choice("vector", "Direction", "", [("Mean shift (MMS)", "mms"), ("Probe weights (PWD)", "pwd")]),
        _choice("units", "Unit of α", "Ours: standard deviations", [("Raw", "raw"), ("Std. deviations", "std")]),
        _choice("positions", "Where", "", [("Answer only", "last"), ("Prompt too", "all")]),
    ]


def _sapt(artifacts: Any, _: Sapt) -> list[Knobs]:
    words = {"joint": "Joint (the paper)", "frozen": "Frozen (their code)"}
    detectors = [(words[name], name) for name in words if name in getattr(artifacts.sapt, "detectors", {"joint": 0})]
    return [
        _range("threshold", "Threshold", "Remind when the detector is at least this sure", 0, 1, 0.001),
        _range("interval", "Interval", "Tokens between two checks", 1, 64, 1),
        _check("end_check", "Also check before the answer ends", "Ours: the paper's rule never does"),
        _choice("detector", "Detector", "", detectors),
    ]


def _sampling(max_new_tokens: int) -> list[Knobs]:
    return [
        _range("max_new_tokens", "Longest answer", "In tokens", min(8, max_new_tokens), max_new_tokens, 8),
        _range("temperature", "Temperature", "0 takes the likeliest token: runs repeat exactly", 0, 2, 0.05),
        _range("top_p", "Top-p", "Only matters when the temperature is above 0", 0.05, 1, 0.05),
        {"key": "seed", "type": "number", "label": "Seed", "info": "", "min": 0, "max": 2**31 - 1, "step": 1},
    ]


def lanes_of(form: Any, engine: Engine) -> list[Lane]:
    """Turn a form into lanes, the undefended one first. Settings that the form leaves out are the calibrated ones.

    A column in which no defense is on would repeat the undefended one: it is left out. Names are made unique, as the
    editor (static/editor.js, thresholds) does too.

    Raises:
        UserError: the form is not one, a defense is on that this model has no artifacts for, or a value is missing.
    """
    rows = form.get("lanes") if isinstance(form, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError("The settings could not be read. Reload the page.")
    if len(rows) >= MAX_LANES:
        raise UserError(f"At most {MAX_LANES} columns can run at once: remove one.")
    lanes = [Lane(UNDEFENDED)]
    for number, row in enumerate(rows, 1):
        settings = _settings(row, engine)
        if not settings:
            continue
        name = str(row.get("name") or "").strip()[:40] or f"Column {number}"
        while name in [lane.name for lane in lanes]:
            name += " ′"
        lanes.append(Lane(name, **settings))
    return lanes


def lane_of(row: dict[str, Any]) -> Lane:
    """A lane from `dataclasses.asdict` of one, as a recording or a request to another process holds it."""
    kinds: dict[str, Any] = {"sasa": Sasa, "revision": Revision, "sapt": Sapt}
    return Lane(row["name"], **{key: make(**row[key]) for key, make in kinds.items() if row[key] is not None})


def _settings(row: Knobs, engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in DEFENSES:
        turned = row.get(key)
        if not isinstance(turned, dict) or not turned.get("on"):
            continue
        base = getattr(engine.artifacts.settings, key)
        if base is None:
            raise UserError(f"This model has no calibrated artifacts for {DEFENSES[key].full}: switch it off.")
        values = {field.name: turned[field.name] for field in fields(base) if field.name in turned}
        if key == "sasa" and "pair" in turned:
            values["safety_layer"], values["fused_layer"] = _pair(turned["pair"])
        label = {knob["key"]: knob["label"] for knob in _defense(key, engine)["controls"]}
        values = {name: _typed(value, getattr(base, name), f"{DEFENSES[key].short}: {label.get(name, name)}")
                  for name, value in values.items()}  # fmt: skip
        found[key] = replace(base, **values)
    return found


def _typed(value: Any, like: Any, name: str) -> Any:
    """A value of the same type as the setting it replaces."""
    if isinstance(like, bool):
        return bool(value)
    if isinstance(like, str):
        return str(value)
    return _whole(value, name) if isinstance(like, int) else _number(value, name)


def sampling_of(form: Knobs) -> Sampling:
    """The sampling settings. Raises UserError when a value is missing."""
    return Sampling(
        _number(form.get("temperature"), "Temperature"),
        _number(form.get("top_p"), "Top-p"),
        _whole(form.get("seed"), "Seed"),
    )


def length_of(form: Knobs) -> int:
    """The number of new tokens. Raises UserError when it is missing."""
    return _whole(form.get("max_new_tokens"), "The number of new tokens")


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
