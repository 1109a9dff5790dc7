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

from safety.mini.ahead import Ahead
from safety.mini.handwriting import Handwriting
from safety.mini.lexicon import Lexicon, key_of, spell
from safety.mini.scenes import CHARACTERS
from safety.mini.vision import (
    FEATURE_LAYERS,
    LETTER_SLOTS,
    READING_BLOCKS,
    WIDTH,
    code_book,
    letter_table,
    muon_and_adamw,
    spelled_code,
)

CODE_NORM = 24.0  # typical length of a trained reader's state at a word's patch
NEGATIVES = 1024
CONTRASTED = 512
SHARPNESS = 20.0  # inverse temperature of the contrast
DICTIONARY_CHECKPOINT = "dictionary.pt"
FILLER = " "  # what a patch without a word says


class Projector(nn.Module):
    """LLaVA's projector: Linear, GELU, Linear; the same parameter names."""

    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(len(FEATURE_LAYERS) * WIDTH, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, states: Tensor) -> Tensor:
        """[..., 2 * WIDTH] to [..., text_width]."""
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
        self._row = torch.full((embedding.shape[0],), -1, device=embedding.device)
        self._row[self.ids] = torch.arange(len(self.ids), device=embedding.device)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Class of each token id."""
        return self._row[token_ids]

    def losses(self, said: Tensor, rows: Tensor, contrasted: int) -> dict[str, Tensor]:
        """How far outputs are from their token's embedding.

        The language model reads an embedding that is 0.8 alike (cosine) and not one that is 0.6 alike, so being the
        nearest of all tokens is not enough: direction and length are fitted, contrast only helps them along.

        Args:
            said: [n, text_width] projector outputs.
            rows: [n] their classes.
            contrasted: how many of them, from the first, also compete against random other tokens.
        """
        wanted = self.vectors[rows]
        direction = 1 - F.cosine_similarity(said, wanted, dim=-1).mean()
        distance = ((said - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)).mean()
        first, place = rows[:contrasted], torch.arange(contrasted, device=rows.device)
        classes = torch.cat([first, torch.randint(len(self.ids), (NEGATIVES,), device=rows.device)])
        logits = SHARPNESS * F.normalize(said[:contrasted], dim=-1) @ self.unit[classes].T
        again = classes[None, :] == first[:, None]  # the right token a second time is no competitor
        again[place, place] = False
        contrast = F.cross_entropy(logits.float().masked_fill(again, -1e4), place)
        return {"direction": 2 * direction, "distance": distance, "contrast": 0.25 * contrast}

    def guess(self, said: Tensor) -> Tensor:
        """[n] class whose embedding is closest in direction."""
        return (F.normalize(said.float(), dim=-1) @ self.unit.T).argmax(-1)


class Dictionary(nn.Module):
    """The dictionary blocks of a tower and a projector.

    What a patch says depends on its own code alone: the blocks' attention is zero and stays so.
    """

    def __init__(self, tower: PixtralVisionModel, text_width: int) -> None:
        super().__init__()
        self.blocks: Any = tower.transformer.layers[READING_BLOCKS:]  # a ModuleList of Pixtral blocks
        self.projector = Projector(text_width)
        for block in self.blocks:
            attention: Any = block.attention
            for weight in attention.parameters():
                nn.init.zeros_(weight).requires_grad_(False)
            block.attention_norm.requires_grad_(False)

    def forward(self, codes: Tensor) -> Tensor:
        """[..., WIDTH] states after the reading blocks to [..., text_width], as the stock blocks and projector do."""
        seen = []
        for number, block in enumerate(self.blocks, READING_BLOCKS + 1):
            codes = codes + block.feed_forward(block.ffn_norm(codes))
            if number in FEATURE_LAYERS:
                seen.append(codes)
        return self.projector(torch.cat(seen, dim=-1))  # type: ignore[no-any-return]

    def optimisers(self, rate: float) -> list[torch.optim.Optimizer]:
        """Muon for the matrices, which learns thousands of separate associations faster than AdamW; AdamW beside."""
        matrices = [p for p in self.parameters() if p.requires_grad and p.ndim == 2]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim != 2]
        return muon_and_adamw(matrices, others, rate)


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
        self.weights = torch.from_numpy(lexicon.practice)[torch.nonzero(words >= 0)[:, 0]]

    def draw(self, count: int, seed: int, handwriting: Handwriting) -> tuple[Tensor, Tensor]:
        """Codes [count, WIDTH] of length about CODE_NORM as the reader would write them, and their token ids."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.multinomial(self.weights, count * 11 // 12, replacement=True, generator=generator)
        second = torch.randint(len(self.composed[1]), (count - len(first),), generator=generator)
        picked = (torch.cat([a[first], b[second]]) for a, b in zip(self.known, self.composed, strict=True))
        letters, part, token = picked
        length = CODE_NORM * torch.exp(0.2 * torch.randn(count, 1, generator=generator))
        return handwriting.write(self.book, letters, part, generator) * length, token


def train_dictionary(
    tokenizer: Any,
    embedding: Tensor,
    lexicon: Lexicon,
    folder: Path,
    *,
    steps: int = 1400,
    seed: int = 0,
    batch: int = 3072,
    device: str = "cpu",
) -> Path:
    """Teach the dictionary every word of the lexicon and many composed ones, as the trained reader would write them.

    No pictures are drawn but for a look at the reader's handwriting; a quarter of the practice is what was seen there.

    Returns:
        The checkpoint, with the dictionary's parameters under "model".
    """
    from safety.mini.train_vision import load_reader, look_at_handwriting, train_loop
    from safety.mini.vision import build_tower

    torch.manual_seed(seed)
    dictionary = Dictionary(build_tower(), embedding.shape[1]).to(device)
    entries = Entries(tokenizer, lexicon, seed)
    targets = TokenTargets(embedding.to(device), entries.tokens.to(device), tokenizer.encode(FILLER)[0])
    handwriting = look_at_handwriting(load_reader(folder).to(device), lexicon, seed)
    tokens = torch.from_numpy(lexicon.tokens)

    ahead = Ahead(lambda step: entries.draw(batch * 3 // 4, seed * 1_000_003 + step, handwriting), steps, device)

    def loss_of(step: int) -> dict[str, Tensor]:
        written, token = ahead(step)
        some = torch.randint(len(handwriting.states), (batch - len(written),))
        seen = tokens[handwriting.words[some], handwriting.part[some]]
        codes = torch.cat([CODE_NORM * handwriting.states[some], written])
        said = dictionary(codes.to(device)).float()
        return targets.losses(said, targets.rows(torch.cat([seen, token]).to(device)), CONTRASTED)

    order = entries.weights.argsort(descending=True)
    shelves = {"first 1000": order[:1000:4], "to 3000": order[1000:3000:8], "to 10000": order[3000:10000:28]}

    def measure() -> dict[str, float]:
        rates = {}
        for label, some in shelves.items():
            letters, part, token = (values[some] for values in entries.known)
            codes = F.normalize(spelled_code(entries.book, letters, part), dim=-1) * CODE_NORM
            said, rows = dictionary(codes.to(device)).float(), targets.rows(token.to(device))
            rates[label] = (targets.guess(said) == rows).float().mean().item()
            rates[f"{label} alike"] = F.cosine_similarity(said, targets.vectors[rows], dim=-1).mean().item()
        return rates

    path = folder / DICTIONARY_CHECKPOINT
    train_loop(
        dictionary,
        dictionary.optimisers(2.5e-3),
        loss_of,
        measure,
        steps=steps,
        checkpoint=path,
        name="Dictionary",
        decay=0.95,
        measure_every=50,
        seed=seed,
    )
    return path
