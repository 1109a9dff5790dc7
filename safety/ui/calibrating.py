"""Calibrating the loaded model from the page: samples that a person names, into the folder that is found again."""

import random
import shlex
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from safety.artifacts import Artifacts
from safety.engine import Engine
from safety.errors import UserError
from safety.samples import Sample
from safety.ui.host import Calibration

SHARE_HELD_OUT = 0.2


def calibration(data: str) -> Calibration:
    """Return the work for `Host.calibrate`: read the samples, calibrate everything, return the new Artifacts.

    Args:
        data: what `safety.benchmarks.read` takes (a JSONL file, or a benchmark's name and folder), or several of
            these between spaces or line breaks; one that contains a space stands in quotes.

    Raises:
        UserError: no samples are named, or a quote is not closed.
    """
    try:
        specs = shlex.split(data)
    except ValueError:
        raise UserError("A quote is missing its partner in the list of samples.") from None
    if not specs:
        raise UserError("Name the samples to calibrate on: a JSONL file, or for example figstep:FOLDER vlguard:FOLDER.")

    def work(engine: Engine, report: Callable[[str, int, int], None], cancel: threading.Event) -> Artifacts:
        from safety.artifacts import default_folder
        from safety.benchmarks import read_all
        from safety.calibrate import Cancelled, calibrate

        samples, held_out = split(read_all(specs))
        folder = default_folder(engine.lvlm)
        try:
            return calibrate(
                engine.lvlm,
                samples,
                held_out,
                folder,
                Path("build") / "calibrate" / folder.parent.name,
                report=report,
                cancel=cancel,
            )
        except Cancelled:
            raise UserError("Calibrating was stopped; what is finished is taken up again next time.") from None

    return work


def split(samples: Sequence[Sample], seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """Return (samples to learn from, samples held out), both in the order given.

    The same share of every label and kind is held out, drawn at random: files are often sorted.
    """
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.label, sample.kind].append(index)
    draw = random.Random(seed)
    held = {index for group in groups.values() for index in draw.sample(group, round(len(group) * SHARE_HELD_OUT))}
    return (
        [sample for index, sample in enumerate(samples) if index not in held],
        [sample for index, sample in enumerate(samples) if index in held],
    )
