"""Questions in, Steps or Answers out: every check at the edge, the model's lock, and one decode loop behind it."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from safety.artifacts import Artifacts
from safety.decoding import Run
from safety.errors import UserError
from safety.inputs import open_image
from safety.lvlm import LVLM
from safety.reading import type_out
from safety.settings import MAX_LANES, NEW_TOKENS, Lane, Sampling, check_length
from safety.transcript import Answer, Event, Step

__all__ = ["Answer", "Engine", "Event", "Request", "Step"]


@dataclass(frozen=True)
class Request:
    """What a person asks: a prompt and, if there is one, an image (a path or an opened picture)."""

    prompt: str
    image: str | Path | Image.Image | None = None


class Engine:
    """Answers requests with one model and its artifacts."""

    def __init__(self, lvlm: LVLM, artifacts: Artifacts) -> None:
        self.lvlm = lvlm
        self.artifacts = artifacts

    def stream(self, prompt: str, image: str | Path | Image.Image | None = None, *, lanes: Sequence[Lane],
               max_new_tokens: int = NEW_TOKENS, sampling: Sampling = Sampling(),
               cancel: threading.Event | None = None) -> Iterator[Step]:
        """Answer one request in several lanes at once; see `stream_batch`."""
        return self.stream_batch([Request(prompt, image)], lanes=lanes, max_new_tokens=max_new_tokens,
                                 sampling=sampling, cancel=cancel)

    def answer(self, prompt: str, image: str | Path | Image.Image | None = None, *, lanes: Sequence[Lane],
               max_new_tokens: int = NEW_TOKENS, sampling: Sampling = Sampling(),
               cancel: threading.Event | None = None) -> list[Answer]:
        """Like `stream`, but wait and return one Answer per lane."""
        return self.answer_batch([Request(prompt, image)], lanes=lanes, max_new_tokens=max_new_tokens,
                                 sampling=sampling, cancel=cancel)[0]

    def answer_batch(self, requests: Sequence[Request], *, lanes: Sequence[Lane], max_new_tokens: int = NEW_TOKENS,
                     sampling: Sampling = Sampling(), cancel: threading.Event | None = None) -> list[list[Answer]]:
        """Like `stream_batch`, but wait: answers[request][lane]."""
        threshold = self.artifacts.trace.threshold if self.artifacts.trace else 0.5
        answers = [[Answer(lane.name, threshold) for lane in lanes] for _ in requests]
        for step in self.stream_batch(requests, lanes=lanes, max_new_tokens=max_new_tokens, sampling=sampling,
                                      cancel=cancel):
            answers[step.request][step.lane].add(step)
        return answers

    @torch.inference_mode()
    def stream_batch(self, requests: Sequence[Request], *, lanes: Sequence[Lane], max_new_tokens: int = NEW_TOKENS,
                     sampling: Sampling = Sampling(), cancel: threading.Event | None = None) -> Iterator[Step]:
        """Answer several requests, each in every lane, as one batch; one Step per token of each row.

        Everything is checked before any model work. The model's lock is held from the first step to the last, or
        until the generator is closed; `cancel` is looked at before every token and while waiting for the lock.

        Raises:
            UserError: lanes, settings, an image or a prompt that cannot be served; says what to do. Or the model was
                unloaded while the run waited for the lock: `Session.engine` is the one that answers then.
        """
        cancel = cancel or threading.Event()
        self._check(requests, lanes, max_new_tokens, sampling)
        pictures = [None if request.image is None else open_image(request.image) for request in requests]
        inputs = [self.lvlm.prepare(request.prompt, picture, max_new_tokens)
                  for request, picture in zip(requests, pictures, strict=True)]
        while not self.lvlm.lock.acquire(timeout=0.05):
            if cancel.is_set():
                return
        try:
            if self.lvlm.closed:  # replaced, or only until the other one has failed to load: see `Session.switch`
                raise UserError(f"{self.lvlm.name} was unloaded for another model before this run began. "
                                "Run it again as soon as a model is ready.")
            began = time.perf_counter()
            reads = any(lane.sasa and lane.sasa.mode == "reading" for lane in lanes)
            with self.lvlm.encoding_once() if reads else nullcontext():
                typed = type_out(self.lvlm, [request.prompt for request in requests], pictures, cancel) if reads else ()
                run = Run(self.lvlm, self.artifacts, lanes, max_new_tokens, sampling)
                yield from run.steps(inputs, cancel, typed, began)
        finally:
            self.lvlm.lock.release()

    def _check(self, requests: Sequence[Request], lanes: Sequence[Lane], max_new_tokens: int,
               sampling: Sampling) -> None:
        if not requests:
            raise UserError("There is no request to answer.")
        if not 1 <= len(lanes) <= MAX_LANES:
            raise UserError(f"Between 1 and {MAX_LANES} lanes can run at once, but {len(lanes)} were asked for.")
        check_length(max_new_tokens)
        sampling.check()
        for lane in lanes:
            self.artifacts.check(lane, self.lvlm.blocks)
            if lane.sasa and lane.sasa.mode != "probe" and lane.sasa.safety_layer < self.lvlm.deepstack:
                raise UserError(f"This model adds image features behind its first {self.lvlm.deepstack} blocks: "
                                f"SASA's safety layer must be at least {self.lvlm.deepstack}.")
