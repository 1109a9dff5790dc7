"""Try lanes on samples: who refuses what. Small and quick, to choose settings and to check them on unseen samples."""

from collections.abc import Callable, Sequence

from safety.engine import Engine, Request
from safety.evaluate.judges import is_garbage
from safety.refusal import refusal_start
from safety.samples import Sample
from safety.settings import Lane
from safety.statistics import rate
from safety.transcript import Answer

BATCH = 16


def answer_all(engine: Engine, samples: Sequence[Sample], lanes: Sequence[Lane], max_new_tokens: int,
               batch: int = BATCH, tick: Callable[[], None] = lambda: None) -> list[list[Answer]]:
    """Greedy answers[sample][lane], `batch` samples at a time; `tick` is called for every sample done."""
    answers: list[list[Answer]] = []
    for start in range(0, len(samples), batch):
        part = samples[start:start + batch]
        requests = [Request(sample.prompt, sample.image) for sample in part]
        answers += engine.answer_batch(requests, lanes=lanes, max_new_tokens=max_new_tokens)
        for _ in part:
            tick()
    return answers


def tally(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, dict]:
    """Per kind of sample: rates of refused, garbage and helpful (neither) answers."""
    table = {}
    for kind in dict.fromkeys(sample.kind for sample in samples):
        said = [text for sample, text in zip(samples, texts, strict=True) if sample.kind == kind]
        refused = sum(refusal_start(text) is not None for text in said)
        garbage = sum(refusal_start(text) is None and is_garbage(text) for text in said)
        table[kind] = {"refused": rate(refused, len(said)), "garbage": rate(garbage, len(said)),
                       "answered": rate(len(said) - refused - garbage, len(said))}
    return table
