"""On a Hugging Face Space with ZeroGPU: one function that gets the GPU for as long as a run lasts.

ZeroGPU calls that function in a process forked for it, so it takes and yields plain data alone; the model was loaded
before the page was launched and is inherited. Anywhere else nothing of this is used.
"""

import importlib
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from PIL import Image

from safety.engine import Engine, Event, Step
from safety.settings import Lane, Sampling
from safety.ui.knobs import lane_of

START_SECONDS = 15  # until the first token: moving the weights to the GPU, the image, the prompt
TOKENS_PER_SECOND = 12  # of a 7B model with six lanes; a generous estimate is cut short by the run's end

_engine: Engine | None = None  # a worker process finds the model here


def seconds(request: dict[str, Any]) -> int:
    """Estimate how long a run needs the GPU: ZeroGPU reserves that much of the visitor's quota."""
    return START_SECONDS + -(-int(request["max_new_tokens"]) // TOKENS_PER_SECOND)


def answer(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run lanes given as plain data on the model of this process; yields each Step as plain data."""
    if _engine is None:
        raise RuntimeError("The worker process has no model: use_zero_gpu comes before the launch.")
    picture = None if request["image"] is None else Image.open(io.BytesIO(request["image"]))
    lanes = [lane_of(row) for row in request["lanes"]]
    sampling = Sampling(**request["sampling"])
    for step in _engine.stream(
        request["prompt"], picture, lanes=lanes, max_new_tokens=request["max_new_tokens"], sampling=sampling
    ):
        yield asdict(step)


def use_zero_gpu(engine: Engine) -> Callable[..., Iterator[Step]]:
    """Register the model and return what `Host.source` needs: a run's Steps, from the GPU that ZeroGPU lends."""
    global _engine
    _engine = engine
    on_gpu = importlib.import_module("spaces").GPU(duration=seconds)(answer)

    def source(
        _: Engine,
        *,
        prompt: str,
        image: Image.Image | None,
        lanes: list[Lane],
        max_new_tokens: int,
        sampling: Sampling,
        cancel: threading.Event,
    ) -> Iterator[Step]:
        buffer = io.BytesIO()
        if image is not None:
            image.save(buffer, "PNG")
        steps = on_gpu(
            {
                "prompt": prompt,
                "image": buffer.getvalue() or None,
                "lanes": [asdict(lane) for lane in lanes],
                "max_new_tokens": max_new_tokens,
                "sampling": asdict(sampling),
            }
        )
        for row in steps:
            if cancel.is_set():
                steps.close()  # tells the worker to stop
                return
            events = tuple(Event(**event) for event in row["events"])
            others = tuple((text, p) for text, p in row["alternatives"])
            yield Step(**row | {"events": events, "alternatives": others, "layers": tuple(row["layers"])})

    return source
