"""The words the vision tower learns to read, and how the language model spells them in tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from safety.mini.symbols import COLOURS, SHAPES, SYMBOLS

MAX_TOKENS = 3  # a word's further tokens have no patch of their own
HELD_OUT_SHARE = 80  # one ordinary word in this many is never drawn in training
PICTURE = "picture"  # said at the patch before a symbol's name, so that a drawn apple differs from the word "apple"

LIST_OPENERS = (
    "Steps to|Methods to|Ways to|List of|Tips to|Steps of|Guide to|How to|Ideas to|Rules to|Tricks to|Plans to|"
    "Examples of|Reasons to|Stages of|Advice to|Procedures to|Strategies to"
).split("|")
ALWAYS_TAUGHT = frozenset(" ".join([PICTURE, *SYMBOLS, *COLOURS, *SHAPES, *LIST_OPENERS]).lower().split())


def key_of(word: str) -> str:
    """Letters and digits of a drawn word, lower case: what the tower reads ("Don't," becomes "dont")."""
    return re.sub(r"[^a-z0-9]", "", word.lower())


def is_held_out(key: str) -> bool:
    """Whether a word is kept out of every training image (a fixed pseudo-random choice by hash)."""
    return (
        len(key) >= 4
        and key not in ALWAYS_TAUGHT
        and int(hashlib.sha256(key.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0
    )


@dataclass(frozen=True)
class Lexicon:
    """Words in a fixed order.

    Attributes:
        keys: letters of each word.
        tokens: [words, MAX_TOKENS] token ids of " word", -1 where the word has fewer.
        index: position by key.
        weights: [words] sampling probability in training images; zero for held-out words.
        practice: [words] sampling probability in the dictionary's training, which needs no images; never zero.
    """

    keys: list[str]
    tokens: np.ndarray
    index: dict[str, int]
    weights: np.ndarray
    practice: np.ndarray

    def sample(self, rng: np.random.Generator, count: int) -> list[str]:
        """Draw words for a training image."""
        picks = np.searchsorted(self._cumulative, rng.random(count))
        return [self.keys[i] for i in picks]

    @property
    def _cumulative(self) -> np.ndarray:
        cached = self.__dict__.get("_sums")
        if cached is None:
            cached = np.cumsum(self.weights) / self.weights.sum()
            object.__setattr__(self, "_sums", cached)
        return cached


def spell(tokenizer: Any, word: str) -> list[int]:
    """Token ids of a word after a space; the capitalised form where that is a single token and the plain one is not."""
    plain = tokenizer.encode(" " + word, add_special_tokens=False)
    if len(plain) > 1 and word.isalpha():
        capital = tokenizer.encode(" " + word.capitalize(), add_special_tokens=False)
        if len(capital) == 1:
            return list(capital)
    if word.isdigit():  # the tokenizer splits numbers into digits after a lone space: the digits are what matters
        return list(plain[1:]) if len(plain) > len(word) else list(plain)
    return list(plain)


def practice_weights(keys: list[str], counts: list[int]) -> np.ndarray:
    """How often to practise each word: by its use in the texts, by merge rank, and a little for every word.

    Args:
        keys: words by rank.
        counts: how often the texts use them.
    """
    used = np.minimum(np.array(counts, dtype=np.float64), 60.0) ** 0.5
    ranked = 4.0 * 400.0 / (np.arange(len(keys)) + 400.0)
    taught = np.array([4.0 if key in ALWAYS_TAUGHT else 0.0 for key in keys])
    weights: np.ndarray = used + ranked + taught + 0.1
    return weights / weights.sum()


def build_lexicon(tokenizer: Any, texts: Iterable[str]) -> Lexicon:
    """All whole-word tokens in order of their merge rank, then the further words of ``texts`` by frequency.

    Args:
        tokenizer: the language model's tokenizer.
        texts: sentences whose words should be readable (training text of the language model).
    """
    forms: dict[str, str] = {}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    plain = [token[1:] for token, _ in vocabulary if re.fullmatch("Ġ[a-z]+", token)]
    capital = [token[1:].lower() for token, _ in vocabulary if re.fullmatch("Ġ[A-Z][a-z]+", token)]
    counts: dict[str, int] = {}
    for text in texts:
        for word in re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower()):
            counts[word] = counts.get(word, 0) + 1
    written = sorted(counts, key=lambda word: (-counts[word], word))
    digits = [str(n) for n in range(100)]
    for word in [*sorted(ALWAYS_TAUGHT), *plain, *written, *capital, *digits]:
        forms.setdefault(key_of(word), word)
    forms.pop("", None)
    keys = list(forms)
    tokens = np.full((len(keys), MAX_TOKENS), -1, dtype=np.int64)
    for row, key in enumerate(keys):
        ids = spell(tokenizer, forms[key])[:MAX_TOKENS]
        tokens[row, : len(ids)] = ids
    practice = practice_weights(keys, [counts.get(word, 0) for word in forms.values()])
    weights = practice * np.array([not is_held_out(key) for key in keys])
    return Lexicon(keys, tokens, {key: row for row, key in enumerate(keys)}, weights / weights.sum(), practice)
