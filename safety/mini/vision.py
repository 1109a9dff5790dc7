"""The miniature's vision tower: a stock Pixtral encoder whose blocks read words and say them as token embeddings.

The first :data:`READING_BLOCKS` blocks turn pixels into a *spelled code*: at the patch where a word starts, the
residual stream holds the sum of one fixed code vector per letter slot. The remaining blocks and the stock projector
are the *dictionary* that turns a spelled code into the language model's embedding of that word's token. The two halves
meet at the fixed code book, so they can be trained apart (the dictionary needs no images) and then together.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PixtralVisionConfig, PixtralVisionModel

from safety.mini.lexicon import MAX_TOKENS, Lexicon
from safety.mini.scenes import CHARACTER_CLASSES, CHARACTERS, GRID, PATCH, SIDE

WIDTH = 320
HEADS = 5
INTERMEDIATE = 1024
READING_BLOCKS = 5
DICTIONARY_BLOCKS = 10
# The projector sees the state after this many dictionary blocks beside the last one. One state of 320 numbers cannot
# hold a token embedding: its best linear fit to the 576 dimensions of the words' embeddings is 0.92 alike, two reach 1.
MIDDLE_BLOCKS = 6
FEATURE_LAYERS = (READING_BLOCKS + MIDDLE_BLOCKS, READING_BLOCKS + DICTIONARY_BLOCKS)
CHARACTER_BLOCK = 3  # the character head reads the output of this many blocks

LETTER_SLOTS = 12
LETTER_CLASSES = len(CHARACTERS) + 1  # class 0 ends the word
KINDS = MAX_TOKENS + 1  # nothing, first part of a word, second part, third part

# The letterbox is filled with the mean colour, so a mean of 1 pads with white.
PIXEL_MEAN, PIXEL_STD = 1.0, 0.5


def _plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as two batched products: on the CPU twice as fast as PyTorch's fused one for 196 patches (measured)."""
    images, heads, patches, size = query.shape
    query, key, value = (t.reshape(images * heads, patches, size) for t in (query, key, value))
    weights = torch.softmax(torch.bmm(query, key.transpose(1, 2)) * size**-0.5, dim=-1)
    return torch.bmm(weights, value).view(images, heads, patches, size).transpose(1, 2), None


AttentionInterface.register("plain", _plain_attention)


def tower_config() -> PixtralVisionConfig:
    """Configuration of the vision tower; a short rotary period, since there are only 14 positions a side."""
    config = PixtralVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=READING_BLOCKS + DICTIONARY_BLOCKS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        rope_parameters={"rope_type": "axial", "rope_theta": 100.0},
    )
    config._attn_implementation = "sdpa"
    return config


def build_tower() -> PixtralVisionModel:
    """A freshly initialised vision tower in fp32, set up for :func:`encode` (one sequence per image, no mask)."""
    tower = PixtralVisionModel(tower_config())
    tower.config._attn_implementation = "plain"
    return tower


def to_pixels(images: np.ndarray | Tensor) -> Tensor:
    """[batch, 224, 224, 3] uint8 to the tower's input, [batch, 3, 224, 224] float32."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - PIXEL_MEAN) / PIXEL_STD


def patch_states(tower: PixtralVisionModel, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Patch embeddings [batch, 196, width] and rotary (cos, sin) for :func:`run_blocks`."""
    weight = tower.patch_conv.weight
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
    states = tower.ln_pre(patches @ weight.flatten(1).T)
    axis = torch.arange(GRID, device=pixels.device)
    positions = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
    return states, tower.patch_positional_embedding(states, positions)


def run_blocks(
    tower: PixtralVisionModel, states: Tensor, rotary: tuple[Tensor, Tensor], first: int, last: int
) -> Tensor:
    """Blocks ``first`` to ``last - 1`` on [batch, patches, width].

    The stock forward packs a batch into one sequence under a block mask, whose cost is quadratic in the batch; one
    sequence per image needs no mask and gives the same numbers.
    """
    for block in tower.transformer.layers[first:last]:
        states = cast(Tensor, block(states, None, position_embeddings=rotary))
    return states


def encode(tower: PixtralVisionModel, pixels: Tensor) -> Tensor:
    """What the projector sees: [batch, 3, 224, 224] to [batch, 196, 2 * width], equal to the stock forward."""
    states, rotary = patch_states(tower, pixels)
    middle = run_blocks(tower, states, rotary, 0, FEATURE_LAYERS[0])
    return torch.cat([middle, run_blocks(tower, middle, rotary, *FEATURE_LAYERS)], dim=-1)


def code_book(width: int = WIDTH) -> Tensor:
    """The fixed code vectors, [LETTER_SLOTS * LETTER_CLASSES + KINDS, width]: a tight frame of unit-size rows."""
    rows = LETTER_SLOTS * LETTER_CLASSES + KINDS
    generator = torch.Generator().manual_seed(20240917)
    frame, _ = torch.linalg.qr(torch.randn(rows, width, generator=generator, dtype=torch.float64))
    return F.normalize(frame.float(), dim=-1)


def letter_table(lexicon: Lexicon) -> Tensor:
    """[words, LETTER_SLOTS] letter classes: 1.. for characters, 0 at the end of the word, -100 after it."""
    table = torch.full((len(lexicon.keys), LETTER_SLOTS), -100)
    for row, key in enumerate(lexicon.keys):
        letters = [CHARACTERS.index(c) + 1 for c in key[:LETTER_SLOTS]]
        letters += [0] if len(letters) < LETTER_SLOTS else []
        table[row, : len(letters)] = torch.tensor(letters)
    return table


def spelled_code(book: Tensor, letters: Tensor, part: Tensor) -> Tensor:
    """The sum of code vectors of words.

    Args:
        book: from :func:`code_book`.
        letters: [n, LETTER_SLOTS] classes, -100 for unused slots.
        part: [n] which token of the word is meant.

    Returns:
        [n, width].
    """
    slots = torch.arange(LETTER_SLOTS, device=book.device) * LETTER_CLASSES
    vectors = book[(slots + letters.clamp(min=0))] * (letters >= 0).unsqueeze(-1)
    return vectors.sum(1) + 1.5 * book[LETTER_SLOTS * LETTER_CLASSES + 1 + part]


def pick(mask: Tensor, count: int) -> Tensor:
    """Flat indices of ``count`` true entries, some twice if there are fewer.

    A fixed count keeps matrix shapes fixed: on the CPU a new shape costs a kernel compilation.
    """
    places = mask.flatten().nonzero().squeeze(1)
    if len(places) >= count:
        return places[torch.randperm(len(places), device=mask.device)[:count]]
    return places[torch.randint(len(places), (count,), device=mask.device)]


def muon_and_adamw(
    matrices: list[nn.Parameter], others: list[nn.Parameter], rate: float, weight_decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """Muon at a peak rate for the matrices of blocks, AdamW at half of it for all else."""
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, rate / 2, betas=(0.9, 0.98), weight_decay=weight_decay),
    ]


class Reader(nn.Module):
    """The reading blocks with the heads that supervise them.

    Attributes:
        tower: the vision tower (its dictionary blocks are not run here).
        book: the fixed code book.
    """

    def __init__(self, tower: PixtralVisionModel) -> None:
        super().__init__()
        self.tower = tower
        self.character_head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, CHARACTER_CLASSES))
        self.kind_head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, KINDS))
        self.sharpness = nn.Parameter(torch.tensor(math.log(8.0)))
        self.book: Tensor
        self.register_buffer("book", code_book(), persistent=False)

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """States after the character block and after the reading blocks, and the rotary embedding."""
        states, rotary = patch_states(self.tower, pixels)
        middle = run_blocks(self.tower, states, rotary, 0, CHARACTER_BLOCK)
        return middle, run_blocks(self.tower, middle, rotary, CHARACTER_BLOCK, READING_BLOCKS), rotary

    def optimisers(self, rate: float) -> list[torch.optim.Optimizer]:
        """For all that the losses reach, which is everything but the dictionary blocks.

        Muon needs half of AdamW's steps: 0.46 of the characters are right after 150 steps of 32 pictures (rate 4e-3),
        with AdamW (rate 1.2e-3) 0.43 after 300.
        """
        blocks = self.tower.transformer.layers
        matrices = [p for p in blocks[:READING_BLOCKS].parameters() if p.ndim == 2]
        apart = {id(p) for p in [*matrices, *blocks[READING_BLOCKS:].parameters()]}
        return muon_and_adamw(matrices, [p for p in self.parameters() if id(p) not in apart], rate, 0.02)

    def letter_logits(self, states: Tensor) -> Tensor:
        """[n, width] states to [n, LETTER_SLOTS, LETTER_CLASSES] logits by correlation with the code book."""
        # A code of about nine unit vectors has norm three: scale the states to it, so that a present letter scores one.
        scaled = 3.0 * F.normalize(states.float(), dim=-1)
        scores = scaled @ self.book[: LETTER_SLOTS * LETTER_CLASSES].T
        return scores.unflatten(-1, (LETTER_SLOTS, LETTER_CLASSES)) * self.sharpness.exp()

    def losses(
        self, middle: Tensor, states: Tensor, batch: dict[str, Tensor], letters: Tensor, spots: Tensor
    ) -> dict[str, Tensor]:
        """Supervision of the reading blocks.

        Args:
            middle, states: from :meth:`read`, [batch, 196, width].
            batch: labels "character", "word", "part", each [batch, 196].
            letters: :func:`letter_table` of the lexicon.
            spots: flat indices of patches that stand for a word (:func:`pick`).
        """
        kind = batch["part"] + 1
        here = states.flatten(0, 1)[spots].float()
        spelled = letters[batch["word"].flatten()[spots]]
        code = spelled_code(self.book, spelled, batch["part"].flatten()[spots])
        drawn = batch["character"] > 0
        marks = self.character_head(middle).float()
        return {
            "character": F.cross_entropy(marks[drawn], batch["character"][drawn])
            + 0.5 * F.cross_entropy(marks[~drawn], batch["character"][~drawn]),
            "kind": F.cross_entropy(self.kind_head(states).float().flatten(0, 1), kind.flatten()),
            "letters": F.cross_entropy(self.letter_logits(here).flatten(0, 1), spelled.flatten(), ignore_index=-100),
            "code": 1 - F.cosine_similarity(here, code, dim=-1).mean(),
        }


def reading_rates(
    reader: Reader, middle: Tensor, states: Tensor, batch: dict[str, Tensor], letters: Tensor
) -> dict[str, Any]:
    """Shares that are right on one batch: characters (of those drawn), kinds, letters, and words spelled exactly."""
    drawn = batch["character"] > 0
    said = (batch["word"] >= 0) & (batch["part"] == 0)
    spelled = letters[batch["word"][said]]
    guess = reader.letter_logits(states[said]).argmax(-1)
    used = spelled >= 0
    kind = batch["part"] + 1
    kind_guess = reader.kind_head(states).argmax(-1)
    return {
        "character": (reader.character_head(middle).argmax(-1) == batch["character"])[drawn].float().mean().item(),
        "start": (kind_guess == kind)[kind == 1].float().mean().item(),
        "nothing": (kind_guess == kind)[kind == 0].float().mean().item(),
        "letters": (guess == spelled)[used].float().mean().item(),
        "spelled": ((guess == spelled) | ~used).all(-1).float().mean().item(),
    }
