"""One visitor's run: the engine in a thread of its own, its Steps gathered into at most 15 updates a second.

The thread lets the page answer Stop at once, even in the middle of a prefill, and lets the last tokens of a burst
out without waiting for the next one. Runs stand in the host's line; one that was stopped leaves it between two tokens.
"""

import contextvars
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from safety.engine import Answer, Step
from safety.errors import UserError, out_of_memory
from safety.settings import Lane
from safety.ui.board import STATE, View, view_of
from safety.ui.host import Host

UPDATES_PER_SECOND = 15
REMEMBERED = 256  # visitors whose latest run can be revealed; whoever leaves unnoticed is forgotten in time
BUG = "Something went wrong inside the app; the details are in its log. Your input is still here: you can run it again."
MEMORY = (
    "The model ran out of memory. Try fewer columns, a shorter answer or a smaller picture; the model is still loaded."
)

log = logging.getLogger(__name__)


class Shown(Protocol):
    """What a visitor's board shows: a live run, or a recording."""

    cancel: threading.Event
    cover: bool

    def view(self) -> View:
        """The board's value now."""


class Runs:
    """Every visitor's latest run. Starting a run cancels the visitor's previous one."""

    def __init__(self) -> None:
        self._runs: dict[str, Shown] = {}
        self._lock = threading.Lock()

    def start(self, session: str, run: Shown) -> None:
        """Make this the visitor's run; the one before, if there is one, ends."""
        with self._lock:
            self._cancel(session)
            self._runs.pop(session, None)
            self._runs[session] = run
            while len(self._runs) > REMEMBERED:
                del self._runs[next(iter(self._runs))]

    def cancel(self, session: str) -> None:
        """End the visitor's run, if there is one; its text stays known until the visitor leaves."""
        with self._lock:
            self._cancel(session)

    def current(self, session: str, run: Shown) -> bool:
        """Is this still the visitor's run? A newer one may have taken its place on the page."""
        with self._lock:
            return self._runs.get(session) is run

    def reveal(self, session: str) -> View | None:
        """Uncover the visitor's latest run and return its view; None when there is none."""
        with self._lock:
            run = self._runs.get(session)
        if run is None:
            return None
        run.cover = False
        return run.view()

    def leave(self, session: str) -> None:
        """The visitor has gone: end the run and forget what it said."""
        with self._lock:
            self._cancel(session)
            self._runs.pop(session, None)

    def _cancel(self, session: str) -> None:
        if session in self._runs:
            self._runs[session].cancel.set()


class LiveRun:
    """Runs the lanes and yields (view, message) for the board and the notice; message is "" unless something failed.

    Args:
        host: the engine that answers, the line before it and the page's rules.
        lanes: what to run; lane 0 is the undefended one.
        about: what was asked and of whom, for the view; `harmful` if that is known.
        arguments: further arguments of `Engine.stream`.

    Raises:
        UserError: no model is loaded, or the line is full.
    """

    def __init__(self, host: Host, lanes: list[Lane], about: View, **arguments: Any):
        self.engine, self.source = host.ready(), host.source
        self.lanes, self.about, self.arguments = lanes, about, arguments
        self.cancel = threading.Event()
        trace = self.engine.artifacts.trace
        self.threshold: float | None = None if trace is None else trace.threshold
        self.answers = [Answer(lane.name, 0.5 if self.threshold is None else self.threshold) for lane in lanes]
        self.states = ["waiting"] * len(lanes)
        self.name = f"{time.time():.6f}"
        self.cover = self.public = host.mode.public  # `cover` ends when the visitor asks for the text
        self.place = host.line.join()
        self.steps: queue.Queue[Step | Exception | None] = queue.Queue()

    def __iter__(self) -> Iterator[tuple[View, str]]:
        # In the visitor's context: ZeroGPU reads there whose share of the GPU a run takes.
        work = contextvars.copy_context().run
        threading.Thread(target=work, args=(self._work,), name="engine-run", daemon=True).start()
        try:
            yield self.view(), ""
            message = None
            while message is None:
                message = self._gather()
                yield self.view(), message or ""
        finally:
            self.cancel.set()

    def _work(self) -> None:
        """Move the engine's Steps into the queue; the end or the error that ended it comes last."""
        try:
            while not self.place.wait(0.05):
                if self.cancel.is_set():
                    return
            steps = self.source(self.engine, lanes=self.lanes, cancel=self.cancel, **self.arguments)
            for step in steps:
                self.steps.put(step)
            self.steps.put(None)
        except Exception as error:  # handed to the visitor's thread, which logs what is not meant for the visitor
            self.steps.put(error)
        finally:
            self.place.leave()

    def _gather(self) -> str | None:
        """Take in one update's worth of Steps. Returns None while the run goes on, else its closing message."""
        due = time.monotonic() + 1 / UPDATES_PER_SECOND
        news, ahead = 0, self.place.ahead
        while (left := due - time.monotonic()) > 0 or not news:
            if self.cancel.is_set():
                return self._end("stopped")
            try:
                # Short waits, so that Stop is noticed even while the model is silent.
                item = self.steps.get(timeout=max(0.001, min(left, 0.05) if news else 0.05))
            except queue.Empty:
                if self.place.ahead != ahead:
                    return None  # a step forward in the line is news, too
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
        self._end("memory" if out_of_memory(error) else "error")
        if isinstance(error, UserError):
            return str(error)
        if out_of_memory(error):
            log.warning("A run was out of memory")
            return MEMORY
        log_bug("A run failed", error, private=not self.public)
        return BUG

    def view(self) -> View:
        """What the board shows now."""
        image = "image and the " if self.arguments.get("image") is not None else ""
        ahead, states, wait = self.place.ahead, self.states, f"Reading the {image}prompt …"
        if ahead and not any(answer.tokens for answer in self.answers) and states[0] == "waiting":
            states = ["queued"] * len(states)
            wait = "Next in line: one run before yours." if ahead == 1 else f"In line: {ahead} runs before yours."
        artifacts = self.engine.artifacts
        return view_of(
            self.name,
            self.answers,
            self.lanes,
            states,
            threshold=self.threshold,
            max_new_tokens=self.arguments["max_new_tokens"],
            wait=wait,
            cover=self.cover,
            blocks=self.engine.lvlm.blocks,
            soft_tokens=0 if artifacts.sapt is None else artifacts.sapt.length,
            pairs=() if artifacts.sasa is None else artifacts.sasa.pairs,
            about=self.about,
        )


def log_bug(what: str, error: Exception, private: bool) -> None:
    """Log a bug; on a public page without its message, which may quote what a visitor wrote."""
    if private:
        log.error(what, exc_info=error)
    else:
        log.error("%s: %s\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


def guarded(work: Callable[[], Any], private: bool = True) -> tuple[Any, str]:
    """Return (result, "") or (None, a sentence for the visitor); bugs are logged."""
    try:
        return work(), ""
    except UserError as error:
        return None, str(error)
    except Exception as error:
        log_bug("The page failed", error, private)
        return None, BUG
