"""Inference-time safety defenses for vision-language models, side by side and measured."""

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
