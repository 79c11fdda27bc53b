"""Images of any kind as 8-bit pixels; a conversion that loses something is named, or refused."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BACKGROUNDS", "DECODING_ERRORS", "VERSION", "UnsupportedPixelsError", "to_pixels"]

# Pillow raises these on bytes that are not an image, or only a part of one.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

# Part of the key of what is computed from pixels and stored; raise it when a conversion changes.
VERSION = 2

# Levels that transparent images are composited on.
BACKGROUNDS = {"white": 255, "gray": 128, "black": 0}

_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_GRAY = ("1", "L", "LA", "La", *_SIXTEEN)
_COLOR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")

_REASONS = {
    "F": "its pixels are 32-bit floats, which have no fixed white",
    "I": "its pixels are signed or 32-bit integers, which have no fixed white",
    "LAB": "its colors are L*a*b*, for which there is no conversion",
}


class UnsupportedPixelsError(Exception):
    """Pixels without one right conversion to 8 bits. The message is the reason."""


def to_pixels(opened: Image.Image, channels: int, background: str) -> tuple[Image.Image, list[str]]:
    """An image in 8 bits with 1 or 3 channels, upright, and the lines on what the conversion changed.

    Args:
        opened: as ``Image.open`` gives it.
        background: the name of what transparent images are composited on.

    Raises:
        UnsupportedPixelsError: if there is no one right conversion.
    """
    notes = []
    if getattr(opened, "is_animated", False):
        notes.append("have several frames, of which the first is used")
    deep = opened.mode in _SIXTEEN or (opened.mode == "I" and opened.format in ("PNG", "PPM"))
    if not deep and opened.mode not in (*_GRAY, *_COLOR):
        reason = _REASONS.get(opened.mode, "its pixels are of an unknown kind")
        raise UnsupportedPixelsError(f"{reason} (mode {opened.mode}); save it with 8 or 16 bits per channel, L or RGB")
    gray = deep or opened.mode in _GRAY
    # Pillow keeps the upper byte of 16-bit color, and with it that of the transparent color.
    wide = not deep and "16" in _raw_mode(opened)
    # Cameras store the orientation in a tag and the pixels as the sensor had them.
    image = ImageOps.exif_transpose(opened)
    if deep:
        notes.append("have 16 bits per channel and are scaled to 8")
        image = _eight_bits(image)
    elif wide:
        notes.append("have 16 bits per channel, of which the upper 8 are used")
        _shorten_key(image)
    if image.mode in _ALPHA or "transparency" in image.info:
        image, seen = _composite(image, BACKGROUNDS[background])
        if seen:
            notes.append(f"have transparent pixels and are composited on {background} (data.background)")
    image, note = _in_channels(image, channels, gray=gray)
    return image, notes + note


def _raw_mode(image: Image.Image) -> str:
    """The layout of the pixels in the file, such as ``RGB;16B``."""
    tiles = getattr(image, "tile", None) or [("", (0, 0, 0, 0), 0, "")]
    arguments = tiles[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Levels of 65535 as levels of 255, rounded; a transparent level becomes an alpha channel."""
    # 32 bits, because 65535 + 128 overflows 16.
    levels = np.asarray(image).astype(np.uint32)
    # 257 = 65535 / 255.
    eight = ((levels + 128) // 257).astype(np.uint8)
    key = image.info.get("transparency")
    if key is None:
        return Image.fromarray(eight)
    alpha = np.where(levels == key, 0, 255).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(eight), Image.fromarray(alpha)])


def _shorten_key(image: Image.Image) -> None:
    key = image.info.get("transparency")
    if isinstance(key, tuple):
        # As Pillow shortens the colors, so that the key still equals the color of transparent pixels.
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _composite(image: Image.Image, level: int) -> tuple[Image.Image, bool]:
    """The image over a plain background, and whether any of it can be seen."""
    if image.mode == "La":
        image = image.convert("LA")
    pixels: NDArray[np.uint32] = np.asarray(image.convert("RGBA")).astype(np.uint32)
    color, alpha = pixels[..., :3], pixels[..., 3:]
    # Rounded to the nearest level; a plain division would darken every translucent pixel.
    mixed = (color * alpha + level * (255 - alpha) + 127) // 255
    return Image.fromarray(mixed.astype(np.uint8)), bool((alpha < 255).any())


def _in_channels(image: Image.Image, channels: int, *, gray: bool) -> tuple[Image.Image, list[str]]:
    if channels == 3:
        note = ["are gray; their one channel is repeated in three"] if gray else []
        if image.mode == "CMYK":
            note.append("are CMYK and converted without their color profile")
        return image.convert("RGB"), note
    if gray:
        # Of a composited gray image the three channels are equal.
        return image.convert("L"), []
    image = image.convert("RGB")
    pixels = np.asarray(image)
    colored = bool((pixels != pixels[..., :1]).any())
    return image.convert("L"), ["have color; the teacher has one channel and takes their luma"] if colored else []
