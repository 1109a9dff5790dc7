"""python -m safety bench: what the defenses and the lanes cost, as ratios of times measured side by side in one run.

Every repeat measures every row once, in turn, so that whatever else the machine does falls on all of them alike.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from PIL import Image
from tqdm import tqdm

from safety.artifacts import load_artifacts
from safety.engine import Engine
from safety.errors import UserError
from safety.loading import load
from safety.lvlm import LVLM
from safety.settings import Lane

PROMPT = "What do you see in this picture? Describe it in detail."
TOKENS = 96
BUSY = 0.15  # share of the processor at work before the benchmark starts that is worth a word


@dataclass(frozen=True)
class Row:
    """One ratio: `measure()` returns (time of the first, time of the second) in seconds."""

    name: str
    what: str
    target: float | None
    measure: Callable[[], tuple[float, float]]


def run(repeats: int, as_json: bool) -> int:
    """Measure on the miniature and print a table, or one JSON object."""
    if not 1 <= repeats <= 100:
        raise UserError("--repeats must be between 1 and 100.")
    lvlm = load()
    bench = _Bench(lvlm)
    busy = psutil.cpu_percent(1.0) / 100
    if busy > BUSY:
        print(f"Other work keeps {busy:.0%} of the processor busy: ratios will vary. Stop it for figures to rely on.",
              file=sys.stderr)
    rows = bench.rows()
    ratios: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in tqdm(range(repeats), desc="bench"):
        for row in rows:
            first, second = row.measure()
            ratios[row.name].append(first / second)
    result = {row.name: {"what": row.what, "median": statistics.median(values), "low": min(values),
                         "high": max(values), "n": len(values), "target": row.target,
                         "met": None if row.target is None else statistics.median(values) <= row.target}
              for row, values in zip(rows, ratios.values(), strict=True)}
    lag = _page_lag()
    if as_json:
        print(json.dumps({"model": lvlm.label, "tokens": TOKENS, "threads": torch.get_num_threads(),
                          "busy_before": busy, **result, "page_lag_seconds": lag}))
        return 0
    print(f"{lvlm.label}, {torch.get_num_threads()} threads, {TOKENS} new tokens, {repeats} repeats; "
          "ratios: median [lowest, highest]")
    for name, found in result.items():
        goal = "" if found["met"] is None else f"  target ≤ {found['target']}: {'met' if found['met'] else 'MISSED'}"
        print(f"  {name:28} {found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]{goal}")
        print(f"      {found['what']}")
    if lag is None:
        print("  page_lag                     not measured: needs playwright and Chromium (requirements-dev.txt)")
    else:
        print(f"  page_lag                     median {lag['median']:.2f} s, worst {lag['max']:.2f} s behind"
              f"  target ≤ 0.5: {'met' if lag['max'] <= 0.5 else 'MISSED'}")
    return 0


def _page_lag() -> dict[str, float] | None:
    """Seconds that a browser is behind at 15 updates a second on two columns; None without a browser."""
    from safety.ui.lag import measure_lag
    try:
        lag = measure_lag()
    except UserError:
        return None
    return {"median": lag.median, "max": lag.max, "updates": lag.updates}


class _Bench:
    def __init__(self, lvlm: LVLM) -> None:
        self.lvlm = lvlm
        self.engine = Engine(lvlm, load_artifacts(lvlm))
        self.image = Image.effect_noise((224, 224), 60).convert("RGB")
        settings = self.engine.artifacts.settings
        if not (settings.sasa and settings.revision and settings.sapt):
            raise UserError("The benchmark needs all three defenses calibrated: python -m safety calibrate.")
        # No gate fires, no soft prompt stays and no answer ends early: every lane does its full work every time.
        lvlm.eos_ids = frozenset()
        sasa, sapt = replace(settings.sasa, threshold=1.0), replace(settings.sapt, threshold=1.0)
        self.none = Lane("none")
        self.all = Lane("all", sasa, settings.revision, sapt)
        self.four = [self.none, Lane("sasa", sasa=sasa), Lane("revision", revision=settings.revision),
                     Lane("sapt", sapt=sapt)]
        self.reading = Lane("reading", sasa=replace(sasa, mode="reading"))
        self.pair = (sasa.safety_layer, sasa.fused_layer)
        self.interval = sapt.interval

    def rows(self) -> list[Row]:
        """The ratios, with the targets of the project."""
        return [
            Row("lanes_vs_separate", "four lanes (none, sasa, revision, sapt) in one stream / four separate runs", 0.4,
                lambda: (self.answer(self.four), sum(self.answer([lane]) for lane in self.four))),
            Row("defended_vs_generate", "one lane with all three defenses / undefended through transformers.generate()",
                1.15, lambda: (self.answer([self.all]), self.generate())),
            Row("first_token_lanes_vs_one", "time until all four lanes have their first token / one undefended lane",
                1.6, lambda: (self.answer(self.four, 1), self.answer([self.none], 1))),
            Row("reading_first_token_vs_one",
                "first token of one lane whose SASA has the picture read aloud (as long as it may) / undefended", None,
                lambda: (self.answer([self.reading], 1), self.answer([self.none], 1))),
            Row("sasa_two_passes_vs_ours", "SASA's prompt as two full passes / clean prefill and shared trunk", None,
                lambda: (2 * self.prefill(), self.sasa_prefill())),
            Row("sapt_uncached_check_vs_ours",
                "one SAPT check as an uncached forward of the whole sequence / as five columns of a decoding step",
                None, lambda: (self.uncached_check(), self.cached_check())),
        ]

    def answer(self, lanes: list[Lane], tokens: int = TOKENS) -> float:
        """Seconds for one request."""
        return _seconds(lambda: self.engine.answer(PROMPT, self.image, lanes=lanes, max_new_tokens=tokens))

    def generate(self) -> float:
        """Seconds for the same request through transformers, processor included as above."""
        def call() -> None:
            inputs = self.lvlm.prepare(PROMPT, self.image, TOKENS)
            self.lvlm.model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        return _seconds(call)

    def prefill(self) -> float:
        """Seconds for one clean prefill."""
        inputs = self.lvlm.prepare(PROMPT, self.image, 0)
        return _seconds(lambda: self.lvlm.prefill(inputs, set()))

    def sasa_prefill(self) -> float:
        """Seconds for a clean prefill and the projected stream."""
        from safety.defenses.sasa import projected_hidden
        inputs = self.lvlm.prepare(PROMPT, self.image, 0)
        return _seconds(lambda: projected_hidden(self.lvlm, self.lvlm.prefill(inputs, set(self.pair)), *self.pair, 1.0))

    def uncached_check(self) -> float:
        """Seconds for prompt, 64 tokens and soft prompt in one uncached forward pass."""
        trunk = self.lvlm.prefill(self.lvlm.prepare(PROMPT, self.image, 0), set())
        embeds = torch.cat([trunk.decoder_kwargs["inputs_embeds"], self._random(64)], 1)
        with torch.inference_mode():
            return _seconds(lambda: self.lvlm.decoder(inputs_embeds=embeds, use_cache=False))

    def cached_check(self) -> float:
        """Seconds that a decoding step with a check takes."""
        trunk = self.lvlm.prefill(self.lvlm.prepare(PROMPT, self.image, 0), set())
        mask = torch.ones(1, trunk.length + 5, dtype=torch.long, device=self.lvlm.device)
        positions = torch.arange(trunk.length, trunk.length + 5, device=self.lvlm.device)[None]
        with torch.inference_mode():
            return _seconds(lambda: self.lvlm.decode(self._random(5), mask, positions, trunk.cache))

    def _random(self, count: int) -> torch.Tensor:
        return self.lvlm.embed(torch.randint(self.lvlm.vocabulary, (1, count), device=self.lvlm.device))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
