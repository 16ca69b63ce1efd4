"""Pictures of attacked images, embedded in the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

SIDE = 288  # pixels; larger pictures are shown reduced


def data_uri(path: Path) -> str:
    """A picture as a data URI: a PNG that is small enough as it is, anything else as a PNG of at most SIDE pixels.

    An unreadable file is a ValueError that names it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            data = path.read_bytes() if image.format == "PNG" and max(image.size) <= SIDE else _reduced(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's word for a broken PNG
        raise ValueError(f"{path}: not readable as an image ({error})") from None
    return png_uri(data)


def png_uri(data: bytes) -> str:
    """The bytes of a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _reduced(image: Image.Image) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
