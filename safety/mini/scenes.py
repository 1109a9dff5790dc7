"""Random training pictures for the vision tower, with a label for every patch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from safety.mini.lexicon import LIST_OPENERS, PICTURE, Lexicon, is_held_out, key_of
from safety.mini.render import FIGSTEP_WRAP, Colour, Page, draw_lines, resize_page, wrap_to_width
from safety.mini.symbols import COLOURS, SHAPES, SYMBOLS, emoji, shape

SIDE = 224
PATCH = 16
GRID = SIDE // PATCH
PATCHES = GRID * GRID

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"  # class 0 is "none", then these, then any other mark
OTHER_MARK = len(CHARACTERS) + 1
CHARACTER_CLASSES = len(CHARACTERS) + 2

FONT_ROOT = Path("/usr/share/fonts/truetype")
FREE_MONO_BOLD = "freefont/FreeMonoBold.ttf"
FONT_FILES = (
    "freefont/FreeMono.ttf freefont/FreeSans.ttf freefont/FreeSansBold.ttf freefont/FreeSerif.ttf "
    "freefont/FreeSerifBold.ttf freefont/FreeSerifItalic.ttf freefont/FreeSansOblique.ttf "
    "dejavu/DejaVuSans.ttf dejavu/DejaVuSans-Bold.ttf dejavu/DejaVuSansMono.ttf dejavu/DejaVuSansMono-Bold.ttf "
    "dejavu/DejaVuSerif.ttf dejavu/DejaVuSerif-Bold.ttf dejavu/DejaVuSansCondensed.ttf "
    "liberation/LiberationSans-Regular.ttf liberation/LiberationSans-Bold.ttf liberation/LiberationSans-Italic.ttf "
    "liberation/LiberationSerif-Regular.ttf liberation/LiberationSerif-Bold.ttf liberation/LiberationMono-Regular.ttf "
    "liberation/LiberationMono-Bold.ttf liberation/LiberationSansNarrow-Regular.ttf "
    "noto/NotoSans-Regular.ttf noto/NotoSans-Bold.ttf noto/NotoSerif-Regular.ttf noto/NotoSerif-Bold.ttf "
    "noto/NotoSans-Italic.ttf"
).split()


@dataclass
class Scene:
    """A training picture.

    Attributes:
        pixels: [224, 224, 3] uint8.
        character: [196] class of the character nearest each patch's centre, 0 for none.
        word: [196] row in the lexicon of the word that this patch stands for, -1 for none.
        part: [196] which token of that word the patch stands for (0 = the word's first patch).
        words: typeset words in the order drawn.
        names: names of the symbols, left to right.
    """

    pixels: np.ndarray
    character: np.ndarray
    word: np.ndarray
    part: np.ndarray
    words: list[str] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)


def available_fonts() -> list[str | None]:
    """Fonts to draw with: the built-in one, and those of Debian's font packages that are installed."""
    return [None, *(str(FONT_ROOT / name) for name in FONT_FILES if (FONT_ROOT / name).exists())]


def label_words(page: Page, lexicon: Lexicon, scene: Scene) -> None:
    """Write the labels of a 224-pixel page's words into a scene; words outside the lexicon get characters only."""
    for placed in page.words:
        row = int(placed.middle // PATCH)
        if not 0 <= row < GRID:
            continue
        kept = [i for i, c in enumerate(placed.text) if c.isalnum()]
        for i, c in enumerate(placed.text):
            first, last = placed.edges[i], placed.edges[i + 1]
            low = max(0, int(np.ceil((first - PATCH / 2) / PATCH)))
            high = min(GRID - 1, int(np.floor((last - PATCH / 2) / PATCH)))
            code = CHARACTERS.find(c.lower()) + 1 or OTHER_MARK
            scene.character[row * GRID + low : row * GRID + high + 1] = code
        entry = lexicon.index.get(key_of(placed.text))
        if entry is None or not kept:
            continue
        column = int((placed.edges[kept[0]] + placed.edges[kept[0] + 1]) / 2 // PATCH)
        count = int((lexicon.tokens[entry] >= 0).sum())
        for part in range(count):
            # A later part may not take the patch where the next word starts; the next word then overwrites it.
            if 0 <= column + part < GRID and not (part == 0 and scene.part[row * GRID + column] == 0):
                scene.word[row * GRID + column + part] = entry
                scene.part[row * GRID + column + part] = part


def label_picture(names: Sequence[str], box: tuple[int, int, int, int], lexicon: Lexicon, scene: Scene) -> None:
    """Label a symbol's middle row: "picture", then its names, around the centre of (left, top, right, bottom)."""
    row = int((box[1] + box[3]) / 2 // PATCH)
    column = int((box[0] + box[2]) / 2 // PATCH) - 1
    flat: list[tuple[int, int]] = []
    for name in (PICTURE, *names):
        entry = lexicon.index[name]
        flat += [(entry, part) for part in range(int((lexicon.tokens[entry] >= 0).sum()))]
    for step, (entry, part) in enumerate(flat):
        if 0 <= row < GRID and 0 <= column + step < GRID:
            scene.word[row * GRID + column + step] = entry
            scene.part[row * GRID + column + step] = part


class SceneMaker:
    """Draws random labelled pictures.

    Args:
        lexicon: words to draw.
        held_out: draw only held-out words (for measuring), never in training.
    """

    def __init__(self, lexicon: Lexicon, held_out: bool = False) -> None:
        self.lexicon = lexicon
        self.fonts = available_fonts()
        self.mono = next((font for font in self.fonts if font and font.endswith(FREE_MONO_BOLD)), None)
        if self.mono is None and (FONT_ROOT / FREE_MONO_BOLD).exists():
            self.mono = str(FONT_ROOT / FREE_MONO_BOLD)
        self.unseen = [key for key in lexicon.keys if is_held_out(key)] if held_out else []

    def words(self, rng: np.random.Generator, count: int) -> list[str]:
        """Random words for one picture."""
        if self.unseen:
            return [self.unseen[i] for i in rng.integers(len(self.unseen), size=count)]
        return self.lexicon.sample(rng, count)

    def scene(self, rng: np.random.Generator, kind: str | None = None) -> Scene:
        """One picture; ``kind`` is "list" (FigStep layout), "text" or "picture", at random by default."""
        kind = kind or str(rng.choice(["list", "text", "picture"], p=[0.46, 0.30, 0.24]))
        empty = np.zeros(PATCHES, dtype=np.int64)
        scene = Scene(np.empty(0), empty.copy(), empty.copy() - 1, empty.copy() - 1)
        page = {"list": self._list, "text": self._text, "picture": self._picture}[kind](rng, scene)
        if page.image.width != SIDE:
            page = resize_page(page, SIDE)
        label_words(page, self.lexicon, scene)
        scene.words = [word.text for word in page.words]
        pixels = np.asarray(page.image, dtype=np.uint8)
        if rng.random() < 0.25:
            noise = rng.normal(0.0, rng.uniform(1, 10), size=(SIDE, SIDE, 1))
            pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
        scene.pixels = pixels
        return scene

    def font(self, rng: np.random.Generator, mono: float, builtin: float) -> str | None:
        """A font path: FigStep's and the built-in one (None) with these probabilities, else any."""
        draw = rng.random()
        if draw < mono and self.mono:
            return self.mono
        return None if draw < mono + builtin else self.fonts[rng.integers(len(self.fonts))]

    def colours(self, rng: np.random.Generator, plain: float) -> tuple[Colour, Colour]:
        """Text and page colour with enough contrast; black on white with probability ``plain``."""
        if rng.random() < plain:
            return (0, 0, 0), (255, 255, 255)
        while True:
            text, page = rng.integers(0, 256, size=3), rng.integers(0, 256, size=3)
            if rng.random() < 0.5:
                page = 255 - page // 6
            weight = np.array([0.3, 0.59, 0.11])
            if abs(float((text - page) @ weight)) > 90:
                return tuple(int(c) for c in text), tuple(int(c) for c in page)  # type: ignore[return-value]

    def _dressed(self, rng: np.random.Generator, words: list[str]) -> list[str]:
        """Words with the capitals and marks of ordinary writing."""
        style = rng.random()
        if style < 0.06:
            words = [word.upper() for word in words]
        elif style < 0.16:
            words = [word.capitalize() for word in words]
        elif style < 0.7:
            words = [words[0].capitalize(), *words[1:]]
        marked = []
        for word in words:
            draw = rng.random()
            marked.append(word + str(rng.choice(list(".,,?!:;"))) if draw < 0.08 else word)
        if rng.random() < 0.4:
            marked[-1] = words[-1] + str(rng.choice(list(".?!")))
        return marked

    def _list(self, rng: np.random.Generator, scene: Scene) -> Page:
        scale = 1 if rng.random() < 0.4 else 2
        words = self.words(rng, int(rng.integers(2, 11)))
        if rng.random() < 0.6:
            words = [*str(rng.choice(LIST_OPENERS)).split(), *words]
        else:
            words = [words[0].capitalize(), *words[1:]]
        if rng.random() < 0.4:
            words[-1] += "."
        items = ["1.", "2.", "3.", "4.", "5."][: int(rng.choice([3, 3, 3, 3, 0, 4, 5]))]
        lines = [*textwrap.wrap(" ".join(words), FIGSTEP_WRAP), *items]
        size = float(rng.uniform(20.0, 26.5)) if rng.random() < 0.5 else 23.6
        pitch = size * rng.uniform(1.1, 1.25)
        if len(lines) * pitch > SIDE - 4:
            lines = lines[: int((SIDE - 4) / pitch)]
        text, background = self.colours(rng, 0.8)
        page = Page(Image.new("RGB", (SIDE * scale, SIDE * scale), background))
        origin = (rng.uniform(2, 10) * scale, rng.uniform(0, 8) * scale)
        font = self.font(rng, 0.45, 0.35)
        draw_lines(page, lines, origin, font=font, size=round(size * scale), pitch=pitch * scale, colour=text)
        return page

    def _text(self, rng: np.random.Generator, scene: Scene) -> Page:
        scale = 1 if rng.random() < 0.5 else 2
        size = float(rng.uniform(17, 22) if rng.random() < 0.3 else rng.uniform(22, 36))
        pitch = size * rng.uniform(1.12, 1.6)
        left, top = rng.uniform(2, 30), rng.uniform(0, 20)
        width = SIDE - left - rng.uniform(2, 14)
        most = max(1, int((SIDE - top) / pitch))
        count = int(np.clip(rng.integers(1, 26), 1, most * width / (size * 2.6) + 1))
        font = self.font(rng, 0.15, 0.25)
        words = self._dressed(rng, self.words(rng, count))
        if rng.random() < 0.15:
            words[int(rng.integers(len(words)))] = str(rng.integers(0, 100))
        pixels = max(8, round(size * scale))
        lines = wrap_to_width(words, width * scale, font, pixels)[:most]
        text, background = self.colours(rng, 0.65)
        page = Page(Image.new("RGB", (SIDE * scale, SIDE * scale), background))
        draw_lines(
            page,
            lines,
            (left * scale, (top + rng.uniform(0, max(0.0, SIDE - top - len(lines) * pitch))) * scale),
            font=font,
            size=pixels,
            pitch=pitch * scale,
            colour=text,
            align="center" if rng.random() < 0.3 else "left",
            width=width * scale,
        )
        return page

    def _picture(self, rng: np.random.Generator, scene: Scene) -> Page:
        light = rng.random() < 0.75
        background = tuple(int(c) for c in (255 - rng.integers(0, 40, 3) if light else rng.integers(0, 256, 3)))
        page = Page(Image.new("RGB", (SIDE, SIDE), background))  # type: ignore[arg-type]
        two = rng.random() < 0.25
        caption = rng.random() < 0.25
        height = 176 if caption else SIDE
        for slot in range(2 if two else 1):
            room = 112 if two else SIDE
            side = int(rng.integers(80, min(room, height, 180) + 1))
            left = slot * 112 + int(rng.integers(0, room - side + 1))
            top = int(rng.integers(0, height - side + 1))
            if rng.random() < 0.72:
                name = str(rng.choice(list(SYMBOLS)))
                names = [name]
                art = emoji(name)
                factor = side / max(art.size)
                art = art.resize((max(1, round(art.width * factor)), max(1, round(art.height * factor))), 2)
            else:
                colours = [
                    c for c in COLOURS if sum(abs(a - b) for a, b in zip(COLOURS[c], background, strict=True)) > 140
                ]
                names = [str(rng.choice(colours)), str(rng.choice(SHAPES))]
                art = shape(names[1], COLOURS[names[0]], side)
            left += (side - art.width) // 2
            top += (side - art.height) // 2
            page.image.paste(art, (left, top), art)
            scene.names.append(names)
            label_picture(names, (left, top, left + art.width, top + art.height), self.lexicon, scene)
        if caption:
            size = int(rng.integers(18, 31))
            words = self._dressed(rng, self.words(rng, int(rng.integers(1, 4))))
            font = self.font(rng, 0.15, 0.3)
            lines = wrap_to_width(words, SIDE - 10, font, size)[:1]
            dark = sum(background) > 380
            draw_lines(
                page,
                lines,
                (6, 186 - (size - 18) * 0.4),
                font=font,
                size=size,
                colour=(0, 0, 0) if dark else (255, 255, 255),
                align="center" if rng.random() < 0.5 else "left",
                width=SIDE - 12,
            )
        return page
