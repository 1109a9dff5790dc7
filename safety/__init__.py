"""Inference-time safety defenses for vision-language models, side by side and measured."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safety.artifacts import Artifacts, load_artifacts, save_artifacts
    from safety.engine import Engine, Request
    from safety.errors import UserError
    from safety.inputs import open_image
    from safety.loading import load
    from safety.lvlm import LVLM
    from safety.settings import Lane, Revision, Sampling, Sapt, Sasa
    from safety.transcript import Answer, Event, Step

__all__ = [
    "LVLM", "Answer", "Artifacts", "Engine", "Event", "Lane", "Request", "Revision", "Sampling", "Sapt", "Sasa", "Step",
    "UserError", "load", "load_artifacts", "open_image", "save_artifacts",
]

_HOMES = {
    "artifacts": ("Artifacts", "load_artifacts", "save_artifacts"), "engine": ("Engine", "Request"),
    "errors": ("UserError",), "inputs": ("open_image",), "loading": ("load",), "lvlm": ("LVLM",),
    "settings": ("Lane", "Revision", "Sampling", "Sapt", "Sasa"), "transcript": ("Answer", "Event", "Step"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: torch takes seconds, which a wrong flag or --help should not cost."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"safety.{module}"), name)
    raise AttributeError(f"module 'safety' has no attribute {name!r}")
