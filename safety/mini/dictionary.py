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

from safety.mini.lexicon import Lexicon, key_of, spell
from safety.mini.scenes import CHARACTERS
from safety.mini.vision import (
    LETTER_CLASSES,
    LETTER_SLOTS,
    READING_BLOCKS,
    WIDTH,
    code_book,
    letter_table,
    run_blocks,
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
        self._row = torch.full((embedding.shape[0],), -1)
        self._row[self.ids] = torch.arange(len(self.ids))

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
        others = torch.randint(len(self.ids), (NEGATIVES,))
        classes, place = torch.unique(torch.cat([rows, others]), return_inverse=True)
        logits = F.normalize(said, dim=-1) @ self.unit[classes].T * sharpness.exp()
        distance = (said - self.vectors[rows]).pow(2).sum(-1).mean() / self.scale**2
        return F.cross_entropy(logits.float(), place[: len(rows)]), distance

    def guess(self, said: Tensor) -> Tensor:
        """[n] class whose embedding is closest in direction."""
        return (F.normalize(said.float(), dim=-1) @ self.unit.T).argmax(-1)


class Dictionary(nn.Module):
    """The dictionary blocks of a tower, a projector, and the temperature of the contrastive loss."""

    def __init__(self, tower: PixtralVisionModel, text_width: int) -> None:
        super().__init__()
        self.blocks = tower.transformer.layers[READING_BLOCKS:]
        self.projector = Projector(text_width)
        self.sharpness = nn.Parameter(torch.tensor(3.0))
        for block in self.blocks:
            nn.init.zeros_(block.attention.o_proj.weight)  # a dictionary entry does not depend on other patches

    def look_up(self, codes: Tensor) -> Tensor:
        """[n, WIDTH] codes to [n, text_width] without attention, as pre-training uses it."""
        for block in self.blocks:
            codes = codes + block.feed_forward(block.ffn_norm(codes))
        return self.projector(codes)  # type: ignore[no-any-return]

    def forward(self, tower: PixtralVisionModel, states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[batch, 196, WIDTH] after the reading blocks to [batch, 196, text_width]."""
        return self.projector(run_blocks(tower, states, rotary, READING_BLOCKS, len(tower.transformer.layers)))  # type: ignore[no-any-return]


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


def train_dictionary(
    tokenizer: Any,
    embedding: Tensor,
    lexicon: Lexicon,
    folder: Path,
    *,
    steps: int = 600,
    seed: int = 0,
    batch: int = 4096,
) -> Path:
    """Teach the dictionary every word of the lexicon and many composed ones; no pictures are involved.

    Returns:
        The checkpoint, with the dictionary's parameters under "model".
    """
    from safety.mini.train_vision import train_loop
    from safety.mini.vision import build_tower

    torch.manual_seed(seed)
    dictionary = Dictionary(build_tower(), embedding.shape[1])
    made = composed_words(tokenizer, lexicon, 40_000, seed)
    known = entries_of(letter_table(lexicon), torch.from_numpy(lexicon.tokens))
    extra = entries_of(*made)
    targets = TokenTargets(embedding, torch.cat([known[2], extra[2]]), tokenizer.encode(FILLER)[0])
    book = code_book()

    def picks(step: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        first = torch.randint(len(known[1]), (batch * 3 // 4,), generator=generator)
        second = torch.randint(len(extra[1]), (batch // 4,), generator=generator)
        letters, part, token = (torch.cat([a[first], b[second]]) for a, b in zip(known, extra, strict=True))
        return noisy_codes(book, letters, part, generator), part, targets.rows(token)

    def loss_of(step: int) -> dict[str, Tensor]:
        codes, _, rows = picks(step)
        contrast, distance = targets.loss(dictionary.look_up(codes), rows, dictionary.sharpness)
        return {"contrast": contrast, "distance": distance}

    def measure() -> dict[str, float]:
        rates = {}
        for label, (letters, part, token) in (("known", known), ("composed", extra)):
            some = torch.arange(0, len(part), max(1, len(part) // 2000))
            codes = F.normalize(spelled_code(book, letters[some], part[some]), dim=-1) * CODE_NORM
            said = dictionary.look_up(codes)
            rates[label] = (targets.guess(said) == targets.rows(token[some])).float().mean().item()
        return rates

    path = folder / DICTIONARY_CHECKPOINT
    train_loop(
        dictionary,
        list(dictionary.parameters()),
        loss_of,
        measure,
        steps=steps,
        checkpoint=path,
        name="Dictionary",
        learning_rate=2e-3,
        measure_every=50,
    )
    return path
