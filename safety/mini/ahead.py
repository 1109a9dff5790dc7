"""What the coming steps of a training learn from, made by other processes while the GPU learns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

Made = TypeVar("Made")


class Ahead(Dataset[Made]):
    """Calls ``make(step)`` for step after step, and on a GPU well before the steps are asked for.

    Drawing 32 pictures, or writing thousands of words as a reader would, takes longer than a GPU takes to learn from
    them. On the CPU, where the training needs every core, a step's material is made when it is asked for.

    Args:
        make: a pure function of the step's number, so that it does not matter who calls it.
        steps: length of the run.
        device: where the model learns, "cpu" or "cuda".
        workers: processes (default: every core but one for a GPU, none for the CPU).
    """

    def __init__(self, make: Callable[[int], Made], steps: int, device: str, workers: int | None = None) -> None:
        self.make, self.steps = make, steps
        on_gpu = not device.startswith("cpu")
        self.workers = workers if workers is not None else max(0, (os.cpu_count() or 1) - 1) if on_gpu else 0
        self._stream: Iterator[Made] | None = None

    def __getitem__(self, step: int) -> Made:
        return self.make(step)

    def __call__(self, step: int) -> Made:
        """What a step learns from. Steps are asked for one by one, from the first that a resumed run does."""
        if not self.workers:
            return self.make(step)
        if self._stream is None:
            steps = range(step, self.steps)
            # Forked, so that what `make` refers to need not be picklable; it never touches the GPU.
            self._stream = iter(DataLoader(self, None, sampler=steps, num_workers=self.workers, prefetch_factor=4,
                                           multiprocessing_context="fork"))
        made = next(self._stream)
        if step + 1 == self.steps:
            next(self._stream, None)  # asked beyond its end, it ends its processes; else the next training's inherit it
        return made
