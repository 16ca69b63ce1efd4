"""Where the references of a synthesised set come from: a folder of photographs, or those in installed packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from srm_model.data.images import Pixels, decoded

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class Photograph(NamedTuple):
    """A photograph to be distorted; `pixels` are (H, W, 3) uint8."""

    file: str
    source: str
    licence: str
    pixels: Pixels


class _Packaged(NamedTuple):
    package: str
    distribution: str
    file: str
    licence: str


_CC_BY = "CC BY 2.0, https://creativecommons.org/licenses/by/2.0/"
_PACKAGED = (
    _Packaged("skimage", "scikit-image", "data/astronaut.png", "NASA, public domain"),
    _Packaged("skimage", "scikit-image", "data/chelsea.png", "CC0, Stefan van der Walt"),
    _Packaged("skimage", "scikit-image", "data/coffee.png", "CC0, Rachel Michetti"),
    _Packaged("skimage", "scikit-image", "data/motorcycle_left.png", "Middlebury 2014 stereo benchmark"),
    _Packaged("skimage", "scikit-image", "data/rocket.jpg", "SpaceX, public domain"),
    _Packaged("sklearn", "scikit-learn", "datasets/images/china.jpg", f"danielbuechele, {_CC_BY}"),
    _Packaged("sklearn", "scikit-learn", "datasets/images/flower.jpg", f"vultilion, {_CC_BY}"),
)
"""Each another scene; scikit-image's motorcycle_right shows the same one as motorcycle_left."""


class Frame(NamedTuple):
    """What is kept of a photograph: its centre square at `image_size`, its centre at `crop` (width, height), or all."""

    image_size: int | None = None
    crop: tuple[int, int] | None = None

    def __call__(self, path: Path) -> Pixels:
        """Return the kept pixels of the photograph at `path`, (H, W, 3); ValueError where it is too small."""
        with decoded(path) as picture:
            box = self._box(*picture.size)
            if box is not None and (self.crop is not None or self.image_size is None):
                return np.asarray(picture.part(*box))
            if box is not None and self.image_size is not None:
                return np.asarray(picture.resized((self.image_size, self.image_size), box))
        width, height = picture.size
        least = (
            f"image_size {self.image_size}; enlarging a reference would blur it"
            if self.crop is None
            else f"the crop {self.crop[0]}×{self.crop[1]}"
        )
        raise ValueError(f"{path}: {width}×{height} is smaller than {least}")

    def _box(self, width: int, height: int) -> tuple[int, int, int, int] | None:
        """What is kept of a picture of this size, before it is resized; None where the picture is too small."""
        if self.crop is not None:
            kept, least = self.crop, self.crop
        elif self.image_size is not None:
            side = min(width, height)
            kept, least = (side, side), (self.image_size, self.image_size)
        else:
            kept, least = (width, height), (1, 1)
        if width < least[0] or height < least[1]:
            return None
        left, top = (width - kept[0]) // 2, (height - kept[1]) // 2
        return left, top, left + kept[0], top + kept[1]


def from_packages(frame: Frame) -> list[Photograph]:
    """The seven photographs that scikit-image and scikit-learn carry, found without importing them or a network.

    A package that is not installed, or that has not got its file, is a ValueError that names it.
    """
    found = []
    for package, distribution, file, licence in _PACKAGED:
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
        if path is None or not path.exists():
            raise ValueError(
                f"the photographs of the package {distribution} are not here ({file}); pip install 'srm-iqa[demo]', "
                "or give a folder of photographs"
            )
        source = f"{distribution} {importlib.metadata.version(distribution)}"
        found.append(Photograph(path.name, source, licence, frame(path)))
    return found


def from_folder(folder: Path, frame: Frame) -> list[Photograph]:
    """The photographs that lie directly in `folder`, in the order of their names; folders within are not entered.

    Files are taken by suffix (PNG, JPEG, BMP, TIFF, WebP; others and hidden files are passed over). One that cannot
    be read, or that is smaller than the frame, is a ValueError with the first such file and the count of all.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of photographs")
    paths = sorted(
        (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != "."),
        key=lambda path: (path.name.casefold(), path.name),
    )
    found, faults = [], []
    for path in paths:
        try:
            found.append(Photograph(path.name, folder.name, "not stated", frame(path)))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(f"{faults[0]} ({len(faults)} of {len(paths)} photographs cannot be used)")
    return found
