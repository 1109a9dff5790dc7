"""How much memory a model needs in each number format, how much is free, and where the model goes."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from safety.errors import UserError

GB = 1e9
TOKENS = 2 * 1024  # two lanes, each with a picture, a prompt and an answer; more lanes take more
BESIDE_WEIGHTS = 0.05  # activations and fragmentation, as a share of the weights
FIXED = {"cuda": 0.6 * GB, "cpu": 0.2 * GB}  # libraries and workspaces
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes on a device in each number format."""

    none: int
    bf16: int
    int8: int
    nf4: int

    def of(self, quantization: str) -> int:
        """Bytes for "none", "bf16", "int8" or "nf4"."""
        return int(getattr(self, quantization))


def quantised_linears(model: Any) -> dict[str, nn.Linear]:
    """{name: module} of what int8 and nf4 quantise: linear layers, but not the head, nor what the blocks do not divide.

    bitsandbytes' CPU kernels need whole blocks of 64 inputs and 32 outputs; some vision towers (SigLIP) have others.
    """
    head, tied = model.get_output_embeddings(), model.get_input_embeddings().weight
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head and module.weight is not tied
            and module.in_features % 64 == 0 and module.out_features % 32 == 0}


def need(model: Any, device: str, compute: torch.dtype) -> Need:
    """Estimate from a model's shapes alone (it may be on the meta device): weights, the lanes' cache, workspace.

    Args:
        device: "cuda" or "cpu". compute: what quantised models compute in.
    """
    linear = sum(module.weight.numel() for module in quantised_linears(model).values())
    rest = sum(parameter.numel() for parameter in model.parameters()) - linear
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = TOKENS * config.num_hidden_layers * 2 * heads * dim

    def total(per_linear: float, per_rest: float) -> int:
        weights = linear * per_linear + rest * per_rest
        return int(weights * (1 + BESIDE_WEIGHTS) + cached * per_rest + FIXED[device])

    size = compute.itemsize
    # bitsandbytes: int8 keeps a scale per output row; nf4 one fp32 scale for 64 weights.
    return Need(none=total(4, 4), bf16=total(2, 2), int8=total(1.01, size), nf4=total(0.5 + 4 / 64, size))


def free_memory(device: str) -> list[int]:
    """Free bytes of every GPU, or one figure for the CPU, which heeds a container's limit."""
    if device == "cuda":
        return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics["file"]))  # the page cache gives way
    except (OSError, ValueError, KeyError):
        pass  # no limit ("max"), or no such files here
    return [free]


def held(model: Any, device: str) -> list[int]:
    """Bytes that a loaded model holds on every GPU, or one figure for the CPU."""
    sizes = [0] * (torch.cuda.device_count() if device == "cuda" else 1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == device:
            sizes[tensor.device.index or 0] += tensor.numel() * tensor.element_size()
    return sizes


def give_back() -> None:
    """Hand memory that nothing refers to any more back to the device."""
    gc.collect()  # hooks and modules refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fits(size: int, free: Sequence[int]) -> bool:
    """Can a model of this size be placed?"""
    return size <= _room(free)


def choose(name: str, wanted: str | None, preferred: Sequence[str], needs: Need, device: str,
           free: Sequence[int]) -> str:
    """The number format to load in: the wanted one, or the first of `preferred` that fits.

    Args:
        needs: see `need`. free: see `free_memory`.

    Raises:
        UserError: what is wanted, or everything, needs more than is free; names what would fit.
    """
    fitting = [quantization for quantization in preferred if fits(needs.of(quantization), free)]
    if wanted is None and fitting:
        return fitting[0]
    if wanted is not None and fits(needs.of(wanted), free):
        return wanted
    refused = wanted or preferred[0]
    place = "on the CPU" if device == "cpu" else "on the GPU" if len(free) == 1 else f"on {len(free)} GPUs"
    facts = f"{name} needs about {_gb(needs.of(refused))} in {refused}, and {_gb(_room(free))} are free {place}"
    if fitting:
        raise UserError(f"{facts}; {fitting[0]} needs about {_gb(needs.of(fitting[0]))}: "
                        f"use --quantization {fitting[0]}.")
    least = min(preferred, key=needs.of)
    smallest = f"; even {least} needs about {_gb(needs.of(least))}" if least != refused else ""
    raise UserError(f"{facts}{smallest}. Free some memory, or choose a smaller model.")


def placement(bytes_needed: int, device: str, free: Sequence[int]) -> dict[str, Any]:
    """Arguments of `from_pretrained`: the CPU, the one GPU with the most room, or several GPUs."""
    if device == "cpu":
        return {"device_map": {"": "cpu"}}
    emptiest = max(range(len(free)), key=lambda index: free[index])
    if bytes_needed <= free[emptiest] or len(free) == 1:
        return {"device_map": {"": emptiest}}
    return {"device_map": "auto", "max_memory": {index: int(size * 0.9) for index, size in enumerate(free)}}


def _room(free: Sequence[int]) -> int:
    """What one model can use: a model that is spread over several GPUs leaves a tenth of each unused."""
    return max(max(free), int(sum(free) * 0.9)) if len(free) > 1 else free[0]


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
