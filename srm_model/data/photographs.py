"""Load the reference photographs of a synthesised dataset from a folder or from installed packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from srm_model.data.images import Pixels, decoded

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class Photograph(NamedTuple):
    """A photograph to distort. Its pixels are (H, W, 3) uint8."""

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
"""Photographs of different scenes. scikit-image's motorcycle_right shows the scene of motorcycle_left."""


class Frame(NamedTuple):
    """The part of a photograph that is kept.

    If `crop` is given, the centre crop with this width and height is kept. If only `image_size` is given, the central
    square is kept and resized to `image_size`×`image_size`. If both are None, the whole photograph is kept.
    """

    image_size: int | None = None
    crop: tuple[int, int] | None = None

    def __call__(self, path: Path) -> Pixels:
        """Load the part of a photograph that the frame keeps, (H, W, 3) uint8.

        Raises:
            ValueError: The photograph is too small.
        """
        with decoded(path) as picture:
            width, height = picture.size
            kept = picture.size
            size: tuple[int, int] | None = None
            if self.crop is not None:
                kept, required = self.crop, f"the crop {self.crop[0]}×{self.crop[1]}"
            elif self.image_size is not None:
                kept, size = (min(kept), min(kept)), (self.image_size, self.image_size)
                required = f"image_size {self.image_size}; enlarging a reference would blur it"
            least = size or kept
            if width >= least[0] and height >= least[1]:
                left, top = (width - kept[0]) // 2, (height - kept[1]) // 2
                box = left, top, left + kept[0], top + kept[1]
                return np.asarray(picture.part(*box) if size is None else picture.resized(size, box))
        raise ValueError(f"{path}: {width}×{height} is smaller than {required}")


def from_packages(frame: Frame) -> list[Photograph]:
    """Return seven photographs that scikit-image and scikit-learn contain, without importing either package.

    Raises:
        ValueError: A package is not installed, or the installed package lacks a photograph.
    """
    found = []
    for package, distribution, file, licence in _PACKAGED:
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
        if path is None or not path.exists():
            raise ValueError(
                f"{file} of the package {distribution} is not installed; run pip install 'srm-iqa[demo]', or name a "
                "folder of photographs"
            )
        source = f"{distribution} {importlib.metadata.version(distribution)}"
        found.append(Photograph(path.name, source, licence, frame(path)))
    return found


def from_folder(folder: Path, frame: Frame) -> list[Photograph]:
    """Return the photographs of a folder in the order of their names.

    Subfolders, hidden files and files whose suffix is not in `SUFFIXES` are ignored.

    Raises:
        ValueError: `folder` is not a folder, or photographs cannot be read or are too small. For faulty photographs,
            the message names the first one and says how many are faulty.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a folder of photographs")
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
