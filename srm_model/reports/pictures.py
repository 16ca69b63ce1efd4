"""Encode images as data URIs, to embed them in the pages of reports."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

SIDE = 288  # pixels; larger pictures are reduced to this size


def data_uri(path: Path) -> str:
    """Return a picture as a data URI.

    A PNG with sides of at most SIDE pixels is embedded unchanged. Any other image is reduced to this size if it is
    larger, and converted to PNG.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            data = path.read_bytes() if image.format == "PNG" and max(image.size) <= SIDE else _reduced(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"{path}: not readable as an image ({error})") from None
    return png_uri(data)


def png_uri(data: bytes) -> str:
    """Return the bytes of a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _reduced(image: Image.Image) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return png_bytes(image)
