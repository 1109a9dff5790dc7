"""The edge: images and prompts from strangers, checked before any model work."""

import base64
import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from safety.errors import UserError

MAX_PIXELS = 40_000_000  # a 21 kB PNG can decode to gigabytes: the header is read first
MAX_BYTES = 32 * 2**20
MAX_SIDE = 1536  # larger pictures are shrunk, also for models that cut pictures into tiles and could see more
MAX_CHARACTERS = 8_000
BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)
# What Pillow raises at broken files.
DAMAGED = (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError,
           AttributeError, struct.error)
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by EXIF orientation


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """Open a picture safely: first frame, EXIF rotation applied, RGB on white, at most MAX_SIDE pixels a side.

    Args:
        source: a path, or an already opened PIL image, which is left as it is.

    Raises:
        UserError: the file is missing, too large, not a picture, truncated, or has more than MAX_PIXELS pixels.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "The image")
    if not isinstance(source, str | Path):
        raise UserError(f"The image must be a path or a PIL image, but it is of type {type(source).__name__}. "
                        "Image.fromarray makes one of an array.")
    path = Path(source)
    name = f"The image {path.name!r}"
    if not _is_file(path):
        raise UserError(f"{name} was not found. Give the path of a PNG, JPEG, WebP, BMP, TIFF or GIF file.")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{name} is larger than {MAX_BYTES // 2**20} MiB. Use a smaller file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"))
    except BOMBS:
        raise UserError(_too_many_pixels(name)) from None
    except DAMAGED as error:
        raise UserError(_damaged(name)) from error
    with image:
        return _decode(image, name, reduced=True)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


def _damaged(name: str) -> str:
    return (f"{name} could not be read as a picture: it is damaged or of another type. "
            "Use a complete PNG, JPEG, WebP, BMP, TIFF or GIF file.")


def _too_many_pixels(name: str) -> str:
    return f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels. Scale it down first."


def _decode(image: Image.Image, name: str, reduced: bool = False) -> Image.Image:
    """`reduced`: a JPEG may be decoded at a smaller size, which changes the given object."""
    if image.width * image.height > MAX_PIXELS:
        raise UserError(_too_many_pixels(name))
    if min(image.size) < 1 or max(image.size) > 200 * min(image.size):
        raise UserError(f"{name} is {image.width} x {image.height} pixels, too narrow to be seen. Use another picture.")
    try:
        if image.tell():  # only sequences move
            image.seek(0)
        if reduced:
            image.draft("RGB", (MAX_SIDE, MAX_SIDE))
        image.load()
        return _finish(_upright(image))
    except BOMBS:  # a frame can be larger than its picture
        raise UserError(_too_many_pixels(name)) from None
    except DAMAGED as error:
        raise UserError(_damaged(name)) from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; as it is where that cannot be read. ImageOps.exif_transpose also writes all
    other EXIF anew, and fails at a good photo with one odd entry."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGED:
        return image
    return image if turn is None else image.transpose(turn)


def _finish(image: Image.Image) -> Image.Image:
    """RGB on white, at most MAX_SIDE pixels a side."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        # Convert() would clip 16-bit greys to white, and leave floats from 0 to 1 black: scale them to eight bits.
        brightest = np.asarray(image).max()
        top = 65535.0 if image.mode.startswith("I;16") or brightest > 255 else 255.0
        top = 1.0 if image.mode == "F" and brightest <= 1 else top
        image = image.convert("F").point(lambda value: value * (255.0 / top)).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def small_copy(image: Image.Image, side: int = 320) -> str:
    """A picture as a data URI of some 10 kB, at most `side` pixels a side: what an export shows of it."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def check_prompt(prompt: str, markers: list[str]) -> str:
    """Return the prompt, stripped, or say what is wrong with it.

    Args:
        prompt: what a person typed.
        markers: strings with a meaning of their own to the loaded model (image placeholders, chat-template tokens).

    Raises:
        UserError: the prompt is not text, empty, longer than MAX_CHARACTERS, or contains one of the markers.
    """
    if not isinstance(prompt, str):
        raise UserError("The prompt must be text.")
    if not prompt.strip():
        raise UserError("The prompt is empty. Type a question or an instruction.")
    if len(prompt) > MAX_CHARACTERS:
        raise UserError(f"The prompt has {len(prompt):,} characters; at most {MAX_CHARACTERS:,} are allowed. "
                        "Shorten it.")
    for marker in markers:
        if marker in prompt:
            raise UserError(f"The prompt contains {marker!r}, which this model reads as a control marker. Remove it.")
    return prompt.strip().encode("utf-8", "replace").decode("utf-8")
