"""How far the browser is behind the engine: the real page on a synthetic stream, timed by both ends on one clock."""

import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from safety.engine import Event, Step
from safety.settings import Lane, Sapt
from safety.ui.browser import chromium, served
from safety.ui.page import build_page

_WATCH = """() => {
  window.arrivals = [];
  const seen = {};
  new MutationObserver(() => {
    document.querySelectorAll('.lane .body').forEach((body, lane) => {
      const count = body.querySelectorAll('.token').length;
      if (count && count !== seen[lane]) { seen[lane] = count; window.arrivals.push([lane, count, Date.now() / 1000]); }
    });
  }).observe(document.querySelector('.lanes'), {childList: true, subtree: true});
}"""


@dataclass(frozen=True)
class Lag:
    """Seconds from an engine's Step to its token in the browser's document, over all updates that arrived."""

    median: float
    max: float
    updates: int


class _Metronome:
    """An engine that emits one token per lane at a steady rate and notes when."""

    def __init__(self, rate: float, tokens: int):
        self.rate, self.tokens = rate, tokens
        self.sent: dict[tuple[int, int], float] = {}
        self.lvlm = SimpleNamespace(name="metronome", label="metronome", blocks=30, markers=[], lock=threading.Lock())
        self.artifacts = SimpleNamespace(
            sasa=None,
            revision=None,
            sapt=SimpleNamespace(length=4, detectors={"joint": None}),
            layers=None,
            about={},
            check=lambda lane, blocks: None,
            trace=SimpleNamespace(threshold=0.9),
            settings=SimpleNamespace(sasa=None, revision=None, sapt=Sapt()),
        )

    def stream(self, *, lanes: list[Lane], cancel: threading.Event, **_: Any) -> Iterator[Step]:
        start = time.time()
        for index in range(self.tokens):
            time.sleep(max(0.0, start + index / self.rate - time.time()))
            for lane in range(len(lanes)):
                harm = index / self.tokens
                events = (Event("check", index, harm, 0.9, False),) if lane and index % 16 == 15 else ()
                finish = "length" if index == self.tokens - 1 else None
                self.sent[lane, index + 1] = time.time()
                yield Step(0, lane, index, 0, f"word{index} ", harm, events, finish, time.time() - start, 0.0)  # type: ignore[arg-type]
            if cancel.is_set():
                return


def measure_lag(rate: float = 15.0, seconds: float = 8.0) -> Lag:
    """Stream `rate` tokens a second into two columns for some seconds and time each token's arrival.

    Raises:
        UserError: no browser to measure with.
    """
    engine = _Metronome(rate, round(rate * seconds))
    with served(build_page(engine)) as address, chromium() as browser:  # type: ignore[arg-type]
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        page.wait_for_selector(".lane")
        page.evaluate(_WATCH)
        page.fill("#prompt textarea", "Count.")
        page.click("#run")
        page.wait_for_function(
            "document.querySelectorAll('.lane[data-state=limit]').length === 2", timeout=(seconds + 60) * 1000
        )
        arrivals = page.evaluate("window.arrivals")
    lags = [at - engine.sent[lane, count] for lane, count, at in arrivals]
    return Lag(statistics.median(lags), max(lags), len(lags))


if __name__ == "__main__":
    print(measure_lag())
