"""What the page's events do. Methods, because Gradio finds `request` and `event` by their annotations."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from safety.engine import Engine
from safety.errors import UserError
from safety.inputs import check_prompt, open_image, small_copy
from safety.ui.calibrating import calibration
from safety.ui.host import Choice, Host
from safety.ui.knobs import knobs_of, lanes_of, length_of, sampling_of
from safety.ui.live import REMEMBERED, LiveRun, Runs, guarded
from safety.ui.presets import PRESETS, Preset, preset_of
from safety.ui.recordings import LAYOUTS, Playback, recorded
from safety.ui.top import top_view

log = logging.getLogger(__name__)
POLL = 0.2  # seconds between two looks at a model that is being loaded
DECODERS = 2  # pictures that are decoded at once: a large one takes gigabytes for a moment
BROKEN_LINK = "The link's settings could not be read, so the page starts with the usual ones."
NOT_FITTING = "Not everything in the link fits this model; left as it was:"
NO_PICTURE = "This run has no picture."


def spec_of(host: Host) -> dict[str, Any]:
    """What the editor can turn, for the model that is loaded now."""
    return knobs_of(host.engine, host.mode.max_new_tokens) | {"version": host.version}


def layer_auroc(engine: Engine) -> list[float] | None:
    """How well each block's probe judges held-out requests; None where none were calibrated."""
    layers = engine.artifacts.layers
    return None if layers is None else [round(value, 3) for value in layers.auroc.tolist()]


def _preset(event: gr.EventData) -> Preset:
    """The example whose card was clicked."""
    index = event._data.get("index")
    return PRESETS[index if index in range(len(PRESETS)) else 0]


class Handlers:
    """The page's events on one host. `counts` is all that is kept of what visitors do."""

    def __init__(self, host: Host):
        self.host = host
        self.runs = Runs()
        self.counts: Counter[str] = Counter()
        self._decoding = threading.Semaphore(DECODERS)
        self._rejected: dict[str, str] = {}  # session: what was wrong with the picture that was taken out of the form

    def run(self, request: gr.Request, path: str | None, words: str, form: Any) -> Iterator[Any]:
        """Run the form's lanes; yields updates of (board, notice, Stop button)."""
        private = not self.host.mode.public
        # Checked first: a form that cannot run leaves a run that is going on alone.
        run, message = guarded(lambda: self._prepare(request, path, words, form), private)
        self._count("refused" if message else "runs")
        if message:
            yield gr.skip(), message, gr.skip()
            return
        session = request.session_hash or ""
        rejected = self._rejected.pop(session, None)
        self.runs.start(session, run)
        updates = iter(run)
        view, message = next(updates)
        yield view, f"{rejected} {NO_PICTURE}" if rejected and path is None else "", gr.Button(interactive=True)
        for view, message in updates:
            if self.runs.current(session, run):
                yield view, message or gr.skip(), gr.skip()
        if self.runs.current(session, run):
            yield gr.skip(), gr.skip(), gr.Button(interactive=False)

    def _prepare(self, request: gr.Request, path: str | None, words: str, form: Any) -> LiveRun:
        """Check everything that can be checked before the model; raises UserError."""
        host = self.host
        engine, lanes = host.ready(), lanes_of(form, host.ready())
        check_prompt(words, engine.lvlm.markers)
        sampling, length = sampling_of(form), length_of(form)
        preset = preset_of(path, words)
        if preset is None:
            host.mode.check_prompt(words)
        host.mode.check_length(length)
        for lane in lanes:
            engine.artifacts.check(lane, engine.lvlm.blocks)
        who = request.client.host if request.client else "unknown"
        if host.rate is not None:
            host.rate.take(who)  # before the picture, which costs the most of what is left
        image = None if path is None else self._open(path)
        about = {
            "model": engine.lvlm.label,
            "prompt": words,
            "example": None if preset is None else preset.title,
            "image": None if path is None or image is None else f"{Path(path).name}, {image.width} × {image.height}",
            "picture": None if image is None else small_copy(image),
            "lanes": [asdict(lane) for lane in lanes],
            "max_new_tokens": length,
            "sampling": asdict(sampling),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "harmful": None if preset is None else preset.harmful,
            "layer_auroc": layer_auroc(engine),
        }
        try:
            return LiveRun(host, lanes, about, prompt=words, image=image, max_new_tokens=length, sampling=sampling)
        except UserError:  # the line is full, which is not the visitor's doing
            if host.rate is not None:
                host.rate.give_back(who)
            raise

    def _open(self, path: str) -> Image.Image:
        with self._decoding:
            return open_image(path)

    def _count(self, what: str) -> None:
        """Nothing else is kept of a visit to a public page."""
        self.counts[what] += 1
        if self.host.mode.public:
            log.info("counts: %s", dict(self.counts))

    def stop(self, request: gr.Request) -> None:
        """Cancel the visitor's run. The run itself switches the button off: an answer from here could come too late,
        when the next run has switched it on."""
        self.runs.cancel(request.session_hash or "")

    def leave(self, request: gr.Request) -> None:
        """The visitor closed or reloaded the tab: nobody waits for the run any more."""
        self.runs.leave(request.session_hash or "")
        self._rejected.pop(request.session_hash or "", None)

    def reveal(self, request: gr.Request) -> Any:
        """Uncover the visitor's latest run; returns its view."""
        self._count("reveals")
        return self.runs.reveal(request.session_hash or "") or gr.skip()

    def fill(self, request: gr.Request, event: gr.EventData) -> tuple[str | None, str, str]:
        """Put an example into the form; returns (image, prompt, notice)."""
        self._rejected.pop(request.session_hash or "", None)
        preset = _preset(event)
        return None if preset.image is None else str(preset.image), preset.prompt, ""

    def replay(self, request: gr.Request, event: gr.EventData, form: Any) -> tuple[Any, ...]:
        """Play an example's recording; returns (image, prompt, board, notice, Stop button)."""
        image, prompt, _ = self.fill(request, event)
        preset = _preset(event)
        if not recorded(preset.key):
            return image, prompt, gr.skip(), "There is no recording of this example.", gr.skip()
        several = isinstance(form, dict) and len(form.get("lanes") or []) > 1
        playback = Playback(preset, LAYOUTS[several], self.host.mode.public)
        self._count("replays")
        self.runs.start(request.session_hash or "", playback)
        # A run that was going on has just been ended: it is not the visitor's any more, so Stop is switched off here.
        return image, prompt, playback.view(), "", gr.Button(interactive=False)

    def restore(self, event: gr.EventData) -> tuple[str | None, Any, str]:
        """Fill in a link's prompt and, if it was an example's, its image; returns (image, prompt, notice)."""
        if event._data.get("broken"):
            return None, gr.skip(), BROKEN_LINK
        preset = next((preset for preset in PRESETS if preset.key == event._data.get("preset")), None)
        image = str(preset.image) if preset is not None and preset.image is not None else None
        dropped = ", ".join(str(name)[:60] for name in (event._data.get("dropped") or [])[:6])
        return image, str(event._data.get("prompt", "")), f"{NOT_FITTING} {dropped}." if dropped else ""

    def check_image(self, request: gr.Request, path: str | None) -> str:
        """Why a file cannot be used, or nothing; the page takes such a file out of the form again.

        The next run says again that it goes without the picture.
        """
        session = request.session_hash or ""
        self._rejected.pop(session, None)
        if path is None:
            return ""
        _, message = guarded(lambda: self._open(path), not self.host.mode.public)
        if message:
            self._rejected[session] = message
            while len(self._rejected) > REMEMBERED:
                del self._rejected[next(iter(self._rejected))]
        return message

    async def watch(self) -> AsyncIterator[tuple[Any, Any]]:
        """Show how the model's loading goes until it is over; yields (head, editor)."""
        shown: Any = None
        while True:
            status = self.host.status()
            if status != shown:
                shown = status
                # In a thread: after a change of models it reads whole folders of artifacts.
                yield await asyncio.to_thread(top_view, self.host), gr.update(spec=spec_of(self.host))
            if status["state"] != "working":
                return
            await asyncio.sleep(POLL)

    def switch(self, event: gr.EventData) -> str:
        """Load the model that the head's panel names; returns the notice."""
        model, *flags = (str(event._data.get(field.name) or "").strip() for field in fields(Choice))
        return guarded(lambda: self.host.start(Choice(model or "miniature", *(flag or None for flag in flags))))[1]

    def calibrate(self, event: gr.EventData) -> str:
        """Calibrate the loaded model on the samples that the head's panel names; returns the notice."""
        return guarded(lambda: self.host.calibrate(calibration(str(event._data.get("data") or ""))))[1]

    def cancel(self) -> None:
        """Stop calibrating; what is finished is kept."""
        self.host.cancel.set()
