"""Pictures for the suites, drawn without system fonts: Pillow's built-in font and the DejaVu fonts inside matplotlib.

The style of a picture (font, size, layout, colours, distractors) depends on its seed alone, so a harmful picture and
its benign twin with the same seed differ in their words only.
"""

import random
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw

from safety.mini.render import FIGSTEP_ITEMS, Colour, Page, draw_lines, load_font, wrap_to_width
from safety.mini.symbols import COLOURS, SHAPES, shape

SIDE = 448
_BUNDLED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONTS: tuple[str | None, ...] = (None, *(str(_BUNDLED / f"DejaVu{name}.ttf") for name in (
    "Sans", "Sans-Bold", "SansMono", "SansMono-Bold", "Serif", "Serif-Bold")))
LAYOUTS = ("list", "poster", "note")
PAPERS: tuple[Colour, ...] = ((255, 255, 255), (250, 245, 225), (225, 238, 250), (235, 235, 235), (24, 26, 32))
SYMBOLS = Path(__file__).parent / "symbols"  # Noto Color Emoji (SIL OFL 1.1), drawn once, so that no font is needed


def typographic(text: str, seed: str) -> tuple[Image.Image, str]:
    """A text typeset in a style of its own, and the name of its layout.

    "list" is FigStep's (the text and the empty items 1. to 3.), "poster" is centred in a frame, "note" stands
    somewhere between coloured shapes.
    """
    rng = random.Random(seed)
    layout, font = rng.choice(LAYOUTS), rng.choice(FONTS)
    paper = rng.choice(PAPERS)
    dark = sum(paper) < 380
    inks: list[Colour] = [(0, 0, 0), (20, 40, 110), (120, 20, 20), (10, 80, 40)]
    ink = (250, 250, 250) if dark else rng.choice(inks)
    page = Page(Image.new("RGB", (SIDE, SIDE), paper))
    drawing = ImageDraw.Draw(page.image)
    if layout == "list":
        lines, size = _fit(textwrap.wrap(text, rng.randint(14, 18)) + list(FIGSTEP_ITEMS), font,
                           rng.randint(42, 50), SIDE - 20, SIDE - 16)
        draw_lines(page, lines, (rng.randint(6, 18), rng.randint(4, 10)), font=font, size=size, colour=ink)
    elif layout == "poster":
        drawing.rectangle((8, 8, SIDE - 9, SIDE - 9), outline=ink, width=rng.randint(2, 5))
        lines, size = _fit_words(text, font, rng.randint(44, 58), SIDE - 56, SIDE - 56)
        top = (SIDE - len(lines) * size * 1.2) / 2
        draw_lines(page, lines, (28, top), font=font, size=size, colour=ink, align="center", width=SIDE - 56)
    else:
        height = SIDE - 110
        for corner in range(rng.randint(1, 3)):
            art = shape(rng.choice(SHAPES), COLOURS[rng.choice(list(COLOURS))], rng.randint(46, 80))
            page.image.paste(art, (20 + corner * 140, height + 15), art)
        lines, size = _fit_words(text, font, rng.randint(40, 50), SIDE - 40, height - 20)
        draw_lines(page, lines, (rng.randint(10, 24), rng.randint(8, 16)), font=font, size=size, colour=ink)
    return page.image, layout


def _fit_words(text: str, font: str | None, size: int, width: int, height: int) -> tuple[list[str], int]:
    """Lines of a text wrapped to a box, and the largest font size up to `size` with which they fit."""
    while True:
        lines = wrap_to_width(text.split(), width, font, size)
        if size <= 12 or (len(lines) * size * 1.2 <= height and _width(lines, font, size) <= width):
            return lines, size
        size -= 2


def _fit(lines: list[str], font: str | None, size: int, width: int, height: int) -> tuple[list[str], int]:
    while size > 12 and (len(lines) * size * 1.2 > height or _width(lines, font, size) > width):
        size -= 2
    return lines, size


def _width(lines: list[str], font: str | None, size: int) -> float:
    return max(load_font(font, size).getlength(line) for line in lines)


def symbol(name: str, seed: str) -> Image.Image:
    """One of the shipped symbols (the PNG files in `symbols`) somewhere on a light page, larger or smaller."""
    rng = random.Random(seed)
    with Image.open(SYMBOLS / f"{name}.png") as file:
        art = file.convert("RGBA")
    side = rng.randint(180, 330)
    art = art.resize((side, round(side * art.height / art.width)), Image.Resampling.LANCZOS)
    grey = rng.randint(225, 255)
    page = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
    page.paste(art, (rng.randint(0, SIDE - art.width), rng.randint(0, max(0, SIDE - art.height))), art)
    return page


def any_shape(seed: str) -> Image.Image:
    """A shape and a colour that the seed chooses, somewhere on a white page."""
    rng = random.Random(seed)
    return coloured_shape(rng.choice(SHAPES), rng.choice(list(COLOURS)), seed)


def coloured_shape(name: str, colour: str, seed: str) -> Image.Image:
    """A named shape of a named colour somewhere on a white page."""
    rng = random.Random(seed)
    art = shape(name, COLOURS[colour], rng.randint(150, 300))
    page = Image.new("RGB", (SIDE, SIDE), "white")
    page.paste(art, (rng.randint(0, SIDE - art.width), rng.randint(0, SIDE - art.height)), art)
    return page


def blank(seed: str) -> Image.Image:
    """A page with nothing on it: white, black, a grey or another colour, of any size and shape."""
    rng = random.Random(seed)
    grey = rng.choice((255, 255, 0, rng.randint(1, 254), rng.randint(1, 254)))
    colours: list[Colour] = [(grey, grey, grey)] * 4 + [(rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))]
    return Image.new("RGB", (rng.randint(64, 672), rng.randint(64, 672)), rng.choice(colours))
