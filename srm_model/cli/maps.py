"""`srm-iqa score --map`: choose the files of the maps, and write them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from srm_model import runs
from srm_model.files import check_folder
from srm_model.quality_map import quality_map
from srm_model.reports.maps import draw_map

CAPTION = (
    "Gradient-free occlusion: each of {windows} overlapping windows is replaced by {parts} other parts of the same "
    "image.\nRed: the score {worse}, so the model sees a loss of quality here. Blue: the score {better}. The model can "
    "be wrong.\nDamage that covers the whole image does not show."
)


class Maps:
    """Write a map for each image, to one file or into a folder.

    Args:
        out: PNG file for one image; folder for several images.
        names: Images and folders that are named on the command line.
        more: Whether further images are named in a list file.

    Raises:
        ValueError: `out` does not fit the number of images. If several images may be scored, `out` must be a folder.
            For one image, `out` must be a name that ends in .png, or a folder that exists.
    """

    def __init__(self, out: str, names: Sequence[str], *, more: bool) -> None:
        self._out, self._used = Path(out), set[str]()
        self._several = more or len(names) != 1 or os.path.isdir(names[0])  # noqa: PTH112, names may have NUL bytes
        is_picture = self._out.suffix.lower() == ".png" and not self._out.is_dir()
        if self._several and is_picture:
            raise ValueError(f"--map {out}: expected a folder, because several images may be scored")
        if not self._several and not is_picture and not self._out.is_dir():
            raise ValueError(f"--map {out}: expected a name that ends in .png, or a folder that exists")
        check_folder(self._out.parent if is_picture else self._out)

    def write(
        self,
        model: Any,
        image: Tensor,
        source: str,
        *,
        name: str,
        batch_size: int,
        progress: bool,
        lower_is_better: bool = False,
    ) -> Path:
        """Write the map of an image, and return its path.

        If `lower_is_better` is true, the map shows where the score falls, because there quality is lost.

        Raises:
            ValueError: The map would replace the image itself, or a score is not finite.
            OSError: The file cannot be written.
        """
        path = self._path(source)
        if path.exists() and path.samefile(source):
            raise ValueError(f"--map {path}: is the image itself; expected another name")
        found = quality_map(model, image, batch_size=batch_size, progress=runs.bars(progress))
        pixels = image.permute(1, 2, 0).numpy()
        worse, better = ("falls", "rises") if lower_is_better else ("rises", "falls")
        caption = CAPTION.format(windows=found.windows, parts=found.parts, worse=worse, better=better)
        draw_map(
            path,
            pixels,
            found.change,
            score=found.score,
            caption=caption,
            model=name,
            lower_is_better=lower_is_better,
        )
        return path

    def _path(self, source: str) -> Path:
        """Return the path of the map of the image `source`.

        If maps are written to a folder, the map of photo.jpg is photo.jpg.map.png. Images from different folders may
        have the same name. The map of the second photo.jpg is then photo.jpg-2.map.png, the map of the third one is
        photo.jpg-3.map.png, and so on.
        """
        if not self._several and not self._out.is_dir():
            return self._out
        base, number = Path(source).name, 1
        name = f"{base}.map.png"
        while name in self._used:  # images in different folders may have the same name
            number += 1
            name = f"{base}-{number}.map.png"
        self._used.add(name)
        return self._out / name
