"""Read image files as RGB, and check before training that all of them can be read."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import ceil, floor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

Pixels = npt.NDArray[np.uint8]

VERIFY = ("full", "fast")
_REMEMBERED_FROM = 1000  # number of files; smaller datasets are checked every time, in about a second
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# EXIF orientations for which `Picture.part` exchanges x and y, counts x from the right, or counts y from the bottom.
_SIDEWAYS, _FROM_RIGHT, _FROM_BOTTOM = (5, 6, 7, 8), (2, 3, 7, 8), (3, 4, 6, 7)
_BAND = 1 << 20  # pixels that are converted at a time


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to RGB.

    Grey values and palettes are expanded. 16-bit grey values are reduced to their high byte. Transparent images are
    composited on white, as on an empty web page. Colour profiles are ignored.

    Raises:
        ValueError: The pixels are 32-bit integers or floats, so their range is unknown.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels are of Pillow's mode {image.mode!r}, whose range is not known; expected 8 or 16 bits"
        )
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def check_regular(path: str | Path) -> None:
    """Raise OSError if a path is not a regular file, because reading a pipe, socket or device may block forever."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError("it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")


def shorter_side(path: str | Path) -> int:
    """Return the shorter side of an image file in pixels. Only the header of the file is read."""
    with Image.open(path) as image:
        return min(image.size)


class Picture:
    """A decoded image. The methods return parts of the image as RGB, rotated by the EXIF orientation.

    Only the requested part is copied. Peak memory is the memory of the decoded image plus the memory of this part.
    """

    def __init__(self, image: Image.Image) -> None:
        self._image, self._orientation = image, _orientation(image)
        self.size: tuple[int, int] = image.size[::-1] if self._orientation in _SIDEWAYS else image.size

    def part(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        """Return the pixels of a box as RGB. Coordinates are pixels of the image after its EXIF orientation is applied.

        Raises:
            ValueError: As in `to_rgb`.
        """
        x, y = (left, right), (top, bottom)
        if self._orientation in _SIDEWAYS:
            x, y = y, x
        width, height = self._image.size
        if self._orientation in _FROM_RIGHT:
            x = width - x[1], width - x[0]
        if self._orientation in _FROM_BOTTOM:
            y = height - y[1], height - y[0]
        image = self._image
        if (x, y) != ((0, width), (0, height)):
            image = image.crop((x[0], y[0], x[1], y[1]))
            image.format = self._image.format  # `to_rgb` needs it, and `crop` drops it
        turn = _TURNS.get(self._orientation)
        return to_rgb(image) if turn is None else to_rgb(image).transpose(turn)

    def resized(
        self, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
    ) -> Image.Image:
        """Return the part of the image inside `box` as RGB, resized to `size` with antialiased bicubic interpolation.

        The result equals the result of Pillow's `Image.resize` with this box on the whole RGB image. To limit memory, a
        large image is converted to RGB in bands of rows. Each band is resized to the new width. The joined bands are
        then resized to the new height.

        Args:
            size: Width and height of the result.
            box: Left, top, right and bottom in pixels, after the EXIF orientation is applied. Default: the whole image.
        """
        box = (0, 0, *self.size) if box is None else box
        (left, right), (top, bottom) = (
            _reached(box[axis], box[axis + 2], size[axis], self.size[axis]) for axis in (0, 1)
        )
        inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        width, height = right - left, bottom - top
        if width * height <= _BAND:
            return self.part(left, top, right, bottom).resize(size, Image.Resampling.BICUBIC, box=inner)
        narrow = Image.new("RGB", (size[0], height))
        rows = max(1, _BAND // width)
        for y in range(0, height, rows):
            band = self.part(left, top + y, right, top + min(y + rows, height))
            across = (inner[0], 0, inner[2], band.height)
            narrow.paste(band.resize((size[0], band.height), Image.Resampling.BICUBIC, box=across), (0, y))
        return narrow.resize(size, Image.Resampling.BICUBIC, box=(0, inner[1], size[0], inner[3]))


def _reached(start: float, end: float, size: int, side: int) -> tuple[int, int]:
    """Return the pixels of one axis that bicubic resizing may read, as the range (first, last + 1).

    Args:
        start, end: The part of the axis that is resized.
        size: Length of the part after resizing.
        side: Length of the whole axis before resizing.
    """
    reach = ceil(2 * max(1, (end - start) / size)) + 1
    return max(0, floor(start) - reach), min(side, ceil(end) + reach)


@contextmanager
def decoded(path: str | Path) -> Iterator[Picture]:
    """Decode the first frame of an image file, and yield it to the `with` block.

    Raises:
        ValueError: The image cannot be read or has more pixels than Pillow's limit (see `pixel_limit`). If the body of
            the `with` block raises any Exception, a ValueError is raised instead of this exception.
    """
    try:
        check_regular(path)
        with Image.open(path) as image:
            image.load()
            yield Picture(image)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected an image") from None
    except Exception as error:  # decoders raise many types of errors on broken files
        raise ValueError(f"{path}: not readable as an image ({_reason(error)})") from None


def open_rgb(path: str | Path) -> Image.Image:
    """Return the first frame of an image file as RGB, rotated by its EXIF orientation.

    Raises:
        ValueError: The image cannot be read or has more pixels than Pillow's limit (see `pixel_limit`).
    """
    with decoded(path) as picture:
        return picture.part(0, 0, *picture.size)


@contextmanager
def pixel_limit(pixels: int | None) -> Iterator[None]:
    """Within the `with` block, set Pillow's limit on the number of pixels per image.

    The limit applies to the whole process, including other threads.

    Two warnings of Pillow are suppressed, because the images that cause them can be read: the warning for an image with
    more than half of the allowed pixels, and the warning for broken EXIF data.

    Args:
        pixels: The limit. 0 removes the limit; None leaves it unchanged.
    """
    before = Image.MAX_IMAGE_PIXELS
    if pixels is not None:
        # Pillow rejects images of more than twice this value.
        Image.MAX_IMAGE_PIXELS = (pixels / 2) or None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def fault(path: Path, *, full: bool) -> str | None:
    """Return why a file cannot be read as an image, or None if it can.

    Args:
        path: Image file.
        full: False reads only the header; True decodes the image. With True, a JPEG is decoded at 1/8 of its width and
            height, because this takes a third of the time of decoding at full size and still reads every byte of the
            file.
    """
    try:
        check_regular(path)
        if not full:
            with Image.open(path) as image:
                return None if min(image.size) > 0 else "it is empty"
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG":
                # An interrupted download can leave a file that ends in zeros. Pillow accepts such a file.
                if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
                    return "its data end before the image does"
                image.draft("L", (1, 1))
                image.load()
                return None
            image.load()
            Picture(image).part(0, 0, 1, 1)  # raises for a mode that `to_rgb` rejects
        if image.format == "PNG":
            Image.open(io.BytesIO(data)).verify()  # loading does not check all checksums
    except Exception as error:  # decoders raise many types of errors on broken files
        return _reason(error)
    return None


def find_faults(paths: Sequence[Path], *, verify: str, progress: bool = True) -> dict[int, str]:
    """Find files that cannot be read as images.

    Decoding takes about a second of CPU time for TID2013 (3,000 files), and half a minute for KonIQ-10k (10,073 files
    at 1024×768). If 1,000 or more files are decoded without a fault, this result is recorded by an empty file in the
    user's cache folder. The name of the empty file is a hash of the paths, sizes and modification times of all decoded
    files. Later calls with the same list find the empty file and decode nothing, unless the size or modification time
    of a file in the list has changed. Without a cache folder, every call decodes all files.

    Args:
        paths: Files to check.
        verify: "full" decodes every file, on all cores; "fast" reads the headers only.
        progress: Whether to show a progress bar if stderr is a terminal.

    Returns:
        A dict with one entry for each file that cannot be read. The key is the index of the file in `paths`. The value
        is the reason why the file cannot be read.
    """
    if verify not in VERIFY:
        raise ValueError(f"verify={verify!r}: expected one of {', '.join(map(repr, VERIFY))}")
    full = verify == "full"
    seal = _seal(paths) if full and len(paths) >= _REMEMBERED_FROM else None
    with suppress(OSError):
        if seal is not None and seal.is_file():
            return {}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        answers = pool.map(lambda path: fault(path, full=full), paths)
        bar = tqdm(
            answers,
            total=len(paths),
            desc="checking images",
            unit="image",
            delay=2,
            leave=False,
            disable=None if progress else True,
        )
        faults = {i: answer for i, answer in enumerate(bar) if answer is not None}
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for the remaining files
    if seal is not None and not faults:
        with suppress(OSError):  # without a writable folder, the next run checks the files again
            seal.parent.mkdir(parents=True, exist_ok=True)
            seal.touch()
    return faults


def _seal(paths: Sequence[Path]) -> Path | None:
    """Return the path of the record that `find_faults` creates after it has decoded all of `paths` without a fault.

    The record is an empty file, so only its name matters: a hash of the path, size and modification time of every file
    of `paths`. Return None if the user has no cache folder or if a file of `paths` is missing. If the result is
    None, `find_faults` decodes all files and records nothing; it also reports each missing file.
    """
    listing = hashlib.sha256()
    try:
        for path in paths:
            state = path.stat()
            listing.update(
                f"{path.absolute()}\0{state.st_size}\0{state.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except (OSError, RuntimeError):  # RuntimeError: the home folder is unknown
        return None
    return cache / "srm-iqa" / "verified" / listing.hexdigest() if cache.is_absolute() else None


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata; the image itself may be readable
        return 1
    return orientation


def _reason(error: Exception) -> str:
    if isinstance(error, _TOO_LARGE):
        limit = int(2 * (Image.MAX_IMAGE_PIXELS or 0))
        return (
            f"it has more than {limit:,} pixels; --max-pixels of srm-iqa, or PIL.Image.MAX_IMAGE_PIXELS in Python, "
            "changes this limit"
        )
    if isinstance(error, UnidentifiedImageError):
        return "its format is not known"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    return (str(error).splitlines() or [type(error).__name__])[0]
