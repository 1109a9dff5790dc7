"""What a run tells: Steps while it goes on, Answers when lanes are summed up."""

from dataclasses import asdict, dataclass, field
from textwrap import shorten
from typing import Any, Literal

from safety.refusal import refusal_start

WIDEST = 60  # characters of what was read that a summary repeats


@dataclass(frozen=True)
class Event:
    """A defense looked or acted. type: "gate" (SASA judged the prompt), "check" (SAPT's detector looked),
    "injection" (SAPT's soft prompt stayed); token: the index of the token that follows. Where SASA judged the
    words of the picture as well: read, what the model read there, and positions, how many the decoder ran for that."""

    type: Literal["gate", "check", "injection"]
    token: int
    probability: float
    threshold: float
    fired: bool
    read: str = ""
    positions: int = 0


@dataclass(frozen=True)
class Step:
    """One token of one lane.

    Attributes:
        request, lane: indices into what was asked. index: the token's number, from 0.
        text: what this token adds; "" while a character is incomplete and for the token that ends an answer.
        harm: P(harm) of the state from which the token was chosen, smoothed over the answer so far where the trace
            detector has a memory; None without one.
        finish: None, or why the lane ends here: "eos", "length" (token limit) or "gate" (SASA refused).
        seconds: since the run began; prefill_seconds: of these, before the first token could be chosen.
        probability: of this token, at temperature 1. alternatives: the likeliest tokens there with theirs, this one
            included if it is among them; the text of an end-of-answer token is "".
        prompt_tokens: length of the prompt, image included.
        layers: on a lane's first step, P(harm) of the clean prompt's last position behind each block; () elsewhere
            or where no block was calibrated.
    """

    request: int
    lane: int
    index: int
    token_id: int
    text: str
    harm: float | None
    events: tuple[Event, ...]
    finish: Literal["eos", "length", "gate"] | None
    seconds: float
    prefill_seconds: float
    probability: float | None = None
    alternatives: tuple[tuple[str, float], ...] = ()
    prompt_tokens: int = 0
    layers: tuple[float, ...] = ()


def _told_apart(probability: float, threshold: float) -> tuple[str, str]:
    """Both with two digits, or as many more as it takes to see which is higher."""
    digits = next((count for count in range(2, 7) if round(probability, count) != round(threshold, count)), 2)
    return f"{probability:.{digits}f}", f"{threshold:.{digits}f}"


@dataclass
class Answer:
    """One lane's transcript, grown by `add`. trace_threshold: where the trace counts as crossed."""

    name: str
    trace_threshold: float = 0.5
    tokens: list[str] = field(default_factory=list)
    harm: list[float | None] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    finish: str | None = None
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    probability: list[float | None] = field(default_factory=list)
    alternatives: list[tuple[tuple[str, float], ...]] = field(default_factory=list)
    prompt_tokens: int = 0
    layers: tuple[float, ...] = ()

    def add(self, step: Step) -> None:
        """Append one step of this lane."""
        if step.finish != "eos":
            self.tokens.append(step.text)
            self.harm.append(step.harm)
            self.probability.append(step.probability)
            self.alternatives.append(step.alternatives)
        self.prompt_tokens = step.prompt_tokens
        self.layers = step.layers or self.layers
        self.events.extend(step.events)
        self.finish, self.seconds, self.prefill_seconds = step.finish, step.seconds, step.prefill_seconds

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.tokens)

    @property
    def refused(self) -> bool:
        """Does the answer refuse anywhere? Where SASA refused, it does, however little of it fits."""
        return self.gated or refusal_start(self.text) is not None

    @property
    def gated(self) -> bool:
        """Did SASA refuse before the first word?"""
        return any(event.type == "gate" and event.fired for event in self.events)

    @property
    def refusal_token(self) -> int | None:
        """Index of the token in which the refusal begins."""
        start = refusal_start(self.text)
        if start is None:
            return None
        seen = 0
        for index, token in enumerate(self.tokens):
            seen += len(token)
            if seen > start:
                return index
        return None

    @property
    def crossed(self) -> int | None:
        """Index of the first token whose harm probability reaches the trace threshold."""
        return next((i for i, p in enumerate(self.harm) if p is not None and p >= self.trace_threshold), None)

    @property
    def tokens_per_second(self) -> float:
        """Decoding steps per second, 0 where there was none: the first token comes of the prompt's prefill, which is
        not counted; the token that ends an answer, which is not shown, is."""
        steps = len(self.tokens) - (self.finish != "eos")
        return max(steps, 0) / max(self.seconds - self.prefill_seconds, 1e-9)

    def summary(self) -> str:
        """One sentence for people, such as "Crossed 0.90 at token 34; 1 injection; refusal began at 41."."""
        gate = next((event for event in self.events if event.type == "gate"), None)
        read = shorten(gate.read, WIDEST, placeholder="…") if gate else ""
        sasa = f"SASA read “{read}” and" if read else "SASA"
        found, limit = _told_apart(gate.probability, gate.threshold) if gate else ("", "")
        if gate and gate.fired:
            return f"{sasa} refused before the first token: P(harm) {found} ≥ {limit}."
        parts = [f"{sasa} let it pass, P(harm) {found} < {limit}"] if gate else []
        if any(p is not None for p in self.harm):
            parts.append(f"stayed below {self.trace_threshold:.2f} in {len(self.tokens)} tokens" if self.crossed is None
                         else f"crossed {self.trace_threshold:.2f} at token {self.crossed}")
        injections = [event for event in self.events if event.type == "injection"]
        checks = sum(event.type == "check" for event in self.events)
        if injections:
            parts.append(f"{len(injections)} injection{'s' if len(injections) > 1 else ''}")
        elif checks:
            parts.append(f"{checks} check{'s' if checks > 1 else ''}, no injection")
        parts.append("no refusal" if self.refusal_token is None else f"refusal began at {self.refusal_token}")
        sentence = "; ".join(parts)
        return sentence[0].upper() + sentence[1:] + "."

    def to_json(self) -> dict[str, Any]:
        """The lane's object of `python -m safety generate --json`."""
        return {"name": self.name, "text": self.text, "tokens": self.tokens, "harm": self.harm,
                "events": [asdict(event) for event in self.events], "refused": self.refused, "finish": self.finish,
                "summary": self.summary(), "seconds": round(self.seconds, 4)}
