"""Linear layers in 4 bits through PyTorch's own kernel, which multiplies many rows without dequantising first.

Measured beside bitsandbytes' NF4 (`python -m safety bench --gpu`), whose kernel is for one row. It rounds to evenly
spaced values per group of 64 weights, which is coarser than NF4.
"""

import torch
from torch import Tensor, nn

GROUP = 64
TILES = 8  # of 16 inputs each, in the CUDA kernel's layout


class Int4Linear(nn.Module):
    """y = x W^T (+ bias) with W in 4 bits and bf16 arithmetic; inference only.

    Needs inputs in multiples of 128 and outputs in multiples of 16.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        groups = linear.weight.detach().float().view(self.out_features, -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low).clamp_min(1e-6) / 15
        quantised = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).view(self.out_features, -1)
        if quantised.is_cuda:
            pairs = (quantised[:, ::2] << 4 | quantised[:, 1::2]).to(torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, TILES)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantised, TILES)
        self.register_buffer("packed", packed)
        # The kernel computes (q - 8) * scale + zero; [groups, out, 2].
        both = torch.cat([scale, low + 8 * scale], -1).transpose(0, 1).to(torch.bfloat16)
        self.register_buffer("scales", both.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in], any float dtype -> [..., out], same dtype."""
        multiply = (torch.ops.aten._weight_int4pack_mm if x.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu)
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        y = multiply(rows, self.packed, GROUP, self.scales).to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
