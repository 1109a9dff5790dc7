"""How far a calibration is, for a terminal or a page, and a way to stop it between two samples."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int], None]


class Cancelled(Exception):
    """The person stopped the calibration; what was finished is kept in the work folder."""


class Progress:
    """Counts the steps of one stage after the other.

    Args:
        report: called with (stage, steps done, steps in all) at every step.
        cancel: looked at at every step; set, `Cancelled` is raised there.
    """

    def __init__(self, report: Report = lambda stage, done, total: None, cancel: threading.Event | None = None) -> None:
        self.report = report
        self.cancel = cancel or threading.Event()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
        """Inside, call the yielded function after every step. Notes the seconds that the stage took."""
        began = time.perf_counter()
        self.report(name, done, total)

        def tick() -> None:
            nonlocal done
            done += 1
            self.report(name, done, total)
            if self.cancel.is_set():
                raise Cancelled(name)
        yield tick
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 1)
