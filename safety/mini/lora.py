"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a decoder's linear layers: attach, train, save, merge.

Names are relative to the decoder ("layers.0.self_attn.q_proj.A"), so that weights trained on the bare language model
fit the same decoder inside LLaVA (``model.get_decoder()`` of either). The saved B carries the scale: merging is
W += B @ A and needs no other number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

RANK = 16
SCALE = 2.0


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update; A [rank, in] and B [out, rank] are float32."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out] in the input's dtype."""
        low = nn.functional.linear(x, self.A.to(x.dtype))
        return self.base(x) + nn.functional.linear(low, (SCALE * self.B).to(x.dtype))


def add_lora(decoder: nn.Module, rank: int = RANK) -> list[nn.Parameter]:
    """Freeze the decoder, wrap each of its linear layers in place, and return the trainable parameters."""
    decoder.requires_grad_(False)
    parameters: list[nn.Parameter] = []
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            wrapped = LoraLinear(module, rank)
            setattr(decoder.get_submodule(parent), child, wrapped)
            parameters += [wrapped.A, wrapped.B]
    return parameters


def lora_state(decoder: nn.Module) -> dict[str, torch.Tensor]:
    """The update's weights as fp16 tensors on the CPU, with the scale folded into B."""
    state: dict[str, torch.Tensor] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.A"] = module.A.detach().to("cpu", torch.float16)
            state[f"{name}.B"] = (SCALE * module.B.detach()).to("cpu", torch.float16)
    return state


def load_lora(decoder: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill a decoder prepared by ``add_lora`` with saved weights, to continue training them.

    Raises:
        ValueError: the tensors do not belong to this decoder and rank.
    """
    modules = {name: module for name, module in decoder.named_modules() if isinstance(module, LoraLinear)}
    if {f"{name}.{part}" for name in modules for part in "AB"} != set(tensors):
        raise ValueError("These LoRA weights name other layers than this model has.")
    with torch.no_grad():
        for name, module in modules.items():
            if module.A.shape != tensors[f"{name}.A"].shape or module.B.shape != tensors[f"{name}.B"].shape:
                raise ValueError(f"The LoRA weights of {name} have another shape than this model's.")
            module.A.copy_(tensors[f"{name}.A"])
            module.B.copy_(tensors[f"{name}.B"].float() / SCALE)


@torch.no_grad()
def merge_lora(decoder: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add saved LoRA weights into a plain decoder's linear layers, W += B @ A, computed in float32.

    Raises:
        ValueError: a tensor names a layer that the decoder lacks, its partner is missing, or its shape does not fit.
    """
    names = {key.rpartition(".")[0] for key in tensors}
    if {f"{name}.{part}" for name in names for part in "AB"} != set(tensors):
        raise ValueError("These LoRA weights are incomplete: each layer needs its A and its B.")
    linear = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    updates: list[tuple[nn.Linear, torch.Tensor]] = []
    for name in sorted(names):
        if name not in linear:
            raise ValueError(f"These LoRA weights name the layer {name}, which this model lacks.")
        low, high = tensors[f"{name}.A"].float(), tensors[f"{name}.B"].float()
        if (high.shape[0], low.shape[1]) != tuple(linear[name].weight.shape) or high.shape[1] != low.shape[0]:
            raise ValueError(f"The LoRA weights of {name} have another shape than this model's.")
        updates.append((linear[name], high @ low))
    for module, update in updates:  # only after every tensor was checked: a refused merge changes nothing
        weight = module.weight
        weight.copy_((weight.float() + update.to(weight.device)).to(weight.dtype))
