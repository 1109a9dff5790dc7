"""One visitor's run: the engine in a thread of its own, its Steps gathered into at most 15 updates a second.

The thread lets the page answer Stop at once, even in the middle of a prefill, and lets the last tokens of a burst
out without waiting for the next one. The engine holds the model's lock: a run that was stopped ends there between
two tokens, and a run started meanwhile waits its turn.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from safety.engine import Answer, Engine, Step
from safety.errors import UserError
from safety.settings import Lane
from safety.ui.board import View, view_of

UPDATES_PER_SECOND = 15
STATE = {None: "streaming", "eos": "done", "length": "limit", "gate": "refused"}
BUG = "Something went wrong inside the app; the details are in its log. Your input is still here: you can run it again."

log = logging.getLogger(__name__)


class Runs:
    """The cancel event of every visitor's latest run. Starting a run cancels the visitor's previous one."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def start(self, session: str) -> threading.Event:
        """Cancel the visitor's run, if there is one, and return the cancel event for a new one."""
        with self._lock:
            self._cancel(session)
            event = self._events[session] = threading.Event()
            return event

    def cancel(self, session: str) -> None:
        """Cancel the visitor's run, if there is one."""
        with self._lock:
            self._cancel(session)

    def replaced(self, session: str, event: threading.Event) -> bool:
        """Did the visitor start a newer run? Then this one must not write on the page any more."""
        with self._lock:
            return self._events.get(session, event) is not event

    def forget(self, session: str, event: threading.Event) -> None:
        """Drop a run that has ended, unless a newer one took its place."""
        with self._lock:
            if self._events.get(session) is event:
                del self._events[session]

    def _cancel(self, session: str) -> None:
        if session in self._events:
            self._events[session].set()


class LiveRun:
    """Runs the lanes and yields (view, message) for the board and the notice; message is "" unless something failed.

    Args:
        engine: the engine; its artifacts give the trace threshold.
        lanes: what to run; lane 0 is the undefended one.
        cancel: ends the run between any two tokens; also set when the consumer goes away.
        arguments: further arguments of `Engine.stream`.
    """

    def __init__(self, engine: Engine, lanes: list[Lane], cancel: threading.Event, **arguments: Any):
        self.engine, self.lanes, self.cancel, self.arguments = engine, lanes, cancel, arguments
        trace = engine.artifacts.trace
        self.threshold: float | None = None if trace is None else trace.threshold
        self.answers = [Answer(lane.name, 0.5 if self.threshold is None else self.threshold) for lane in lanes]
        self.states = ["waiting"] * len(lanes)
        self.name = f"{time.time():.6f}"
        self.busy = engine.lvlm.lock.locked()
        self.steps: queue.Queue[Step | Exception | None] = queue.Queue()

    def __iter__(self) -> Iterator[tuple[View, str]]:
        threading.Thread(target=self._work, name="engine-run", daemon=True).start()
        try:
            yield self._view(), ""
            message = None
            while message is None:
                message = self._gather()
                yield self._view(), message or ""
        finally:
            self.cancel.set()

    def _work(self) -> None:
        """Move the engine's Steps into the queue; the end or the error that ended it comes last."""
        try:
            steps = self.engine.stream(lanes=self.lanes, cancel=self.cancel, **self.arguments)
            for step in steps:
                self.steps.put(step)
            self.steps.put(None)
        except Exception as error:  # handed to the visitor's thread, which logs what is not meant for the visitor
            self.steps.put(error)

    def _gather(self) -> str | None:
        """Take in one update's worth of Steps. Returns None while the run goes on, else its closing message."""
        due = time.monotonic() + 1 / UPDATES_PER_SECOND
        news = 0
        while (left := due - time.monotonic()) > 0 or not news:
            if self.cancel.is_set():
                return self._end("stopped")
            try:
                # Short waits, so that Stop is noticed even while the model is silent.
                item = self.steps.get(timeout=max(0.001, min(left, 0.05) if news else 0.05))
            except queue.Empty:
                continue
            news += 1
            if item is None:
                return self._end("stopped" if self.cancel.is_set() else "done")
            if isinstance(item, Exception):
                return self._fail(item)
            self._take(item)
        return None

    def _take(self, step: Step) -> None:
        self.answers[step.lane].add(step)
        self.states[step.lane] = STATE[step.finish]

    def _end(self, state: str) -> str:
        self.states = [old if old in ("done", "limit", "refused") else state for old in self.states]
        return ""

    def _fail(self, error: Exception) -> str:
        self._end("error")
        if isinstance(error, UserError):
            return str(error)
        log.error("A run failed", exc_info=error)
        return BUG

    def _view(self) -> View:
        image = "image and the " if self.arguments.get("image") is not None else ""
        wait = "Waiting for a run before this one to end …" if self.busy else f"Reading the {image}prompt …"
        return view_of(
            self.name,
            self.answers,
            self.lanes,
            self.states,
            threshold=self.threshold,
            max_new_tokens=self.arguments["max_new_tokens"],
            wait=wait,
        )


def guarded(work: Callable[[], Any]) -> tuple[Any, str]:
    """Return (result, "") or (None, a sentence for the visitor); bugs are logged."""
    try:
        return work(), ""
    except UserError as error:
        return None, str(error)
    except Exception:
        log.exception("The page failed")
        return None, BUG
