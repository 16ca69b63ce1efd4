"""Make a dataset from a folder of images and a table of scores."""

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
    """Return a dataset of the images that are listed in a table of scores. All images are in the split "test".

    Args:
        folder: Folder of the images.
        table: File with a header and one row per image. A comma, semicolon, tab or | separates the fields.
        image_column: Column of file names. Default: the only column whose entries are all names of files in the folder.
        score_column: Column of scores, higher is better. Default: the only other column that has a number in every row.
        label_range: Worst and best score. Normalisation maps them to 0 and 1. Default: the lowest and the highest score
            in the table.
        image_size: Side in pixels of the square images of the dataset, as in `load_image`.
        progress: Whether to show a progress bar while images are checked.

    Raises:
        ValueError: `label_range` is not two finite numbers in ascending order; the table does not exist or has no
            header; the image column or the score column is not found or is ambiguous; the image of a row is missing,
            ambiguous, listed twice or not readable; a score is not a finite number or is outside `label_range`; or all
            scores are equal and `label_range` is None.
    """
    folder, table = Path(folder), Path(table)
    if label_range is not None and not -np.inf < label_range[0] < label_range[1] < np.inf:
        low, high = label_range
        raise ValueError(
            f"--label-range {low:g} {high:g}: expected the worst score, then the best score, which is the higher number"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a folder of images")
    if not table.is_file():
        raise ValueError(f"{table}: no such file; expected a table of scores")
    listed = records(table)
    if not listed:
        raise ValueError(f"{table}: has no rows below the header")
    columns = {name: [row.get(name, "").strip() for _, row in listed] for name in listed[0][1]}
    on_disk = {path.name.casefold() for path in folder.iterdir()}
    for name in columns:
        if name.casefold() in on_disk:
            raise ValueError(f"{table}: the first line names the image {name}; expected a header")
    named = [name for name, texts in columns.items() if {text.casefold() for text in texts} <= on_disk]
    if image_column is None and not named:
        _check_missing(table, columns, folder, on_disk)
    what = f"names a file of {folder} in every row"
    image_column = _column(table, columns, image_column, named, what, "--image-column")
    scored = [name for name, texts in columns.items() if name != image_column and all(map(_is_number, texts))]
    what = "has a number in every row"
    score_column = _column(table, columns, score_column, scored, what, "--score-column")
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


def _check_missing(table: Path, columns: dict[str, list[str]], folder: Path, on_disk: set[str]) -> None:
    """Raise ValueError if a column names some images of the folder, and others that are missing."""
    for name, texts in columns.items():
        missing = [text for text in texts if text.casefold() not in on_disk]
        if len(missing) < len(texts):
            raise ValueError(f"{table}, column {name}: {missing[0]} is not in {folder}")


def _column(
    table: Path,
    columns: dict[str, list[str]],
    asked: str | None,
    candidates: Sequence[str],
    what: str,
    option: str,
) -> str:
    has = f"{table} has the columns {', '.join(columns)}"
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"{option} {asked}: {has}")
        return asked
    if not candidates:
        texts = next(iter(columns.values()))
        raise ValueError(f"{has}; none of them {what} (the first row begins with {texts[0]!r})")
    if len(candidates) > 1:
        raise ValueError(f"{has}; each of {', '.join(candidates)} {what}; choose one with {option}")
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
        raise ValueError(f"{table}: all scores are {low:g}; expected different scores")
    return low, high
