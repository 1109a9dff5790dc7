"""Which blocks are SASA's safety block and fused block (arXiv 2507.21637, section on safety heads).

A head's importance for a set of queries is the angle between the leading left singular vectors of the last-token
state matrix (queries x width) with the head on and ablated. Safety heads matter on harmful queries and not on
ordinary ones. Ablation zeroes the head's rows of the query projection (with grouped queries, keys and values are
shared by several heads), so that it attends evenly.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from safety.lvlm import LVLM, hooks


def head_importance(lvlm: LVLM, prompts: Sequence[str], tick: Callable[[], None] = lambda: None) -> Tensor:
    """[blocks, heads] angles in degrees between the leading singular vectors with each head on and ablated.

    Args:
        prompts: text queries. tick: called after each head, for progress.
    """
    batch = _left_padded(lvlm, prompts)
    whole = _leading_vector(lvlm, batch)
    angles = torch.zeros(lvlm.blocks, lvlm.heads)
    for block in range(lvlm.blocks):
        for head in range(lvlm.heads):
            rows = slice(head * lvlm.head_dim, (head + 1) * lvlm.head_dim)

            def ablate(module: object, args: object, output: Tensor, rows: slice = rows) -> Tensor:
                output = output.clone()
                output[..., rows] = 0
                return output
            with hooks() as add:
                add(lvlm.layers[block].self_attn.q_proj.register_forward_hook(ablate))
                cosine = (_leading_vector(lvlm, batch) @ whole).abs().clamp(max=1)
            angles[block, head] = torch.rad2deg(torch.arccos(cosine))
            tick()
    return angles


def safety_curve(harmful: Tensor, ordinary: Tensor, top: float = 0.1) -> Tensor:
    """[blocks] summed importance of the safety-specific heads: the top share on harmful queries, less those that
    are also in the top share on ordinary queries."""
    count = max(1, round(top * harmful.numel()))
    chosen = set(harmful.flatten().topk(count).indices.tolist()) - set(ordinary.flatten().topk(count).indices.tolist())
    curve = torch.zeros(harmful.shape[0])
    for index in chosen:
        curve[index // harmful.shape[1]] += harmful.flatten()[index]
    return curve


def separability(layers: Tensor, unsafe: np.ndarray) -> Tensor:
    """[blocks] cross-validated accuracy of a linear probe, harmful against benign, on last-prompt-position states
    [samples, blocks, width]."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    return torch.tensor([float(cross_val_score(model, layers[:, block].numpy(), unsafe, cv=5).mean())
                         for block in range(layers.shape[1])])


def choose_blocks(safety: Tensor, separable: Tensor) -> tuple[int, int]:
    """(s, f): s is the depth at which the safety heads concentrate (centre of mass of their curve), f the block behind
    it where harmful and benign separate best; both leave room for the blocks that follow."""
    blocks = len(safety)
    depth = torch.arange(blocks, dtype=torch.float32)
    weights = safety if safety.sum() > 0 else torch.ones(blocks)
    s = int(torch.round((depth * weights).sum() / weights.sum()))
    s = min(max(s, 1), blocks - 4)
    f = s + 1 + int(separable[s + 1:blocks - 1].argmax())
    return s, f


def _left_padded(lvlm: LVLM, prompts: Sequence[str]) -> dict[str, Tensor]:
    rows = [lvlm.prepare(prompt, None, 0)["input_ids"][0] for prompt in prompts]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.cat([row.new_zeros(width - len(row)), row.new_ones(len(row))]) for row in rows])
    return {"inputs_embeds": lvlm.embed(ids), "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@torch.inference_mode()
def _leading_vector(lvlm: LVLM, batch: dict[str, Tensor]) -> Tensor:
    """Leading left singular vector [queries], uncentred, of the last-token states [queries, width]."""
    states = lvlm.decoder(**batch, use_cache=False).last_hidden_state[:, -1].float()
    return torch.linalg.svd(states, full_matrices=False).U[:, 0]
