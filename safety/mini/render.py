"""Typeset pictures and say where every character landed.

Everything here works without system fonts: the default font is Pillow's built-in scalable one (Aileron), so presets,
tests and the page draw the same images on every machine. Training draws with the system's fonts as well.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)

FIGSTEP_SIDE = 760  # pixels; FigStep draws 80 pt text wrapped at 15 characters on a white square of this side
FIGSTEP_FONT_SIZE = 80
FIGSTEP_WRAP = 15
FIGSTEP_ITEMS = ("1.", "2.", "3.")


@dataclass
class PlacedWord:
    """One typeset word: its characters, and where they are in pixels.

    Attributes:
        text: the word as drawn, punctuation included.
        edges: ``len(text) + 1`` horizontal positions; character i spans ``edges[i]`` to ``edges[i + 1]``.
        middle: vertical centre of the line's lower-case letters.
    """

    text: str
    edges: list[float]
    middle: float


@dataclass
class Page:
    """A picture and the words drawn on it."""

    image: Image.Image
    words: list[PlacedWord] = field(default_factory=list)


@lru_cache(maxsize=512)
def load_font(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    """The font file at ``path`` at ``size`` pixels; Pillow's built-in font for ``None``."""
    if path is None:
        font = ImageFont.load_default(size)
        if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType has only a tiny bitmap font
            raise RuntimeError("Pillow was built without FreeType; install the Pillow wheel from PyPI.")
        return font
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=200_000)
def _advance(path: str | None, size: int, text: str) -> float:
    return load_font(path, size).getlength(text)


@lru_cache(maxsize=512)
def _middle_of_x(path: str | None, size: int) -> float:
    """Distance from the top of a line to the vertical centre of its lower-case letters."""
    box = load_font(path, size).getbbox("x")
    return (box[1] + box[3]) / 2


def wrap_to_width(words: list[str], width: float, font: str | None, size: int) -> list[str]:
    """Break words into lines no wider than ``width`` pixels; a word wider than that gets a line of its own."""
    space = _advance(font, size, " ")
    lines: list[str] = []
    used = 0.0
    for word in words:
        length = _advance(font, size, word)
        if lines and used + space + length <= width:
            lines[-1] += " " + word
            used += space + length
        else:
            lines.append(word)
            used = length
    return lines


def draw_lines(
    page: Page,
    lines: list[str],
    origin: tuple[float, float],
    *,
    font: str | None = None,
    size: int = 28,
    pitch: float | None = None,
    colour: Colour = BLACK,
    align: str = "left",
    width: float | None = None,
) -> None:
    """Draw lines of words onto a page and record where every character is.

    Args:
        page: receives the pixels and the words.
        lines: text lines; words are separated by single spaces.
        origin: left and top of the first line, in pixels.
        font: path of a font file, or None for the built-in font.
        size: font size in pixels.
        pitch: distance between lines in pixels; 1.2 times the size by default.
        colour: RGB of the letters.
        align: "left" or "center" within ``width``.
        width: width of the text block; only used for centring.
    """
    draw = ImageDraw.Draw(page.image)
    face = load_font(font, size)
    space = _advance(font, size, " ")
    pitch = size * 1.2 if pitch is None else pitch
    for row, line in enumerate(lines):
        words = line.split(" ")
        x, top = origin[0], origin[1] + row * pitch
        if align == "center" and width is not None:
            x += max(0.0, width - sum(_advance(font, size, word) for word in words) - space * (len(words) - 1)) / 2
        for word in words:
            draw.text((x, top), word, font=face, fill=colour)
            length = _advance(font, size, word)
            # Kerning shifts letters by less than a pixel: single advances, scaled to the word's true length.
            edges = [x]
            for character in word:
                edges.append(edges[-1] + _advance(font, size, character))
            stretch = length / max(edges[-1] - x, 1e-6)
            edges = [x + (edge - x) * stretch for edge in edges]
            page.words.append(PlacedWord(word, edges, top + _middle_of_x(font, size)))
            x += length + space


def resize_page(page: Page, side: int) -> Page:
    """The page scaled to a square of ``side`` pixels, words included. The page must be square."""
    factor = side / page.image.width
    image = page.image.resize((side, side), Image.Resampling.BICUBIC)
    words = [PlacedWord(w.text, [edge * factor for edge in w.edges], w.middle * factor) for w in page.words]
    return Page(image, words)


def figstep_page(instruction: str, *, font: str | None = None, items: tuple[str, ...] = FIGSTEP_ITEMS) -> Page:
    """An instruction followed by empty list items, laid out as FigStep does (arXiv 2311.05608), with its words."""
    page = Page(Image.new("RGB", (FIGSTEP_SIDE, FIGSTEP_SIDE), WHITE))
    lines = [*textwrap.wrap(instruction, FIGSTEP_WRAP), *items]
    pitch = FIGSTEP_FONT_SIZE + 11
    if len(lines) * pitch > FIGSTEP_SIDE - 20:  # longer than any FigStep instruction: close up rather than cut off
        pitch = (FIGSTEP_SIDE - 20) // len(lines)
    size = min(FIGSTEP_FONT_SIZE, pitch)
    draw_lines(page, lines, (20, 10), font=font, size=size, pitch=pitch)
    return page


def figstep(instruction: str, *, font: str | None = None) -> Image.Image:
    """The picture of :func:`figstep_page`: 760 x 760 RGB, black on white, without system fonts by default."""
    return figstep_page(instruction, font=font).image
