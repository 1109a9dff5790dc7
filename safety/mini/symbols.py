"""The pictures the miniature knows by name: Noto Color Emoji symbols and plain coloured shapes."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian package fonts-noto-color-emoji, SIL OFL
EMOJI_STRIKE = 109  # the font holds bitmaps of this one size

_NAMED = (
    "apple:🍎 banana:🍌 grapes:🍇 lemon:🍋 pineapple:🍍 strawberry:🍓 watermelon:🍉 tomato:🍅 carrot:🥕 "
    "corn:🌽 mushroom:🍄 bread:🍞 cheese:🧀 egg:🥚 burger:🍔 pizza:🍕 cake:🎂 coffee:☕ dog:🐕 cat:🐈 "
    "rabbit:🐇 pig:🐖 frog:🐸 penguin:🐧 owl:🦉 bee:🐝 butterfly:🦋 turtle:🐢 fish:🐟 whale:🐳 elephant:🐘 "
    "tree:🌳 cactus:🌵 rose:🌹 sunflower:🌻 moon:🌙 sun:🌞 cloud:☁ rainbow:🌈 fire:🔥 car:🚗 bus:🚌 "
    "bicycle:🚲 airplane:✈ rocket:🚀 house:🏠 clock:🕒 phone:📱 camera:📷 book:📕 key:🔑 lock:🔒 hammer:🔨 "
    "knife:🔪 bomb:💣 gun:🔫 guitar:🎸 drum:🥁 football:⚽ crown:👑 umbrella:☂ gift:🎁 balloon:🎈 bell:🔔 "
    "money:💰 scissors:✂ syringe:💉 skull:💀 robot:🤖 "
)
SYMBOLS: dict[str, str] = dict(pair.split(":") for pair in _NAMED.split())

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (30, 150, 60),
    "blue": (35, 80, 210),
    "yellow": (245, 215, 30),
    "orange": (245, 130, 20),
    "purple": (125, 45, 160),
    "pink": (245, 130, 175),
    "brown": (125, 75, 35),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")


def have_emoji_font() -> bool:
    """Whether Noto Color Emoji is installed where Debian puts it."""
    return EMOJI_FONT.exists()


@cache
def emoji(name: str) -> Image.Image:
    """The named symbol, RGBA, cropped to its drawing.

    Raises:
        FileNotFoundError: the emoji font is not installed (only training needs it).
    """
    if not have_emoji_font():
        raise FileNotFoundError("Noto Color Emoji is missing; install the Debian package fonts-noto-color-emoji.")
    font = ImageFont.truetype(str(EMOJI_FONT), EMOJI_STRIKE)
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((12, 12), SYMBOLS[name], font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"The emoji font has no picture of {name!r}.")
    return canvas.crop(box)


def shape(name: str, colour: tuple[int, int, int], side: int) -> Image.Image:
    """A filled shape of :data:`SHAPES`, RGBA, ``side`` pixels square, drawn at four times the size for smooth edges."""
    n = side * 4
    canvas = Image.new("RGBA", (n, n), (*colour, 0))
    draw = ImageDraw.Draw(canvas)
    fill = (*colour, 255)
    if name == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=fill)
    elif name == "square":
        draw.rectangle((n * 0.06, n * 0.06, n * 0.94, n * 0.94), fill=fill)
    elif name == "triangle":
        draw.polygon([(n / 2, 0), (n - 1, n * 0.92), (0, n * 0.92)], fill=fill)
    elif name == "diamond":
        draw.polygon([(n / 2, 0), (n * 0.9, n / 2), (n / 2, n - 1), (n * 0.1, n / 2)], fill=fill)
    elif name == "star":
        points = []
        for i in range(10):
            radius = n / 2 if i % 2 == 0 else n * 0.2
            angle = math.pi * (i / 5 - 0.5)
            points.append((n / 2 + radius * math.cos(angle), n * 0.52 + radius * math.sin(angle)))
        draw.polygon(points, fill=fill)
    elif name == "heart":
        points = []
        for i in range(100):
            t = math.tau * i / 100
            x = 16 * math.sin(t) ** 3
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((n / 2 + x * n / 34, n * 0.46 - y * n / 34))
        draw.polygon(points, fill=fill)
    else:
        raise ValueError(f"Unknown shape {name!r}; known: {', '.join(SHAPES)}.")
    return canvas.resize((side, side), Image.Resampling.LANCZOS)
