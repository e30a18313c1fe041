"""Decoding of pictures that come from outside: few formats, every kind of damage one ValueError."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened. PIL knows dozens more, whose readers are little tested; EPS even starts another program."""
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for a picture that it cannot decode: SyntaxError for many a PNG, ValueError for odd headers."""


def decode(data: bytes) -> Image.Image:
    """A picture from the bytes of its file, upright and in RGB. Raises ValueError with PIL's reason."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.verify()  # checksums; it has to be opened again to be decoded
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except BROKEN as error:
        raise ValueError(f"cannot be read as an image ({error})") from error
