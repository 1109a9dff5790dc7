"""Calibrating the loaded model from the page: samples that a person names, into a folder that is found again."""

import re
import threading
from collections.abc import Callable
from pathlib import Path

from safety.artifacts import Artifacts
from safety.engine import Engine
from safety.errors import UserError
from safety.ui.host import Calibration

SHARE_HELD_OUT = 0.2


def calibration(data: str) -> Calibration:
    """Return the work for `Host.calibrate`: read the samples, calibrate everything, return the new Artifacts.

    Args:
        data: what `safety.benchmarks.read` takes: a JSONL file, or a benchmark's name and folder.

    Raises:
        UserError: no samples are named.
    """
    if not data.strip():
        raise UserError("Name the samples to calibrate on: a JSONL file, or for example figstep:FOLDER.")

    def work(engine: Engine, report: Callable[[str, int, int], None], cancel: threading.Event) -> Artifacts:
        from safety.artifacts import SHIPPED
        from safety.benchmarks import read
        from safety.calibrate import Cancelled, calibrate

        samples = read(data.strip())
        last = round(len(samples) * (1 - SHARE_HELD_OUT))
        name = re.sub(r"[^\w.-]+", "-", engine.lvlm.name.strip("/")) or "model"
        try:
            return calibrate(
                engine.lvlm,
                samples[:last],
                samples[last:],
                SHIPPED / name / "defenses",
                Path("build") / "calibrate" / name,
                report=report,
                cancel=cancel,
            )
        except Cancelled:
            raise UserError("Calibrating was stopped; what is finished is taken up again next time.") from None

    return work
