"""Image files: reading them as RGB, and making sure that they can be read before training starts."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

Pixels = npt.NDArray[np.uint8]

VERIFY = ("full", "fast")
_REMEMBERED_FROM = 1000  # files; a smaller set is checked anew every time, in about a second


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: grey and palettes are expanded, 16-bit grey is brought to 8 bits by its high byte, and
    transparency lies over white. Orientation in EXIF and colour profiles are left alone, as the labels of the
    published sets were given to the stored pixels. 32-bit integers and floats have no known range: a ValueError.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels are of Pillow's mode {image.mode!r}, whose range is not known")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def open_rgb(path: str | Path) -> Image.Image:
    """The first frame of an image file as a decoded RGB image; one that cannot be read is a ValueError."""
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image") from None
    except Exception as error:  # decoders raise whatever they like on broken files
        raise ValueError(f"{path}: not readable as an image ({_first_line(error)})") from None


def fault(path: Path, *, full: bool) -> str | None:
    """Why a file cannot be read as an image, or None. `full` decodes all of it, a JPEG at 1/8 of its size, which
    reads every byte at a third of the cost; otherwise only the header is read."""
    try:
        if not full:
            with Image.open(path) as image:
                return None if min(image.size) > 0 else "it is empty"
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG":
                # Pillow lets pass a file whose tail is zeros, as an interrupted download leaves it.
                if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
                    return "its data end before the image does"
                image.draft("L", (1, 1))
                image.load()
                return None
            image.load()
            to_rgb(image)
        if image.format == "PNG":
            Image.open(io.BytesIO(data)).verify()  # checksums, which loading does not look at to the end
    except UnidentifiedImageError:
        return "it is in no known image format"
    except Exception as error:  # decoders raise whatever they like on broken files
        return _first_line(error)
    return None


def find_faults(paths: Sequence[Path], *, verify: str) -> dict[int, str]:
    """Position in `paths` → why that file cannot be read, for those that cannot.

    verify="full" decodes every file once, on all cores: a second of processor time for TID2013's 3,000, half a minute
    for KonIQ-10k's 10,073 at 1024×768. That a set of 1,000 files or more was found whole is remembered in the user's
    cache folder for as long as no file changes its size or time. verify="fast" reads the headers only.
    """
    if verify not in VERIFY:
        raise ValueError(f"verify={verify!r}: expected one of {', '.join(map(repr, VERIFY))}")
    full = verify == "full"
    seal = _seal(paths) if full and len(paths) >= _REMEMBERED_FROM else None
    if seal is not None and seal.exists():
        return {}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        answers = pool.map(lambda path: fault(path, full=full), paths)
        bar = tqdm(answers, total=len(paths), desc="checking images", unit="image", delay=2, leave=False)
        faults = {i: answer for i, answer in enumerate(bar) if answer is not None}
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    if seal is not None and not faults:
        try:
            seal.parent.mkdir(parents=True, exist_ok=True)
            seal.touch()
        except OSError:  # no place to remember it: the next run checks again
            pass
    return faults


def _seal(paths: Sequence[Path]) -> Path:
    """The file whose existence says that exactly these files, as they are now, were decoded without a fault."""
    listing = hashlib.sha256()
    for path in paths:
        state = path.stat()
        listing.update(
            f"{path.absolute()}\0{state.st_size}\0{state.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "srm-iqa", "verified", listing.hexdigest())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
