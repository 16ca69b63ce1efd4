"""Any folder of images with a table of scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from srm_model.config import SRMConfig
from srm_model.data.base import Entry, Faults, ImageQualityDataset, Row, find_images, parse_mos
from srm_model.data.lists import number, records

SPLIT = "test"


def labelled_images(
    folder: str | Path,
    table: str | Path,
    *,
    image_column: str | None = None,
    score_column: str | None = None,
    label_range: tuple[float, float] | None = None,
    image_size: int = SRMConfig.image_size,
    progress: bool = False,
) -> ImageQualityDataset:
    """Return the images of a folder that a table gives scores for, all in one split "test".

    Args:
        folder: holds the images.
        table: has a header, and a row for each image: comma, semicolon, tab or | between the fields.
        image_column: names the files. Default: the one column whose entries are all files of the folder.
        score_column: holds numbers, higher is better. Default: the one other column of numbers.
        label_range: worst and best score, which become 0 and 1. Default: the least and the largest in the table.
        image_size: side of the square that is scored, in pixels; see `load_image`.
        progress: show a bar while the images are checked.

    Raises:
        ValueError: a column cannot be found or is one of several candidates; a row has no image or no number; an
            image cannot be read; all scores are the same.
    """
    folder, table = Path(folder), Path(table)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    listed = records(table)
    if not listed:
        raise ValueError(f"{table}: no rows below the header")
    columns = list(listed[0][1])
    on_disk = {path.name.casefold() for path in folder.iterdir()}
    image_column = _column(
        table,
        columns,
        image_column,
        [
            name
            for name in columns
            if all(row.get(name, "").strip().casefold() in on_disk for _, row in listed)
        ],
        f"names a file of {folder} in every row",
        "--image-column",
    )
    score_column = _column(
        table,
        columns,
        score_column,
        [
            name
            for name in columns
            if name != image_column and all(_is_number(row.get(name, "")) for _, row in listed)
        ],
        "has a number in every row",
        "--score-column",
    )
    faults, rows = Faults(table), []
    faults.rows = len(listed)
    low, high = label_range or (-np.inf, np.inf)
    for line, row in listed:
        name = row.get(image_column, "").strip()
        try:
            rows.append(Row(line, name, parse_mos(row.get(score_column, ""), low, high), SPLIT))
        except ValueError as error:
            faults.add(line, "unusable", f"{name}: {error}")
    entries = find_images(rows, folder, faults, verify="full", progress=progress)
    return ImageQualityDataset(
        folder.resolve().name,
        folder,
        SPLIT,
        entries,
        {SPLIT: SPLIT},
        labels=f"scores of {table.name}, column {score_column}",
        label_range=label_range or _range_of(table, entries),
        seed=0,
        image_size=image_size,
        train=False,
        cache=False,
    )


def _column(
    table: Path, columns: Sequence[str], asked: str | None, candidates: Sequence[str], what: str, option: str
) -> str:
    """The column that was asked for, or the only candidate."""
    has = f"{table} has the columns {', '.join(columns)}"
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"{option} {asked}: {has}")
        return asked
    if len(candidates) != 1:
        found = f"each of {', '.join(candidates)}" if candidates else "none of them"
        raise ValueError(f"{has}; {found} {what}; name one with {option}")
    return candidates[0]


def _is_number(text: str) -> bool:
    try:
        number(text)
    except ValueError:
        return False
    return True


def _range_of(table: Path, entries: Sequence[Entry]) -> tuple[float, float]:
    labels = [entry.mos for entry in entries]
    low, high = min(labels), max(labels)
    if low == high:
        raise ValueError(f"{table}: all scores are {low:g}; expected scores that differ")
    return low, high
