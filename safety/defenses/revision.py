"""Internal activation revision (arXiv 2501.16378): add alpha * r, r pointing from unsafe to safe activations."""

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from safety.defenses import Window
from safety.lvlm import LVLM
from safety.parts import RevisionArtifact
from safety.settings import Revision


def delta(settings: Revision, artifact: RevisionArtifact) -> Tensor:
    """What is added, fp32: [width] to the residual stream, or [heads * head_dim] to the attention output's input."""
    vector = artifact.vector(settings.level, settings.vector, settings.layer)
    if settings.units == "std":
        scale = artifact.scale(settings.level, settings.vector, settings.layer)
        vector = vector / vector.norm(dim=-1, keepdim=True).clamp_min(1e-12) * scale[..., None]
    if settings.level == "head":
        chosen = chosen_heads(settings, artifact)
        vector = vector * torch.zeros(len(vector), 1).index_fill_(0, torch.tensor(chosen, dtype=torch.long), 1.0)
    return settings.alpha * vector.flatten()


def chosen_heads(settings: Revision, artifact: RevisionArtifact) -> list[int]:
    """The heads that are revised: the best `fraction` by held-out probe accuracy, or as many random ones (control)."""
    accuracy = artifact.accuracy[settings.layer]
    count = round(settings.fraction * len(accuracy))
    if settings.heads == "random":
        return torch.randperm(len(accuracy), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return accuracy.argsort(descending=True, stable=True)[:count].tolist()


def register(lvlm: LVLM, layer: int, level: str, added: Tensor, window: Window) -> RemovableHandle:
    """Hook the revised module of one forward pass; `added` [rows, 1, features] is zero for rows left alone, and
    `window` tells which of the rows the module computes.

    Layer level adds to the block's output (the residual stream after its MLP), head level to the input of the
    attention's output projection. The edit is out of place, in the activation's own device and dtype.
    """
    if level == "layer":
        return lvlm.layers[layer].register_forward_hook(
            lambda module, args, output: output + added[window.rows].to(output))
    return lvlm.attention_output(layer).register_forward_pre_hook(
        lambda module, args: (args[0] + added[window.rows].to(args[0]),))
