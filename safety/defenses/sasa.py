"""SASA, Self-Aware Safety Augmentation (arXiv 2507.21637): project a fused block's semantics onto a safety block.

Two streams. The clean stream runs all blocks. The projected stream takes the clean stream's states of the safety
block s and the fused block f, replaces the former by their projection, and re-enters at block s+1; it keeps keys and
values of its own, so the clean stream stays clean.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from safety.defenses import Window
from safety.lvlm import LVLM, Trunk
from safety.parts import SasaArtifact
from safety.settings import Sasa


def project(safety: Tensor, fused: Tensor, strength: float) -> Tensor:
    """(1-lambda) H_s + lambda a H_f with a = <H_s, H_f> / (||H_f||^2 + eps), per position, computed in fp32.

    Args:
        safety, fused: [..., width] outputs of blocks s and f. strength: lambda; 1 is the paper, 0 the identity.

    Returns: [..., width] in the dtype of `safety`.
    """
    s, f = safety.float(), fused.to(safety.device).float()
    scale = (s * f).sum(-1, keepdim=True) / ((f * f).sum(-1, keepdim=True) + 1e-6)
    return torch.lerp(s, scale * f, strength).to(safety.dtype)


def pairs(settings: Sasa, artifact: SasaArtifact) -> list[tuple[int, int]]:
    """The (safety, fused) blocks whose projected streams are judged: one pair, or all that are calibrated."""
    return artifact.pairs if settings.choice == "per-input" else [(settings.safety_layer, settings.fused_layer)]


def judge(lvlm: LVLM, trunk: Trunk, settings: Sasa, artifact: SasaArtifact, typed: Tensor) -> float:
    """Probability of harm from the first-token logits: of the projected stream ("gate") or the clean one ("probe").
    Of several projected streams the one counts whose probe is most certain. "reading" (ours) judges `trunk` together
    with `typed` [3 * width], the post-norm last states of its forms as text."""
    if settings.mode == "reading":
        assert artifact.reading is not None  # checked at the edge
        return artifact.reading.probability(torch.cat([trunk.hidden, typed])).item()
    if settings.mode == "probe":
        return artifact.clean.probability(lvlm.logits(trunk.hidden)).item()
    found = []
    for pair in pairs(settings, artifact):
        hidden = projected_hidden(lvlm, trunk, *pair, settings.strength)
        found.append(artifact.probes[pair].probability(lvlm.logits(hidden)).item())
    return max(found, key=lambda probability: abs(probability - 0.5))


def projected_hidden(lvlm: LVLM, trunk: Trunk, safety: int, fused: int, strength: float) -> Tensor:
    """[width] post-norm state of the projected stream at the last prompt position.

    The clean stream is the shared prefill, so this costs blocks s+1..L-1 on the prompt and nothing else.
    """
    return lvlm.rerun_blocks(trunk, safety + 1, project(trunk.states[safety], trunk.states[fused], strength))


class Band:
    """The projected stream of one row between its safety and fused block, while it generates (mode "project").

    In every forward pass of the row's batch the clean stream runs up to block f; there the band projects, runs
    blocks s+1..f again with its own keys and values, and hands its result on in place of the row's clean state.
    """

    def __init__(self, lvlm: LVLM, settings: Sasa) -> None:
        self.lvlm = lvlm
        self.settings = settings
        self.cache = DynamicCache()

    def hook(self, row: int, rows: int, window: Window, add: Callable[[RemovableHandle], None]) -> None:
        """Install on one forward pass of a batch of `rows` rows, in which this band belongs to row `row`.

        While a band re-runs blocks, `window` tells the other edits, and the other rows' bands, that it is for its row.
        """
        safety, fused = self.settings.safety_layer, self.settings.fused_layer
        block_kwargs: dict[int, dict[str, Any]] = {}
        safety_state: list[Tensor] = []

        def keep_state(module: Any, args: Any, output: Tensor) -> None:
            if window.whole:
                safety_state[:] = [output[row:row + 1]]

        def keep_kwargs(block: int) -> Callable[..., None]:
            def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
                if window.whole:
                    block_kwargs[block] = dict(kwargs)
            return keep

        def rerun(module: Any, args: Any, output: Tensor) -> Tensor | None:
            if not window.whole:
                return None
            x = project(safety_state[0], output[row:row + 1], self.settings.strength)
            with window.only(row):
                for block in range(safety + 1, fused + 1):
                    kwargs = {name: _one_row(value, row, rows) for name, value in block_kwargs[block].items()}
                    x = self.lvlm.run_block(block, x, kwargs, self.cache)
            return torch.cat([output[:row], x, output[row + 1:]])

        add(self.lvlm.layers[safety].register_forward_hook(keep_state))
        for block in range(safety + 1, fused + 1):
            add(self.lvlm.layers[block].register_forward_pre_hook(keep_kwargs(block), with_kwargs=True))
        add(self.lvlm.layers[fused].register_forward_hook(rerun))


def _one_row(value: Any, row: int, rows: int) -> Any:
    """A block's argument for one row of the batch: tensors that have the batch dimension are cut to it."""
    if isinstance(value, tuple):
        return tuple(_one_row(item, row, rows) for item in value)
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
        return value[row:row + 1]
    return value
