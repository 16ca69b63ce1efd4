"""Label each synthesised image with the opinion score of the TID2013 image with the same photograph and distortion.

The references 1 to 24 of TID2013 are crops of the photographs of the Kodak dataset. An image that is synthesised from a
Kodak photograph therefore gets the mean opinion score of the TID2013 image with the same photograph, distortion type
and level.
"""

from __future__ import annotations

import re
from pathlib import Path

from srm_model.data.base import parse_mos
from srm_model.data.lists import read_list
from srm_model.data.tid2013 import LINE, MOS_RANGE

SOURCE = "TID2013"
CROP = (512, 384)  # size of TID2013's images in pixels
PHOTOGRAPHS = 24  # TID2013's reference 25 is not a photograph
# Types that are left out by default: mean shift, contrast and saturation. People do not judge these types by the size
# of the error. The opinions of TID2013 do not fit the synthesised images of these types (docs/DATASETS.md).
LEFT_OUT = (16, 17, 18)
_NUMBER = re.compile(r"\D*0*(\d{1,2})")
_NAME = re.compile(r"i(\d+)_(\d+)_(\d+)\.bmp", re.IGNORECASE)
Key = tuple[int, int, int]  # photograph, type, level


def read_opinions(path: str | Path) -> dict[Key, float]:
    """Read TID2013's `mos_with_names.txt`; return the mean opinion score of every (photograph, type, level).

    Raises:
        ValueError: The file cannot be read or has no scores, a line does not consist of a score from 0 to 9 and an
            image name, or an image is listed twice.
    """
    path = Path(path)
    found: dict[Key, float] = {}
    for number, line in enumerate(read_list(path).splitlines(), 1):
        if not line.strip():
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path}, line {number}: {line.strip()[:80]!r}: expected a score and a name like i01_02_3.bmp"
            )
        key = key_of(match["name"])
        if key in found:
            raise ValueError(f"{path}, line {number}: {match['name']} is listed twice")
        try:
            found[key] = parse_mos(match["score"], *MOS_RANGE)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path}: no scores; expected TID2013's mos_with_names.txt")
    return found


def key_of(name: str) -> Key:
    """Parse photograph, type and level from the name of an image, such as i01_02_3.bmp."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r}: expected a name like i01_02_3.bmp")
    return int(match[1]), int(match[2]), int(match[3])


def number_of(file: str) -> int:
    """Return the number of a Kodak photograph from its file name: 1.png, kodim01.png and I01.BMP are number 1.

    Raises:
        ValueError: The name has no number, or the number is not one of the 24 photographs.
    """
    match = _NUMBER.fullmatch(Path(file).stem)
    if match is None:
        raise ValueError(
            f"{file}: has no number in its name; expected a name like 1.png, kodim01.png or I01.BMP"
        )
    if not 1 <= int(match[1]) <= PHOTOGRAPHS:
        raise ValueError(f"{file}: is not a Kodak photograph; expected a number from 1 to {PHOTOGRAPHS}")
    return int(match[1])
