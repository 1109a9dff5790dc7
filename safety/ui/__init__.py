"""The page: layout, live columns, examples."""

from safety.ui.page import build_page
from safety.ui.theme import launch_options

__all__ = ["build_page", "launch_options"]
