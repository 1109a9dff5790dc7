"""The tower's last blocks and the projector as a dictionary: spelled code in, token embedding out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PixtralVisionModel

from safety.mini.lexicon import Lexicon, key_of, reading_weights, spell
from safety.mini.scenes import CHARACTERS
from safety.mini.vision import (
    LETTER_CLASSES,
    LETTER_SLOTS,
    READING_BLOCKS,
    WIDTH,
    code_book,
    letter_table,
    spelled_code,
)

CODE_NORM = 24.0  # typical length of a trained reader's state at a word's patch
NEGATIVES = 4096
DICTIONARY_CHECKPOINT = "dictionary.pt"
FILLER = " "  # what a patch without a word says


class Projector(nn.Module):
    """LLaVA's projector: Linear, GELU, Linear; the same parameter names."""

    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(WIDTH, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, states: Tensor) -> Tensor:
        """[..., WIDTH] to [..., text_width]."""
        return self.linear_2(F.gelu(self.linear_1(states)))  # type: ignore[no-any-return]


class TokenTargets:
    """Token embeddings as classes.

    Attributes:
        ids: [classes] token ids.
        unit: [classes, text_width] unit vectors of their embeddings.
        vectors: [classes, text_width] the embeddings.
        filler: [text_width] embedding for patches without a word.
    """

    def __init__(self, embedding: Tensor, tokens: Tensor, filler: int) -> None:
        self.ids = torch.unique(tokens[tokens >= 0])
        self.vectors = embedding[self.ids].float()
        self.unit = F.normalize(self.vectors, dim=-1)
        self.filler = embedding[filler].float()
        self.scale = float(self.vectors.norm(dim=-1).mean())
        self._row = torch.full((embedding.shape[0],), -1, device=embedding.device)
        self._row[self.ids] = torch.arange(len(self.ids), device=embedding.device)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Class of each token id."""
        return self._row[token_ids]

    def loss(self, said: Tensor, rows: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
        """Contrastive loss against the batch's own tokens and random others, and relative squared distance.

        Args:
            said: [n, text_width] projector outputs.
            rows: [n] their classes.
            sharpness: log of the inverse temperature.
        """
        # Targets and random others side by side, twice the same class masked: every step has the same shapes.
        classes = torch.cat([rows, torch.randint(len(self.ids), (NEGATIVES,), device=rows.device)])
        logits = F.normalize(said, dim=-1) @ self.unit[classes].T * sharpness.exp()
        place = torch.arange(len(rows), device=rows.device)
        again = classes[None, :] == rows[:, None]
        again[place, place] = False
        distance = (said - self.vectors[rows]).pow(2).sum(-1).mean() / self.scale**2
        return F.cross_entropy(logits.float().masked_fill(again, -1e4), place), distance

    def guess(self, said: Tensor) -> Tensor:
        """[n] class whose embedding is closest in direction."""
        return (F.normalize(said.float(), dim=-1) @ self.unit.T).argmax(-1)


class Dictionary(nn.Module):
    """The dictionary blocks of a tower, a projector, and the temperature of the contrastive loss.

    What a patch says depends on its own code alone: the blocks' attention is zero and stays so.
    """

    def __init__(self, tower: PixtralVisionModel, text_width: int) -> None:
        super().__init__()
        self.blocks = tower.transformer.layers[READING_BLOCKS:]
        self.projector = Projector(text_width)
        self.sharpness = nn.Parameter(torch.tensor(3.0))
        for block in self.blocks:
            for weight in block.attention.parameters():
                nn.init.zeros_(weight).requires_grad_(False)
            block.attention_norm.requires_grad_(False)

    def forward(self, codes: Tensor) -> Tensor:
        """[..., WIDTH] states after the reading blocks to [..., text_width], as the stock blocks and projector do."""
        for block in self.blocks:
            codes = codes + block.feed_forward(block.ffn_norm(codes))
        return self.projector(codes)  # type: ignore[no-any-return]

    def trained(self) -> list[nn.Parameter]:
        """Parameters that are not frozen."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def composed_words(tokenizer: Any, lexicon: Lexicon, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Made-up words of a known stem and ending, so that unknown words are spelled in pieces.

    Returns:
        letters [n, LETTER_SLOTS] and tokens [n, MAX_TOKENS] as in a lexicon.
    """
    rng = np.random.default_rng(seed)
    endings = [t for t, i in tokenizer.get_vocab().items() if re.fullmatch("[a-z]{1,5}", t) and i < 12_000]
    endings = sorted(endings) + ["s", "ed", "ing", "er", "ers", "ly", "ness", "ment", "able", "ize"] * 60
    stems = [key for key in lexicon.sample(rng, count) if key.isalpha()]
    words = {key_of(stem + str(rng.choice(endings))) for stem in stems}
    fresh = sorted(word for word in words if word not in lexicon.index)
    tokens = torch.full((len(fresh), lexicon.tokens.shape[1]), -1)
    letters = torch.full((len(fresh), LETTER_SLOTS), -100)
    for row, word in enumerate(fresh):
        ids = spell(tokenizer, word)[: tokens.shape[1]]
        tokens[row, : len(ids)] = torch.tensor(ids)
        codes = [CHARACTERS.index(c) + 1 for c in word[:LETTER_SLOTS]] + ([0] if len(word) < LETTER_SLOTS else [])
        letters[row, : len(codes)] = torch.tensor(codes)
    return letters, tokens


def entries_of(letters: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flatten words into dictionary entries: letters [n, LETTER_SLOTS], part [n], token id [n]."""
    row, part = torch.nonzero(tokens >= 0, as_tuple=True)
    return letters[row], part, tokens[row, part]


def noisy_codes(book: Tensor, letters: Tensor, part: Tensor, generator: torch.Generator) -> Tensor:
    """Spelled codes as a half-sure reader would write them: a doubtful letter here and there, noise, varied length."""
    letters = letters.clone()
    code = spelled_code(book, letters, part)
    doubtful = torch.rand(len(letters), generator=generator) < 0.3
    slot = torch.randint(LETTER_SLOTS, (len(letters),), generator=generator)
    other = torch.randint(LETTER_CLASSES, (len(letters),), generator=generator)
    known = letters.gather(1, slot[:, None]).squeeze(1)
    mix = torch.rand(len(letters), generator=generator) * 0.6 * (doubtful & (known >= 0))
    base = slot * LETTER_CLASSES
    code = code + mix[:, None] * (book[base + other] - book[base + known.clamp(min=0)])
    code = F.normalize(code, dim=-1)
    amount = torch.rand(len(code), 1, generator=generator)
    noise = F.normalize(torch.randn(code.shape, generator=generator), dim=-1) * amount
    length = CODE_NORM * torch.exp(0.25 * torch.randn(len(code), 1, generator=generator))
    return F.normalize(code + noise, dim=-1) * length


class Entries:
    """Dictionary entries to practise: the lexicon's words, frequent ones more often, and composed words.

    Attributes:
        known: letters, part and token id of the lexicon's entries.
        composed: the same of made-up words.
        book: the code book.
    """

    def __init__(self, tokenizer: Any, lexicon: Lexicon, seed: int) -> None:
        words = torch.from_numpy(lexicon.tokens)
        self.known = entries_of(letter_table(lexicon), words)
        self.composed = entries_of(*composed_words(tokenizer, lexicon, 40_000, seed))
        self.book = code_book()
        self.tokens = torch.cat([self.known[2], self.composed[2]])
        self._weights = torch.from_numpy(reading_weights(len(lexicon.keys)))[torch.nonzero(words >= 0)[:, 0]]

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Noisy codes [count, WIDTH] of length about CODE_NORM, and their token ids."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.multinomial(self._weights, count * 7 // 8, replacement=True, generator=generator)
        second = torch.randint(len(self.composed[1]), (count - len(first),), generator=generator)
        picked = (torch.cat([a[first], b[second]]) for a, b in zip(self.known, self.composed, strict=True))
        letters, part, token = picked
        return noisy_codes(self.book, letters, part, generator), token


def train_dictionary(
    tokenizer: Any,
    embedding: Tensor,
    lexicon: Lexicon,
    folder: Path,
    *,
    steps: int = 330,
    seed: int = 0,
    batch: int = 4096,
    device: str = "cpu",
) -> Path:
    """Teach the dictionary every word of the lexicon and many composed ones; no pictures are involved.

    Returns:
        The checkpoint, with the dictionary's parameters under "model".
    """
    from safety.mini.train_vision import adamw, train_loop
    from safety.mini.vision import build_tower

    torch.manual_seed(seed)
    dictionary = Dictionary(build_tower(), embedding.shape[1]).to(device)
    entries = Entries(tokenizer, lexicon, seed)
    targets = TokenTargets(embedding.to(device), entries.tokens.to(device), tokenizer.encode(FILLER)[0])

    def loss_of(step: int) -> dict[str, Tensor]:
        codes, token = entries.draw(batch, seed * 1_000_003 + step)
        rows = targets.rows(token.to(device))
        contrast, distance = targets.loss(dictionary(codes.to(device)), rows, dictionary.sharpness)
        return {"contrast": contrast, "distance": distance}

    def measure() -> dict[str, float]:
        rates = {}
        for label, (letters, part, token) in (("known", entries.known), ("composed", entries.composed)):
            some = torch.arange(0, len(part), max(1, len(part) // 2000))
            codes = F.normalize(spelled_code(entries.book, letters[some], part[some]), dim=-1) * CODE_NORM
            said = dictionary(codes.to(device))
            rates[label] = (targets.guess(said) == targets.rows(token[some].to(device))).float().mean().item()
        return rates

    path = folder / DICTIONARY_CHECKPOINT
    train_loop(
        dictionary,
        [adamw(dictionary.trained(), 2e-3)],
        loss_of,
        measure,
        steps=steps,
        checkpoint=path,
        name="Dictionary",
        decay=0.5,
        measure_every=50,
    )
    return path
