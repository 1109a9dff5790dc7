"""How a trained reader really writes words: its errors, learned from pictures once, for practice without pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from safety.mini.vision import LETTER_CLASSES, LETTER_SLOTS

STRENGTH = (0.2, 1.15)  # share of the observed error that a practised code is given
CLEAN = 0.15  # share of practised codes with a tenth of that


def parts_of(book: Tensor, letters: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """The code vectors that a word's code is the sum of.

    Args:
        book: from :func:`safety.mini.vision.code_book`.
        letters: [n, LETTER_SLOTS] classes, -100 for unused slots.
        part: [n] which token of the word is meant.

    Returns:
        vectors [n, LETTER_SLOTS + 1, width], zero where a slot is unused, and their ideal amplitudes, of length one.
    """
    slots = torch.arange(LETTER_SLOTS, device=book.device) * LETTER_CLASSES
    rows = torch.cat([slots + letters.clamp(min=0), LETTER_SLOTS * LETTER_CLASSES + 1 + part[:, None]], dim=1)
    used = torch.cat([letters >= 0, torch.ones_like(part[:, None], dtype=torch.bool)], dim=1).float()
    weight = used * torch.tensor([1.0] * LETTER_SLOTS + [1.5], device=book.device)
    return book[rows] * used[..., None], F.normalize(weight, dim=-1)


@dataclass
class Handwriting:
    """States of a reader at word patches, each split into amplitudes of its word's own code vectors and a rest.

    The reader writes late letters of long words more faintly, so an error is lent only to words of the same length.

    Attributes:
        states: [n, width] as the reader wrote them, scaled to unit length.
        words, part: [n] what they stand for: a row of the lexicon, and which token of it.
        amplitudes: [n, LETTER_SLOTS + 1].
        rest: [n, width].
        order: [n] states sorted by shape, a word's length and whether the token is its first.
        first, count: of each shape in ``order``.
    """

    states: Tensor
    words: Tensor
    part: Tensor
    amplitudes: Tensor
    rest: Tensor
    order: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, book: Tensor, states: Tensor, words: Tensor, part: Tensor, letters: Tensor) -> Handwriting:
        """Analyse a reader's states at word patches; ``letters`` is the lexicon's letter table."""
        states = F.normalize(states.float(), dim=-1)
        vectors, _ = parts_of(book, letters[words], part)
        ridge = 1e-3 * torch.eye(vectors.shape[1], device=book.device)
        gram = vectors @ vectors.transpose(1, 2) + ridge
        amplitudes = torch.linalg.solve(gram, vectors @ states[..., None]).squeeze(-1)
        rest = states - (amplitudes[..., None] * vectors).sum(1)
        shape = shape_of(letters[words], part)
        count = torch.bincount(shape, minlength=2 * LETTER_SLOTS + 2)
        first = count.cumsum(0) - count
        # A shape without examples borrows those of the nearest one that has some.
        have = torch.nonzero(count).squeeze(1)
        near = have[(torch.arange(len(count), device=have.device)[:, None] - have).abs().argmin(1)]
        return cls(states, words, part, amplitudes, rest, shape.argsort(), first[near], count[near])

    def write(self, book: Tensor, letters: Tensor, part: Tensor, generator: torch.Generator) -> Tensor:
        """Codes [n, width] of unit length as the reader might write these words, with errors of other words."""
        count = len(letters)
        shape = shape_of(letters, part)
        lender = self.order[self.first[shape] + (torch.rand(count, generator=generator) * self.count[shape]).long()]
        low, high = STRENGTH
        strength = low + (high - low) * torch.rand(count, 1, generator=generator)
        strength = torch.where(torch.rand(count, 1, generator=generator) < CLEAN, 0.1 * strength, strength)
        vectors, ideal = parts_of(book, letters, part)
        amplitudes = torch.lerp(ideal, self.amplitudes[lender], strength.clamp(max=1.0))
        return F.normalize((amplitudes[..., None] * vectors).sum(1) + strength * self.rest[lender], dim=-1)


def shape_of(letters: Tensor, part: Tensor) -> Tensor:
    """[n] number of a word's length and of whether the token is the word's first."""
    return (letters >= 0).sum(1) * 2 + part.clamp(max=1)
