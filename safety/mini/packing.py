"""Several questions about one picture in one training sequence, each blind to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from safety.mini.scenes import PATCHES
from safety.mini.tasks import Turn

TURNS = 4  # of one picture at most
ANSWER_TOKENS = 64
PLAIN_ATTENTION = "grouped"  # the name under which transformers knows the attention below


@dataclass(frozen=True)
class Packed:
    """One picture with several turns in one sequence; every turn sees the picture and itself only.

    Attributes:
        ids: [n] token ids; image placeholders included.
        positions: [n] rotary positions: each turn goes on where the picture's part ended.
        turn: [n] number of the turn a token belongs to, -1 for the shared part.
        target: [n] whether the token is answer text to be learned.
    """

    ids: Tensor
    positions: Tensor
    turn: Tensor
    target: Tensor


def pack(tokenizer: Any, image_id: int, turns: Sequence[Turn]) -> Packed:
    """Tokenise a picture's turns behind one shared picture."""
    opening = tokenizer("<|im_start|>user\n").input_ids
    shared = [*opening, *[image_id] * PATCHES, *tokenizer("\n").input_ids]
    ids, positions, owner, target = list(shared), list(range(len(shared))), [-1] * len(shared), [False] * len(shared)
    for number, turn in enumerate(turns[:TURNS]):
        question = tokenizer(f"{turn.question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        answer = tokenizer(turn.answer + "<|im_end|>").input_ids[:ANSWER_TOKENS]
        ids += question + answer
        positions += range(len(shared), len(shared) + len(question) + len(answer))
        owner += [number] * (len(question) + len(answer))
        target += [False] * len(question) + [True] * len(answer)
    return Packed(torch.tensor(ids), torch.tensor(positions), torch.tensor(owner), torch.tensor(target))


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Masked attention as two batched products; on the CPU far faster to train through than PyTorch's fused one."""
    batch, heads, length, size = query.shape
    shared = key.shape[1]  # grouped queries: several heads share a key
    query = query.reshape(batch * shared, -1, size)
    key, value = (t.reshape(batch * shared, -1, size) for t in (key, value))
    scores = torch.bmm(query, key.transpose(1, 2)) * (scaling or size**-0.5)
    if attention_mask is not None:
        scores = (scores.view(batch, heads, length, -1) + attention_mask).view(batch * shared, -1, key.shape[1])
    said = torch.bmm(torch.softmax(scores, dim=-1), value)
    return said.view(batch, heads, length, size).transpose(1, 2), None


AttentionInterface.register(PLAIN_ATTENTION, _grouped_attention)


def packed_loss(model: Any, batch: Sequence[Packed], features: Tensor, image_id: int, pad_id: int) -> Tensor:
    """Mean cross-entropy over the answer tokens of packed pictures.

    Args:
        model: the language model with LoRA.
        batch: packed turns.
        features: [len(batch), 196, width] what the projector says for each picture.
        image_id: the placeholder token.
        pad_id: padding token.
    """
    length = -(-max(len(item.ids) for item in batch) // 32) * 32
    ids = torch.full((len(batch), length), pad_id)
    positions = torch.zeros(len(batch), length, dtype=torch.long)
    turn = torch.full((len(batch), length), -2)
    target = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, item in enumerate(batch):
        n = len(item.ids)
        ids[row, :n], positions[row, :n], turn[row, :n], target[row, :n] = (
            item.ids,
            item.positions,
            item.turn,
            item.target,
        )
    device = model.device
    ids, positions, turn, target = ids.to(device), positions.to(device), turn.to(device), target.to(device)
    visible = (turn[:, None, :] == -1) | (turn[:, None, :] == turn[:, :, None])
    visible &= torch.ones(length, length, dtype=torch.bool, device=device).tril()
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == image_id).unsqueeze(-1), features.to(device, embeds.dtype))
    mask = torch.zeros(visible.shape, dtype=embeds.dtype, device=device).masked_fill(
        ~visible, torch.finfo(embeds.dtype).min
    )
    states = model.get_decoder()(
        inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state
    # The token before an answer's first one is the last of its own question, so a shift by one stays in the turn.
    wanted = target[:, 1:].flatten().nonzero().squeeze(1)
    padding = -len(wanted) % 64  # few distinct shapes: on the CPU a new one costs a kernel compilation
    said = states[:, :-1].flatten(0, 1)[F.pad(wanted, (0, padding))]
    label = F.pad(ids[:, 1:].flatten()[wanted], (0, padding), value=-100)
    return F.cross_entropy(model.lm_head(said).float(), label, ignore_index=-100)
