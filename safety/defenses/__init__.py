"""The three defenses: how each of them edits or judges its rows. Settings live in `safety.settings`."""

from collections.abc import Iterator
from contextlib import contextmanager


class Window:
    """Which rows of the batch the blocks now running compute: all of them, or one row that a SASA band re-runs."""

    def __init__(self) -> None:
        self.rows = slice(None)

    @property
    def whole(self) -> bool:
        """True while the whole batch runs."""
        return self.rows == slice(None)

    @contextmanager
    def only(self, row: int) -> Iterator[None]:
        """Inside, blocks run for this row alone."""
        self.rows = slice(row, row + 1)
        try:
            yield
        finally:
            self.rows = slice(None)
