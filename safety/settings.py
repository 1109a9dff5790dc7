"""What a lane is: a name and the settings of the defenses that act on it. Every default is defined here, once.

Settings are plain frozen values; they are checked against the loaded model and artifacts by `check`, before any
model work, so a slider or a flag from a stranger never reaches a tensor unchecked. Decoder blocks count from 0.
"""

from dataclasses import dataclass
from typing import Literal

from safety.errors import UserError

MAX_LANES = 6
MAX_NEW_TOKENS = 512
NEW_TOKENS = 128  # of an answer, if nobody says otherwise


def _number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN
        raise UserError(f"{name} must be a number between {low:g} and {high:g}, but it is {value!r}.")
    if not low <= value <= high:
        shown = f"{value:g}" if abs(value) < 1e15 else "far beyond"
        raise UserError(f"{name} must be between {low:g} and {high:g}, but it is {shown}.")


def _whole(name: str, value: int, low: int, high: int) -> None:
    _number(name, value, low, high)
    if not isinstance(value, int):  # 3.0 neither: blocks and seeds index and seed what takes integers alone
        raise UserError(f"{name} must be a whole number, but it is {value:g}.")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, but it is {value!r}.")


@dataclass(frozen=True)
class Sasa:
    """Self-Aware Safety Augmentation (arXiv 2507.21637).

    Attributes:
        safety_layer, fused_layer: the blocks s < f of the projection.
        strength: lambda in [0, 1]; the safety block's output becomes (1-lambda) H_s + lambda a H_f. 1 is the paper.
        threshold: the lane refuses when the probe's probability is at least this.
        mode: "gate" is the paper (probe on the projected stream's first-token logits; a passed prompt is answered by
            the clean stream); "probe" judges the clean stream's logits (no projection); "project" keeps generating
            from the projected stream and never refuses by itself; "reading" (ours) has the model read the picture
            aloud and judges the clean stream of the request, and, as text without the picture, of the words read, the
            prompt, and both.
        choice: "static" judges by the pair above, as the paper does; "per-input" (ours) by that one of all calibrated
            pairs whose probe is most certain about this input.
    """

    safety_layer: int
    fused_layer: int
    strength: float = 1.0
    threshold: float = 0.5
    mode: Literal["gate", "probe", "project", "reading"] = "gate"
    choice: Literal["static", "per-input"] = "static"

    @property
    def way(self) -> str:
        """Which probe judges: "clean", "reading", "per-input", or a pair of blocks such as "20-22". Each has a
        calibrated threshold of its own."""
        other = {"probe": "clean", "reading": "reading"}.get(self.mode)
        return other or ("per-input" if self.choice == "per-input" else f"{self.safety_layer}-{self.fused_layer}")

    def check(self, blocks: int) -> None:
        """Raise UserError unless the values fit a decoder of `blocks` blocks."""
        _whole("SASA safety layer", self.safety_layer, 0, blocks - 2)
        _whole("SASA fused layer", self.fused_layer, self.safety_layer + 1, blocks - 1)
        _number("SASA projection strength", self.strength, 0, 1)
        _number("SASA threshold", self.threshold, 0, 1)
        _choice("SASA mode", self.mode, ("gate", "probe", "project", "reading"))
        _choice("SASA choice of layers", self.choice, ("static", "per-input"))


@dataclass(frozen=True)
class Revision:
    """Internal activation revision (arXiv 2501.16378): add alpha * (mean safe - mean unsafe).

    Attributes:
        layer: the block that is revised.
        alpha: strength; 2 is the paper's best on LLaVA-1.5-7B. 0 changes nothing.
        level: "head" adds to the chosen heads' slices of the attention output projection's input, "layer" adds to
            the residual stream after the block's MLP.
        heads: which heads: "top" ranked by held-out probe accuracy (the paper) or "random" (a control).
        fraction: share of the heads that are revised; 0.7 is the paper.
        vector: "mms" mean shift or "pwd" probe weight direction.
        units: "raw" as in the paper, or "std": alpha counts standard deviations of the activations along the vector
            (ours; comparable across models).
        positions: "last" revises the last prompt position and every position after it, "all" the whole prompt too.
    """

    layer: int
    alpha: float = 2.0
    level: Literal["head", "layer"] = "head"
    heads: Literal["top", "random"] = "top"
    fraction: float = 0.7
    vector: Literal["mms", "pwd"] = "mms"
    units: Literal["raw", "std"] = "raw"
    positions: Literal["last", "all"] = "last"

    def check(self, blocks: int) -> None:
        """Raise UserError unless the values fit a decoder of `blocks` blocks."""
        _whole("Revision layer", self.layer, 0, blocks - 1)
        _number("Revision strength alpha", self.alpha, -20, 20)
        _choice("Revision level", self.level, ("head", "layer"))
        _choice("Revision heads", self.heads, ("top", "random"))
        _number("Revision share of heads", self.fraction, 0, 1)
        _choice("Revision vector", self.vector, ("mms", "pwd"))
        _choice("Revision units", self.units, ("raw", "std"))
        _choice("Revision positions", self.positions, ("last", "all"))


@dataclass(frozen=True)
class Sapt:
    """The Safety Reminder, safety-aware soft prompt tuning (arXiv 2506.15734).

    Attributes:
        threshold: the soft prompt stays when the detector's probability is at least this; 0.9 is the paper.
        interval: generated tokens between checks; 16 is the paper.
        end_check: also check an answer that is about to end and was not injected yet (ours: the paper's rule never
            checks a reply shorter than the interval).
        detector: "joint", trained together with the soft prompt (the paper) and then fitted anew behind the final
            one (ours), or "frozen", fitted on text-only instructions with PCA (the authors' released code), here
            behind the trained soft prompt.
    """

    threshold: float = 0.9
    interval: int = 16
    end_check: bool = True
    detector: Literal["joint", "frozen"] = "joint"

    def check(self) -> None:
        """Raise UserError unless the values are in range."""
        _number("SAPT threshold", self.threshold, 0, 1)
        _whole("SAPT interval", self.interval, 1, MAX_NEW_TOKENS)
        _choice("SAPT detector", self.detector, ("joint", "frozen"))
        if not isinstance(self.end_check, bool):
            raise UserError(f"SAPT's end check must be true or false, but it is {self.end_check!r}.")


@dataclass(frozen=True)
class Lane:
    """One row of the batch and one column on the page: a name plus the defenses that act on it (none: undefended)."""

    name: str
    sasa: Sasa | None = None
    revision: Revision | None = None
    sapt: Sapt | None = None

    def check(self, blocks: int) -> None:
        """Raise UserError unless the defenses' values fit a decoder of `blocks` blocks."""
        if self.sasa is not None:
            self.sasa.check(blocks)
        if self.revision is not None:
            self.revision.check(blocks)
        if self.sapt is not None:
            self.sapt.check()


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; every lane draws from its own generator of this seed,
    so two lanes with equal logits choose equal tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise UserError unless the values are in range."""
        _number("Temperature", self.temperature, 0, 2)
        _number("Top-p", self.top_p, 0.01, 1)
        _whole("Seed", self.seed, 0, 2**31 - 1)


def check_length(max_new_tokens: int) -> None:
    """Raise UserError unless 1 <= max_new_tokens <= MAX_NEW_TOKENS."""
    _whole("The number of new tokens", max_new_tokens, 1, MAX_NEW_TOKENS)
