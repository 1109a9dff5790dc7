"""A stand-in for the engine: scripted lanes at a chosen speed, so that browser tests are exact and quick.

It keeps the engine's contract (validation by the first next(), one lock, cancel between any two tokens) and needs
no model. The product never imports it.
"""

import math
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from safety.engine import Event, Step
from safety.errors import UserError
from safety.settings import Lane, Revision, Sampling, Sapt, Sasa, check_length

HARMFUL = (
    "Sure, here is the list. 1. First comes a step that a safe model would not give. 2. Then comes a second step, "
    "in more detail than the first. 3. At last comes the step that does the damage, without any warning."
).split()
TURN = "I'm sorry, but I can't go on with this. It would hurt someone. Please ask a person you trust for help.".split()
GATE = "I'm sorry, but I can't help with that request."
HELPFUL = (
    "Here is the list. 1. Start with short sessions and reward calm behaviour. 2. Teach one word at a time, and use "
    "the same word every day. 3. End each session while the dog still enjoys it, then play."
).split()


HELD_OUT = {
    lane: {kind: {"refused": {"hits": hits, "n": 24}} for kind, hits in (("typographic", a), ("typographic twin", b))}
    for lane, a, b in (("none", 0, 1), ("sasa", 5, 6), ("sasa:mode=reading", 13, 4), ("all", 12, 10))
}


class StandInEngine:
    """Scripted answers. `words_per_second` sets the speed, `prefill` the wait before the first token."""

    def __init__(self, words_per_second: float = 30.0, prefill: float = 0.1, words: list[str] | None = None):
        self.delay, self.prefill, self.words = 1 / words_per_second, prefill, words
        self.lvlm = SimpleNamespace(
            name="stand-in",
            label="stand-in · scripted",
            blocks=30,
            heads=9,
            width=576,
            markers=["<image>"],
            lock=threading.Lock(),
        )
        self.artifacts = SimpleNamespace(
            sasa=SimpleNamespace(
                pairs=[(12, 14), (13, 15), (16, 20)],
                thresholds={"13-15": 0.5, "16-20": 0.7, "clean": 0.3, "reading": 0.6},
                reading=True,
            ),
            revision=SimpleNamespace(layers=list(range(8, 25))),
            sapt=SimpleNamespace(length=4, detectors={"joint": None}),
            check=lambda lane, blocks: None,
            layers=None,
            about={"held_out": HELD_OUT, "date": "2026-11-23"},
            trace=SimpleNamespace(threshold=0.9),
            settings=SimpleNamespace(sasa=Sasa(13, 15), revision=Revision(layer=19), sapt=Sapt()),
        )
        self.requests: list[dict[str, Any]] = []
        self.running = self.overlaps = self.finished = 0
        self.fail: Exception | None = None

    def stream(
        self,
        prompt: str,
        image: Any = None,
        lanes: list[Lane] | tuple[Lane, ...] = (),
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Step]:
        """Yield the scripted Steps of every lane, as the engine does."""
        self.requests.append(dict(prompt=prompt, image=image, lanes=list(lanes), max_new_tokens=max_new_tokens))
        if not prompt.strip():
            raise UserError("The prompt is empty: type a question or pick an example.")
        check_length(max_new_tokens)
        for lane in lanes:
            for settings in (lane.sasa, lane.revision):
                if settings is not None:
                    settings.check(self.lvlm.blocks)
        cancel = cancel or threading.Event()
        with self.lvlm.lock:
            self.running += 1
            self.overlaps = max(self.overlaps, self.running)
            try:
                yield from self._lanes(prompt, list(lanes), max_new_tokens, cancel)
            finally:
                self.running -= 1
                self.finished += 1

    def _lanes(self, prompt: str, lanes: list[Lane], limit: int, cancel: threading.Event) -> Iterator[Step]:
        start = time.perf_counter()
        time.sleep(self.prefill)
        harmful = "list" in prompt or "poison" in prompt
        scripts = [list(_script(lane, harmful, self.words)) for lane in lanes]
        for index in range(limit):
            if cancel.is_set():
                return
            for row, script in enumerate(scripts):
                if index >= len(script):
                    continue
                text, harm, events = script[index]
                gated = any(event.type == "gate" and event.fired for event in script[0][2])
                finish: Any = "length" if index == limit - 1 else None
                if index == len(script) - 1:
                    finish = "gate" if gated else "eos"
                yield Step(
                    0, row, index, 1, text, harm, tuple(events), finish, time.perf_counter() - start, self.prefill,
                    probability=0.6, alternatives=((text, 0.6), ("other ", 0.2), ("<b>bold</b>", 0.1)),
                    prompt_tokens=200, layers=tuple(i / 30 for i in range(30)) if index == 0 else (),
                )  # fmt: skip
            if all(index >= len(script) - 1 for script in scripts):
                return
            if self.fail is not None and index == 3:
                raise self.fail
            time.sleep(self.delay)


def _script(lane: Lane, harmful: bool, words: list[str] | None) -> Iterator[tuple[str, float, list[Event]]]:
    first: list[Event] = []
    if lane.sasa is not None and lane.sasa.mode != "project":
        p = 0.97 if harmful else 0.04
        first.append(Event("gate", 0, p, lane.sasa.threshold, p >= lane.sasa.threshold))
    if first and first[0].fired:
        for i, word in enumerate(GATE.split()):
            yield word + " ", 0.05, first if i == 0 else []
        return
    answer = list(words or (HARMFUL if harmful else HELPFUL))
    injected_at = None
    i = 0
    while i < len(answer):
        rise = 0.5 + 0.47 * math.tanh((i - 14) / 6) if harmful else 0.06 + 0.04 * math.sin(i / 2)
        calm = 0.55 if lane.revision is not None and harmful else 1.0
        harm = rise * calm if injected_at is None else max(0.05, 0.9 - 0.2 * (i - injected_at))
        events = list(first) if i == 0 else []
        if lane.sapt is not None and i and i % lane.sapt.interval == 0 and injected_at is None:
            fired = harm >= lane.sapt.threshold * 0.6
            p = max(lane.sapt.threshold, min(0.99, harm + 0.3)) if fired else harm
            events.append(Event("check", i, p, lane.sapt.threshold, fired))
            if fired:
                events.append(Event("injection", i, p, lane.sapt.threshold, True))
                injected_at = i
                answer = answer[:i] + TURN
        yield answer[i] + " ", round(harm, 4), events
        i += 1
    yield "", 0.1, []  # the token that ends an answer has no text
