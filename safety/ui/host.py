"""What the page talks to: the loaded model and its line, or what is happening instead.

Loading and calibrating go on in a thread, so the page opens before the model is there and stays usable meanwhile. A
model is replaced only by one that has loaded: a failed load leaves the old one working.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safety.artifacts import Artifacts
from safety.engine import Engine, Step
from safety.errors import UserError, about_file
from safety.ui.line import Line, RateLimit
from safety.ui.mode import PRIVATE, Mode

log = logging.getLogger(__name__)
Progress = Callable[[str], None]
Calibration = Callable[[Engine, Callable[[str, int, int], None], threading.Event], Artifacts]
BUSY = "The model is being changed. Wait until it is ready."


@dataclass(frozen=True)
class Choice:
    """A model to load: what the flags of app.py and the page's model panel name."""

    model: str = "miniature"
    quantization: str | None = None
    revision: str | None = None
    artifacts: str | None = None


class Loader:
    """Loads the first model, and puts each further one in the place of the one before; see `safety.session`."""

    def __init__(self) -> None:
        self._session: Any = None

    def __call__(self, choice: Choice, progress: Progress) -> Engine:
        """Return an engine on the chosen model. Raises UserError: it could not be loaded; an older one still works."""
        from safety import load, load_artifacts  # seconds of imports: not before somebody asks for a model
        from safety.session import Session

        folder = None if choice.artifacts is None else Path(choice.artifacts)
        if self._session is None:
            lvlm = load(choice.model, choice.quantization, revision=choice.revision, progress=progress)
            self._session = Session(Engine(lvlm, load_artifacts(lvlm, folder)))
            return self._session.engine
        return self._session.switch(choice.model, choice.quantization, choice.revision, folder, progress)

    def folders(self) -> list[list[str]]:
        """[path, name] of each folder of artifacts that fits the loaded model."""
        if self._session is None:
            return []
        from safety.artifacts import artifact_folders

        found = [found.folder for found in artifact_folders(self._session.engine.lvlm) if not found.reason]
        return [[str(folder), "/".join(folder.parts[-2:])] for folder in found]

    def adopt(self, engine: Engine) -> None:
        """The same model with other artifacts is what a later switch has to replace."""
        if self._session is not None:
            self._session.engine = engine


class Host:
    """Holds one engine at a time.

    Attributes:
        engine: what answers, None before the first model is ready.
        version: counts the engines: a page that was built for another one notices.
        mode, line, rate: the page's rules and who runs next.
        cancel: ends the calibration that is going on.
        source: turns a run into Steps; `Engine.stream`, or its ZeroGPU stand-in.
    """

    def __init__(
        self,
        engine: Engine | None = None,
        mode: Mode = PRIVATE,
        load: Callable[[Choice, Progress], Engine] | None = None,
        source: Callable[..., Iterator[Step]] = lambda engine, **arguments: engine.stream(**arguments),
    ) -> None:
        self.engine, self.mode, self.source, self._load = engine, mode, source, load or Loader()
        self.version = 0 if engine is None else 1
        self.line = Line(mode.places)
        self.rate = RateLimit(mode.runs, mode.seconds) if mode.runs else None
        self.cancel = threading.Event()
        self._work = threading.Lock()
        self._message, self._name, self._failed = "", "", False
        self._fraction: float | None = None
        self._folders: tuple[int, list[list[str]]] = (-1, [])  # the version that they were looked up for, and they

    def ready(self) -> Engine:
        """The engine. Raises UserError while there is none."""
        if self.engine is None:
            raise UserError(self._message if self._failed else "The model is still being loaded. It runs in a moment.")
        if getattr(self.engine.lvlm, "closed", False):  # it made room for another one
            if self._work.locked():
                raise UserError(BUSY)
            raise UserError(f"No model is loaded: {self._message or 'the last one could not be brought back.'}")
        return self.engine

    def status(self) -> dict[str, Any]:
        """What the page shows about the model: plain data."""
        state = "working" if self._work.locked() else "failed" if self._failed else "ready"
        engine = self.engine
        about = {} if engine is None else engine.artifacts.about
        parts = [] if engine is None else [key for key, value in vars(engine.artifacts.settings).items() if value]
        return {
            "state": state,
            "label": engine.lvlm.label if engine is not None else "",
            "model": engine.lvlm.name if engine is not None else "",
            "message": self._message,
            "fraction": self._fraction,
            "task": self._name,
            "version": self.version,
            "public": self.mode.public,
            "calibrated": parts,
            "made": {key: about[key] for key in ("date", "command") if isinstance(about.get(key), str)},
        }

    def folders(self) -> list[list[str]]:
        """[path, name] of each folder of artifacts that fits the loaded model and could be loaded with it."""
        if not isinstance(self._load, Loader):
            return []
        version, found = self._folders
        if version != self.version:  # every file of every folder is read: not more often than there is another model
            version, found = self._folders = self.version, self._load.folders()
        return found

    def start(self, choice: Choice) -> threading.Thread:
        """Load another model in the background; `status` tells how it goes. Raises UserError while one is loading."""
        return self._start(f"Loading {choice.model}", lambda: self.switch(choice))

    def switch(self, choice: Choice) -> None:
        """Load a model and put it in the old one's place. Raises UserError: the old one still works."""
        self.engine = self._load(choice, self._report)
        self.version += 1

    def calibrate(self, work: Calibration) -> threading.Thread:
        """Calibrate the loaded model in the background; `work(engine, report, cancel)` returns its new Artifacts."""
        engine = self.ready()
        cancel = threading.Event()

        def run() -> None:
            artifacts = work(engine, self._step, cancel)
            self.engine = Engine(engine.lvlm, artifacts)
            if isinstance(self._load, Loader):
                self._load.adopt(self.engine)
            self.version += 1

        return self._start("Calibrating", run, cancel)

    def _start(self, name: str, work: Callable[[], None], cancel: threading.Event | None = None) -> threading.Thread:
        if not self._work.acquire(blocking=False):
            raise UserError(BUSY)
        if cancel is not None:  # not before: a second calibration that is refused must leave the first one stoppable
            self.cancel = cancel
        self._name, self._message, self._failed, self._fraction = name, f"{name} …", False, None
        thread = threading.Thread(target=self._guarded, args=(work,), name="host", daemon=True)
        thread.start()
        return thread

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
            self._message = ""
        except UserError as error:
            self._message, self._failed = str(error), True
        except OSError as error:
            self._message, self._failed = f"{self._name} failed: {about_file(error)}", True
        except Exception as error:  # a thread of its own: nobody else would hear of it
            log.exception("%s failed", self._name)
            self._message, self._failed = f"{self._name} failed: {type(error).__name__}. The log has the details.", True
        finally:
            if self._failed and self.engine is not None and not getattr(self.engine.lvlm, "closed", False):
                self._message += f" {self.engine.lvlm.name} is still loaded and works."
            self._fraction = None
            self._work.release()

    def _report(self, message: str) -> None:
        self._message = message

    def _step(self, stage: str, done: int, total: int) -> None:
        self._message, self._fraction = f"Calibrating: {stage}, {done} of {total}", done / max(total, 1)
