"""Who runs next: one line for the one model, with a place for each visitor, and limits for a public page."""

import threading
import time
from collections import deque
from collections.abc import Callable

from safety.errors import UserError


class Line:
    """A first-come, first-served line of bounded length. The model serves whoever stands at its head."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    def join(self) -> "Place":
        """Take the last place. Raises UserError when the line is full."""
        with self._moved:
            if len(self._line) >= self.places:
                raise UserError(f"{len(self._line)} runs are waiting already: please try again in a minute.")
            place = Place(self)
            self._line.append(place)
            return place

    def ahead(self, place: object) -> int:
        """How many stand before this place; 0 once it has left."""
        with self._moved:
            return self._line.index(place) if place in self._line else 0

    def wait(self, place: object, timeout: float) -> bool:
        """Wait until this place is the head of the line; False after `timeout` seconds."""
        with self._moved:
            return self._moved.wait_for(lambda: bool(self._line) and self._line[0] is place, timeout)

    def leave(self, place: object) -> None:
        """Give the place up, wherever it is in the line."""
        with self._moved:
            if place in self._line:
                self._line.remove(place)
                self._moved.notify_all()


class Place:
    """One visitor's place in the line."""

    def __init__(self, line: Line) -> None:
        self._of = line

    @property
    def ahead(self) -> int:
        """How many runs come first."""
        return self._of.ahead(self)

    def wait(self, timeout: float) -> bool:
        """Is it our turn, within `timeout` seconds?"""
        return self._of.wait(self, timeout)

    def leave(self) -> None:
        """Let the next one step up."""
        self._of.leave(self)


class RateLimit:
    """At most `runs` in `seconds` for each visitor. Remembers times alone, and forgets visitors who stay away.

    Args:
        clock: seconds; a test passes its own.
    """

    def __init__(self, runs: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.runs, self.seconds, self._clock = runs, seconds, clock
        self._times: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def take(self, visitor: str) -> None:
        """Count one run. Raises UserError when the visitor has had theirs; says how long to wait."""
        now = self._clock()
        with self._lock:
            for name in [name for name, times in self._times.items() if times[-1] <= now - self.seconds]:
                del self._times[name]
            times = self._times.setdefault(visitor, deque())
            while times and times[0] <= now - self.seconds:
                times.popleft()
            if len(times) >= self.runs:
                wait = max(1, round(times[0] + self.seconds - now))
                raise UserError(f"You have had {self.runs} runs in {self.seconds / 60:g} minutes. This public demo is "
                                f"shared: please wait {wait} s, or play a recording meanwhile.")  # fmt: skip
            times.append(now)

    def give_back(self, visitor: str) -> None:
        """Take back the visitor's latest run, which did not come to be."""
        with self._lock:
            times = self._times.get(visitor)
            if times:
                times.pop()
            if not times:
                self._times.pop(visitor, None)
