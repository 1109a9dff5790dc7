"""Int8 on the CPU, for the miniature: weights per output channel, activations per row.

Per row, so that no other lane's values enter a lane's products: torch's own dynamic quantiser takes one activation
scale over the whole batch. (torchao has per-row scales too; its CPU path measured four times slower.) What remains is
floating-point rounding, which depends on the shape of a batch: a value that is rounded to another whole number for
it moves by a whole step, so an answer can read differently in other company. In fp32 it does not.
"""

import time
import timeit
from functools import cache, partial

import torch
from torch import Tensor, nn

SEPARATE_ROWS = 6  # up to here, matrix-vector products one by one beat one thin matrix product
WIDE = 8192  # the vocabulary's layer: oneDNN's product is dearer to call, but reads its weights once for all rows
ZERO_POINT = 128  # its fast kernel wants unsigned activations


class Int8Linear(nn.Module):
    """A linear layer without bias, y = x W^T, in int8; inference only.

    Each row of x is scaled to [-127, 127] by its own largest value; products add up exactly in int32.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(1e-8) / 127
        whole = (weight / scale[:, None]).round().to(torch.int8)  # [out, in]
        self.packed = self.out_features >= WIDE and onednn_is_exact()
        self.register_buffer("weight", _pack(whole) if self.packed else whole)
        self.register_buffer("scale", scale)  # [out]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] float -> [..., out], same dtype."""
        rows = x.reshape(-1, self.in_features).float()
        step = rows.abs().amax(1, keepdim=True).clamp_min_(1e-8).div_(127)
        whole = (rows / step).round_()
        if self.packed:
            product = _onednn(whole, self.weight, self.scale)
        elif len(whole) <= SEPARATE_ROWS:
            whole, matrix = whole.to(torch.int8), self.weight.t()
            product = torch.cat([torch._int_mm(row, matrix) for row in whole.split(1)]) * self.scale
        else:
            product = torch._int_mm(whole.to(torch.int8), self.weight.t()) * self.scale
        return product.mul_(step).to(x.dtype).view(*x.shape[:-1], self.out_features)


def _pack(weight: Tensor) -> Tensor:
    """int8 [out, in] in the layout that oneDNN computes in."""
    return torch.ops.onednn.qlinear_prepack(weight, None)  # type: ignore[no-any-return]


def _onednn(whole: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Whole numbers [rows, in] times packed weights, times the weights' scales [out]: float32 [rows, out]."""
    return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
        (whole + ZERO_POINT).to(torch.uint8), 1.0, ZERO_POINT, packed, scale,
        torch.zeros(len(scale), dtype=torch.int64), None, 1.0, 0, torch.float32, "none", [], "")


@cache
def onednn_is_exact() -> bool:
    """Is oneDNN's int8 product there, and does it add up exactly? Processors without VNNI instructions saturate."""
    whole = torch.full((4, 256), 127)
    try:
        product = _onednn(whole, _pack(torch.full((64, 256), 127, dtype=torch.int8)), torch.ones(64))
    except (AttributeError, RuntimeError):
        return False
    return bool((product == 127 * 127 * 256).all())


def quantize_linears(module: nn.Module) -> None:
    """Replace every bias-free nn.Linear inside `module` by its int8 version, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and child.bias is None:
            setattr(module, name, Int8Linear(child))
        else:
            quantize_linears(child)


def int8_is_faster(width: int = 576, hidden: int = 1536, layers: int = 24) -> bool:
    """Where the processor multiplies int8 exactly (VNNI), it was in every measurement on an idle machine.

    A busy machine could measure otherwise, and answers would differ from start to start. Elsewhere it is measured, on
    the work of a decoding step: one row and four rows through layers of the miniature's size.
    """
    if onednn_is_exact():
        return True
    plain = [nn.Linear(width, hidden, bias=False) for _ in range(layers)]
    small = [Int8Linear(layer) for layer in plain]

    @torch.inference_mode()
    def seconds(stack: list) -> float:
        best = float("inf")
        for _ in range(4):  # the first round warms up; the best of the others is the least disturbed
            began = time.perf_counter()
            for rows in (1, 4):
                x = torch.ones(rows, width)
                for layer in stack:
                    layer(x)
            best = min(best, time.perf_counter() - began)
        return best
    return seconds(small) < seconds(plain)


def fast_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU that multiplies it faster than float32, measured here; else float32."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    times: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(128, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
        # The fastest of five, so that other work on the machine does not decide; 0.3 s in all where bf16 is slow.
        times[dtype] = min(timeit.repeat(partial(torch.matmul, left, right), number=1, repeat=5))
    return min(times, key=lambda dtype: times[dtype])
