"""The page: layout, live columns, examples."""

from safety.ui.host import Host
from safety.ui.page import build_page
from safety.ui.theme import launch_options

__all__ = ["Host", "build_page", "launch_options"]
