"""SAPT, the Safety Reminder (arXiv 2506.15734): when does a row get its soft prompt checked, and what came of it.

A check appends the soft prompt behind the row's tokens; the detector reads the post-norm state of the last soft token.
Fired: the soft prompt stays, and the row's next token comes from it. Not fired: it is rolled back. The engine does
this inside the row's ordinary decoding step (`Engine`); here is the rule.
"""

from safety.detector import Probe
from safety.parts import SaptArtifact
from safety.settings import Sapt


class Watch:
    """One row's checks. The soft prompt is injected at most once, as in the authors' released code."""

    def __init__(self, settings: Sapt, artifact: SaptArtifact) -> None:
        self.settings = settings
        self.detector: Probe = artifact.detectors[settings.detector]
        self.injected = False
        self._checked = -1

    def due(self, index: int) -> bool:
        """Is there a check before token `index`: at k-1, 2k-1, … for an interval of k."""
        return not self.injected and index % self.settings.interval == self.settings.interval - 1

    def due_at_end(self, index: int) -> bool:
        """The model wants to end its answer with token `index`: look first, unless that was just done (ours)."""
        return self.settings.end_check and not self.injected and self._checked != index

    def decide(self, index: int, probability: float) -> bool:
        """Take note of a check before token `index`; True when the soft prompt stays."""
        self._checked = index
        self.injected = probability >= self.settings.threshold
        return self.injected
