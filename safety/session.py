"""One engine at a time, and how another model takes its place while the app runs."""

import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from safety import memory
from safety.artifacts import Artifacts, artifact_folders, load_artifacts
from safety.engine import Engine
from safety.errors import UserError
from safety.loading import load
from safety.lvlm import LVLM

Progress = Callable[[str], None]


class Session:
    """Holds the engine that answers now in `engine`, which may be assigned (the same model with other artifacts)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._switching = threading.Lock()

    def switch(self, name: str, quantization: str | None = None, revision: str | None = None,
               artifacts: Path | None = None, progress: Progress = lambda message: None) -> Engine:
        """Load another model and put it in the old one's place; the old one's memory is freed.

        The old model answers until the new one is ready. If there is not room for both, it is closed once the new one
        is known, fetched and about to be loaded, and opened again should that fail. A stream that is running is waited
        for; one that waits for the old model's lock raises a UserError.

        Args:
            name, quantization, revision, progress: see `load`.
            artifacts: a folder; None takes the first of the project's folders that fits the model, or no artifacts.

        Raises:
            UserError: the model or artifacts cannot be loaded, or another switch is going on; `engine` is unchanged.
        """
        if not self._switching.acquire(blocking=False):
            raise UserError("Another model is being loaded already. Wait until it is ready.")
        try:
            old = self.engine.lvlm
            try:
                # A model that was made in memory could not be loaded again; one that is closed has nothing to give.
                gives = old if old.source and not old.closed else None
                # In a frame of its own, which `_forget` can clear: nothing here refers to what was half made.
                engine = _load_engine(name, quantization, revision, artifacts, progress, gives)
            except BaseException as error:
                if old.closed:
                    _forget(error)
                    _reopen(old, error, progress)
                raise
            self.engine = engine
            if not old.closed:
                with old.lock:
                    old.close()
            memory.give_back()
            return engine
        finally:
            self._switching.release()


def _load_engine(name: str, quantization: str | None, revision: str | None, artifacts: Path | None,
                 progress: Progress, replaced: LVLM | None) -> Engine:
    lvlm = load(name, quantization, revision, progress, replaced=replaced)
    return Engine(lvlm, _artifacts(lvlm, artifacts))


def _artifacts(lvlm: LVLM, folder: Path | None) -> Artifacts:
    if folder is None:
        folder = next((found.folder for found in artifact_folders(lvlm) if not found.reason), None)
    return Artifacts() if folder is None else load_artifacts(lvlm, folder)


def _forget(error: BaseException | None) -> None:
    """Clear the frames that raised an error: they refer to what was half loaded."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    memory.give_back()


def _reopen(old: LVLM, error: BaseException, progress: Progress) -> None:
    """Load a closed model's weights again, into the same LVLM, which engines refer to."""
    progress(f"Going back to {old.name} …")
    try:
        model = load(old.source, old.quantization).model
        with old.lock:  # a run that starts meanwhile meets the model closed or whole
            old.open(model)
    except UserError as second:
        raise UserError(f"{error} And {old.name} could not be loaded again: {second} Restart the app.") from error
