"""Which blocks are SASA's safety block and fused block (arXiv 2507.21637, section on safety heads).

A head's importance for a set of queries is the angle between the leading left singular vectors of the last-token
state matrix (queries x width) with the head on and ablated. Safety heads matter on harmful queries and not on
ordinary ones. Ablation zeroes the head's rows of the query projection (with grouped queries, keys and values are
shared by several heads), so that it attends evenly.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from safety.lvlm import LVLM, hooks


def head_importance(lvlm: LVLM, prompts: Sequence[str], tick: Callable[[], None] = lambda: None) -> Tensor:
    """[blocks, heads] angles in degrees between the leading singular vectors with each head on and ablated.

    Blocks before the ablated one are not run again: its input is the same.

    Args:
        prompts: text queries. tick: called after each block, for progress.
    """
    batch = _left_padded(lvlm, prompts)
    with lvlm.lock:
        inputs, whole = _clean_pass(lvlm, batch)
    angles = torch.zeros(lvlm.blocks, lvlm.heads)
    for block in range(lvlm.blocks):
        for head in range(lvlm.heads):
            with lvlm.lock, hooks() as add:
                add(lvlm.query_projection(block).register_forward_hook(_zero_head(lvlm, head)))
                changed = _leading_vector(_from_block(lvlm, inputs, block))
            angles[block, head] = torch.rad2deg(torch.arccos((changed @ whole).abs().clamp(max=1)))
        tick()
    return angles


def safety_heads(harmful: Tensor, ordinary: Tensor, top: float = 0.1) -> list[tuple[int, int]]:
    """(block, head) of the safety-specific heads: the top share on harmful queries, less those that are also in the
    top share on ordinary queries."""
    count = max(1, round(top * harmful.numel()))
    chosen = set(harmful.flatten().topk(count).indices.tolist()) - set(ordinary.flatten().topk(count).indices.tolist())
    return sorted((index // harmful.shape[1], index % harmful.shape[1]) for index in chosen)


def safety_curve(harmful: Tensor, ordinary: Tensor, top: float = 0.1) -> Tensor:
    """[blocks] summed importance of the safety-specific heads."""
    curve = torch.zeros(harmful.shape[0])
    for block, head in safety_heads(harmful, ordinary, top):
        curve[block] += harmful[block, head]
    return curve


def choose_blocks(safety: Tensor, separable: Tensor, first: int = 1) -> tuple[int, int]:
    """(s, f): s is the depth at which the safety heads concentrate (centre of mass of their curve), f the block behind
    it where harmful and benign separate best; both leave room for the blocks that follow. s is at least `first`."""
    blocks = len(safety)
    depth = torch.arange(blocks, dtype=torch.float32)
    weights = safety if safety.sum() > 0 else torch.ones(blocks)
    s = int(torch.round((depth * weights).sum() / weights.sum()))
    s = max(min(max(s, 1), blocks - 4), first)
    f = s + 1 + int(separable[s + 1:blocks - 1].argmax())
    return s, f


def draw_curves(path: Path, safety: Tensor, separable: Tensor, chosen: tuple[int, int], shipped: tuple[int, int]
                ) -> None:
    """Save the two curves, with the blocks that the paper's rule names and those that ship, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no global state, works in any thread
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.bar(range(len(safety)), safety.tolist(), color="#0072B2")
    upper.set_ylabel("importance of\nsafety heads (°)")
    lower.plot(separable.tolist(), color="#0072B2", marker="o", markersize=3)
    lower.set_ylabel("harmful / benign\nAUROC of a probe")
    lower.set_xlabel("decoder block")
    for axis in (upper, lower):
        for pair, whose, styles in ((chosen, "rule", ":,--"), (shipped, "shipped", "-,-.")):
            for block, name, style in zip(pair, "sf", styles.split(","), strict=True):
                axis.axvline(block, color="#B34700", linestyle=style, linewidth=1, label=f"{name} = {block} ({whose})")
    upper.legend(fontsize=7, ncols=4, loc="upper center")
    figure.savefig(path, dpi=120)


def _zero_head(lvlm: LVLM, head: int) -> Callable[..., Tensor]:
    rows = slice(head * lvlm.head_dim, (head + 1) * lvlm.head_dim)

    def ablate(module: object, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., rows] = 0
        return output
    return ablate


def _left_padded(lvlm: LVLM, prompts: Sequence[str]) -> dict[str, Tensor]:
    rows = [lvlm.prepare(prompt, None, 0)["input_ids"][0] for prompt in prompts]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.cat([row.new_zeros(width - len(row)), row.new_ones(len(row))]) for row in rows])
    return {"inputs_embeds": lvlm.embed(ids), "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@torch.inference_mode()
def _clean_pass(lvlm: LVLM, batch: dict[str, Tensor]) -> tuple[list[tuple[Tensor, dict[str, Any]]], Tensor]:
    """What every block was given (states, keyword arguments), and the leading singular vector of the outcome."""
    inputs: list[tuple[Tensor, dict[str, Any]]] = []
    with hooks() as add:
        for layer in lvlm.layers:
            add(layer.register_forward_pre_hook(
                lambda module, args, kwargs: inputs.append((args[0], dict(kwargs))), with_kwargs=True))
        output = lvlm.decoder(**batch, use_cache=False).last_hidden_state[:, -1]
    return inputs, _leading_vector(output)


@torch.inference_mode()
def _from_block(lvlm: LVLM, inputs: list[tuple[Tensor, dict[str, Any]]], first: int) -> Tensor:
    """[queries, width] last-token states, post-norm, with blocks first..last run again on what they were given."""
    states, cache = inputs[first][0], DynamicCache()
    for block in range(first, lvlm.blocks):
        states = lvlm.run_block(block, states, inputs[block][1], cache)
    return lvlm.decoder.norm(states[:, -1:])[:, 0]


def _leading_vector(states: Tensor) -> Tensor:
    """Leading left singular vector [queries], uncentred, of the last-token states [queries, width]; on the CPU."""
    return torch.linalg.svd(states.float().cpu(), full_matrices=False).U[:, 0]
