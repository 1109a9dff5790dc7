"""Keys and values of single requests, kept as one tensor each and joined into batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


def pack(cache: DynamicCache, dtype: torch.dtype | None = None) -> Tensor:
    """[2 * blocks, kv_heads, n, head_dim] of a batch-1 cache: keys and values of block 0, of block 1, …"""
    layers: Any = cache.layers  # a DynamicCache's layers all hold keys and values, which their types do not say
    return torch.stack([tensor[0].to(dtype or tensor.dtype) for layer in layers
                        for tensor in (layer.keys, layer.values)])


def join(packed: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> tuple[DynamicCache, Tensor]:
    """(batch cache, mask [rows, width], 1 = visible) of packed rows, the shorter ones padded on the left."""
    width = max(row.shape[2] for row in packed)
    mask = torch.zeros(len(packed), width, dtype=torch.long, device=device)
    for number, row in enumerate(packed):
        mask[number, width - row.shape[2]:] = 1
    cache = DynamicCache()
    for block in range(len(packed[0]) // 2):
        keys, values = (torch.stack([torch.nn.functional.pad(row[2 * block + part].to(device, dtype),
                                                             (0, 0, width - row.shape[2], 0)) for row in packed])
                        for part in (0, 1))
        cache.update(keys, values, block)
    return cache, mask
