"""Synthesise datasets in TID2013's layout from any photographs, with labels from a metric or from TID2013."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from srm_model.config import SRMConfig
from srm_model.data import opinions as people
from srm_model.data.images import Pixels, open_rgb
from srm_model.data.labels import LABEL_RANGE, METRICS, import_piq, metric_labels
from srm_model.data.lists import read_list
from srm_model.data.photographs import SUFFIXES, Frame, Photograph, from_folder, from_packages
from srm_model.data.tid2013 import HIGHER_IS_BETTER, IMAGES, LABELS, LABELS_FORMAT, LIST, REFERENCES
from srm_model.files import LOCK, atomic_path, make_folder, read_json, write_json, write_text

MAX_REFERENCES = 99  # two digits in TID2013's names
MIN_REFERENCES = 3  # one each for train, val and test
# Tolerance of given labels, on the scale 0 to 9. Labels from processors with and without AVX2 differ by up to 5e-5.
LABEL_TOLERANCE = 1e-3
_JOURNAL = f"{LIST}.partial"
_LINE = re.compile(r"(\d\.\d{5}) (i\d\d_\d\d_\d\.bmp)\n")
_LIBRARIES = ("numpy", "pillow", "scipy", "scikit-image", "piq", "torch")


class _Task(NamedTuple):
    """One reference and one type of distortion."""

    reference: int
    kind: int

    def name(self, level: int) -> str:
        return f"i{self.reference:02}_{self.kind:02}_{level}.bmp"


def synthesize(
    out: str | Path,
    *,
    photographs: str | Path | None = None,
    packaged: bool | None = None,
    image_size: int | None = None,
    crop: tuple[int, int] | None = None,
    types: Iterable[int] | None = None,
    levels: Iterable[int] = range(1, 6),
    seed: int = SRMConfig.seed,
    metric: str | None = None,
    opinions: str | Path | None = None,
    labels: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Make a dataset in TID2013's layout from photographs.

    The dataset has these files:

    - `reference_images/IRR.BMP` and `distorted_images/iRR_TT_L.bmp`: the images. RR is the number of the reference
      image, TT is the number of the distortion type, and L is the level of the distortion;
    - `mos_with_names.txt`: the list of labels;
    - `labels.json`: the kind of the labels, the settings and the library versions;
    - `references.json`: the origin of the photographs.

    Each file is written atomically, and `mos_with_names.txt` is written last. To resume after an interruption, repeat
    the call.

    Args:
        out: Folder of the dataset.
        photographs: Folder with 3 to 99 images (PNG, JPEG, BMP, TIFF, WebP). Subfolders are ignored. No two images may
            show the same scene, because datasets are split by reference.
        packaged: Whether to add the seven photographs of scikit-image and scikit-learn after the images of the folder.
            Default: True if `photographs` and `opinions` are None, otherwise False.
        image_size: Side in pixels to which the central square of each photograph is resized. None: do not resize.
        crop: Width and height in pixels of the centre crop of each photograph, instead of `image_size`. With `opinions`
            and without `image_size` the default is 512×384, the size of TID2013's images.
        types: Types of distortion, 1 to 24 (see `srm_model.data.distortions`). Default: all types; with `opinions`, all
            except 16, 17 and 18 (mean shift, contrast and saturation).
        levels: Levels of distortion, 1 to 5.
        seed: Seed of the distortions. Each image depends only on the seed, its reference, its type and its level.
        metric: Full-reference metric of piq that gives the labels: "vsi" (default), "fsim", "ssim" or "haarpsi". The
            values of the metric are mapped to labels from 0 to 9; `labels.json` has the formula. The attribute `labels`
            of the opened dataset is "metric:<name>".
        opinions: Path of TID2013's `mos_with_names.txt`, instead of a metric. Each image gets the opinion score of the
            TID2013 image with the same photograph, type and level. The file name of each photograph must contain
            the number of the photograph in TID2013, for example kodim01.png for number 1. The distorted images are
            computed by this package, so they are only similar to the images that people rated. The attribute `labels`
            of the opened dataset is "opinions:TID2013".
        labels: Path of the `mos_with_names.txt` that the same call without `labels` wrote on another machine. The last
            digits of computed labels depend on the processor. The labels in this file therefore replace the computed
            labels, so that the datasets on both machines have the same fingerprint. Not accepted with `opinions`.
        progress: Whether to show a progress bar on stderr.

    Returns:
        `out`, which `TID2013(out, split)` opens.

    Raises:
        ValueError: An argument or a photograph is not accepted, a required package is not installed, or a label in the
            file `labels` differs from the computed label by more than 0.001. The error is also raised if `out` contains
            a dataset with other settings, or an unfinished dataset that was started with other library versions.
    """
    out = Path(out)
    if types is None:
        types = [kind for kind in range(1, 25) if opinions is None or kind not in people.LEFT_OUT]
    types, levels = _choice("types", types, 24), _choice("levels", levels, 5)
    if opinions is not None and (metric is not None or labels is not None or packaged):
        raise ValueError(
            "opinions was given with metric, labels or packaged; expected opinions without these, because opinions "
            "label only the photographs of the folder"
        )
    if opinions is None:
        metric = "vsi" if metric is None else metric
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r}: expected one of {', '.join(map(repr, METRICS))}")
        import_piq()
    if seed < 0:
        raise ValueError(f"seed {seed}: expected zero or more")
    distortions = _import_distortions()
    if crop is not None and image_size is not None:
        raise ValueError(f"crop {crop} and image_size {image_size}: expected one of them")
    if opinions is not None and image_size is None and crop is None:
        crop = people.CROP
    given = None if labels is None else _given_labels(Path(labels))
    photos = _photographs(
        photographs,
        photographs is None and opinions is None if packaged is None else packaged,
        Frame(image_size, crop),
        distortions.MIN_SIDE,
    )
    references = dict(enumerate(photos, 1)) if opinions is None else _numbered(photos)
    settings: dict[str, Any] = {
        "definition": distortions.DEFINITION,
        "seed": seed,
        "image_size": image_size,
        "types": types,
        "levels": levels,
        "photographs": [f"{photo.file} {_digest(photo.pixels)[:12]}" for photo in references.values()],
    }
    settings |= {"crop": list(crop)} if crop else {}
    if metric is not None:
        settings["metric"] = metric
    if given is not None:
        settings["labels"] = hashlib.sha256(_lines(given).encode()).hexdigest()
    tasks = [_Task(reference, kind) for reference in references for kind in types]
    names = [task.name(level) for task in tasks for level in levels]
    if given is not None and given.keys() != set(names):
        raise ValueError(
            f"{labels}: has labels of {len(given)} images; {len(given.keys() & set(names))} of these are among the "
            f"{len(names)} images of this dataset; expected a label for each image of this dataset and no others"
        )
    scores: dict[str, float] | None = None
    if opinions is not None:
        scores = _opinions_of(Path(opinions), names)
        settings["opinions"] = hashlib.sha256(_lines(scores).encode()).hexdigest()
    other_versions = _claim(out, settings, metric)
    known = _read_labels(out)
    on_disk = {path.name for path in (out / IMAGES).glob("*.bmp")}
    done = known.keys() & on_disk
    todo = [task for task in tasks if not {task.name(level) for level in levels} <= done]
    if todo or not (out / LIST).exists():
        if other_versions:
            raise ValueError(
                f"{out}: started with {other_versions}; expected the versions of the first run, or another folder"
            )
        _lay_out(out, references, known)
        total = len(tasks) * len(levels)
        bar = tqdm(
            desc="distorting",
            unit="image",
            total=total,
            initial=total - len(todo) * len(levels),
            disable=not progress,
        )
        with bar:
            for task, values in _run(out, todo, references, levels, seed, metric):
                here = [task.name(level) for level in levels]
                lines = (
                    dict(zip(here, values, strict=True)) if scores is None else {n: scores[n] for n in here}
                )
                if given is not None:
                    lines = _as_given(Path(str(labels)), given, lines)
                _append(out, lines)
                known |= lines
                bar.update(len(levels))
        write_text(out / LIST, _lines({name: known[name] for name in names}))
        (out / _JOURNAL).unlink(missing_ok=True)
    return out


def _given_labels(path: Path) -> dict[str, float]:
    """Read a list of labels into a dict by image name; raise ValueError for a malformed line or a repeated name."""
    given: dict[str, float] = {}
    for number, line in enumerate(read_list(path).splitlines(), 1):
        match = _LINE.fullmatch(f"{line}\n")
        if not match or match[2] in given:
            raise ValueError(
                f"{path}, line {number}: {line.strip()!r}: expected a label and the name of an image, no image twice"
            )
        given[match[2]] = float(match[1])
    return given


def _as_given(path: Path, given: dict[str, float], lines: dict[str, float]) -> dict[str, float]:
    """Replace computed labels by given labels: return a dict with the names of `lines` and the labels of `given`.

    `lines` has the computed labels by image name. Error messages name `path`, the file of the given labels.

    Raises:
        ValueError: A given label differs from the computed label by more than `LABEL_TOLERANCE`.
    """
    for name, label in lines.items():
        if abs(given[name] - label) > LABEL_TOLERANCE:
            raise ValueError(
                f"{path}: {name} has the label {given[name]:.5f}, and the metric gives {label:.5f} here; expected "
                "labels of the same photographs, settings and versions"
            )
    return {name: given[name] for name in lines}


def _choice(name: str, values: Iterable[int], count: int) -> list[int]:
    chosen = sorted(values)
    if not chosen or not set(chosen) <= set(range(1, count + 1)) or len(set(chosen)) < len(chosen):
        raise ValueError(f"{name} {chosen}: expected distinct numbers from 1 to {count}")
    return chosen


def _import_distortions() -> ModuleType:
    try:
        from srm_model.data import distortions
    except ImportError as error:
        raise ValueError(f"distortions need scipy ({error}); pip install 'srm-iqa[demo]'") from None
    return distortions


def _numbered(photographs: Sequence[Photograph]) -> dict[int, Photograph]:
    """Return a dict of the photographs by the number in their file names, sorted by this number."""
    found: dict[int, Photograph] = {}
    for photo in photographs:
        number = people.number_of(photo.file)
        if number in found:
            raise ValueError(
                f"{found[number].file} and {photo.file} are both photograph {number}; expected one"
            )
        found[number] = photo
    return dict(sorted(found.items()))


def _opinions_of(path: Path, names: Sequence[str]) -> dict[str, float]:
    """Return the opinion score of each image by name; raise ValueError if the file lacks the score of an image."""
    known = people.read_opinions(path)
    missing = [name for name in names if people.key_of(name) not in known]
    if missing:
        raise ValueError(
            f"{path}: no opinion for {len(missing)} of {len(names)} images, such as {missing[0]}; the file has "
            f"opinions of photographs {_spans(key[0] for key in known)}, types {_spans(key[1] for key in known)} and "
            f"levels {_spans(key[2] for key in known)}"
        )
    return {name: known[people.key_of(name)] for name in names}


def _spans(numbers: Iterable[int]) -> str:
    """Format numbers as ranges, such as "1 to 3, 5"."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def _photographs(folder: str | Path | None, packaged: bool, frame: Frame, min_side: int) -> list[Photograph]:
    """Load the photographs; raise ValueError if there are too few or too many, one is too small, or two are equal."""
    if frame.image_size is not None and frame.image_size < min_side:
        raise ValueError(f"image_size {frame.image_size}: expected at least {min_side}, or None")
    if frame.crop is not None and min(frame.crop) < min_side:
        raise ValueError(f"crop {frame.crop[0]}×{frame.crop[1]}: expected sides of at least {min_side}")
    if folder is None and not packaged:
        raise ValueError(
            "no photographs were given; expected a folder of photographs, or those of scikit-image and scikit-learn"
        )
    photographs = [] if folder is None else from_folder(Path(folder), frame)
    if packaged:
        photographs += from_packages(frame)
    if not MIN_REFERENCES <= len(photographs) <= MAX_REFERENCES:
        raise ValueError(
            f"{folder}: found {len(photographs)} photographs ({', '.join(SUFFIXES)}) in this folder (subfolders are "
            f"ignored){' and in packages' if packaged else ''}; expected {MIN_REFERENCES} to {MAX_REFERENCES}"
        )
    seen: dict[str, str] = {}
    for photo in photographs:
        height, width = photo.pixels.shape[:2]
        if min(height, width) < min_side:
            raise ValueError(f"{photo.file}: {width}×{height}: expected sides of at least {min_side}")
        other = seen.setdefault(_digest(photo.pixels), photo.file)
        if other != photo.file:
            raise ValueError(
                f"{photo.file} and {other} are the same picture; as two references they could fall into two splits"
            )
    return photographs


def _described(metric: str | None) -> dict[str, str]:
    """Return the description of the labels for `labels.json`."""
    if metric is not None:
        return {
            "metric": metric,
            "map": METRICS[metric].formula(metric),
            "note": f"Computed by the full-reference metric {metric} of piq against the undistorted photograph. "
            "These are not the opinions of people.",
        }
    return {
        "opinions": people.SOURCE,
        "note": f"People's opinions of similar images: the mean opinion scores that {people.SOURCE} has for its "
        "images of the same photograph, type and level. These images were made again and differ from those that people "
        f"saw; this dataset is not {people.SOURCE}.",
    }


def _claim(out: Path, settings: dict[str, Any], metric: str | None) -> str:
    """Write the settings to `labels.json`, or compare them with the settings in an existing `labels.json`.

    Returns:
        A text that lists the libraries whose versions differ from those in an existing `labels.json`, with both
        versions. The text is empty if no version differs.

    Raises:
        ValueError: `out` is a file, a folder that contains files but no synthesised dataset, or the folder of a dataset
            whose settings differ from `settings`.
    """
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    if not (out / LABELS).exists():
        if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
            raise ValueError(
                f"{out}: not an empty folder, nor one with a synthesised dataset; give another folder"
            )
        description = {
            "format": LABELS_FORMAT,
            "range": list(LABEL_RANGE),
            "direction": HIGHER_IS_BETTER,
            **_described(metric),
            "settings": settings,
            "versions": versions,
        }
        write_json(out / LABELS, description)
        return ""
    there = read_json(out / LABELS)
    if not isinstance(there, dict) or not isinstance(there.get("settings"), dict):
        raise ValueError(f"{out / LABELS}: not written by this program; give another folder")
    optional = dict.fromkeys(("labels", "crop", "metric", "opinions"))
    differences = _differences(there["settings"], optional | settings)
    if differences:
        raise ValueError(f"{out} holds a set with {differences}; give another folder, or the same settings")
    return _differences(there.get("versions", {}), versions)


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    return ", ".join(
        f"other {key}" if key == "photographs" else f"{key} {there.get(key)} instead of {value}"
        for key, value in here.items()
        if there.get(key) != value
    )


def _read_labels(out: Path) -> dict[str, float]:
    """Read the labels of finished images from `mos_with_names.txt` and its journal; skip an incomplete last line."""
    labels = {}
    for path in (out / LIST, out / _JOURNAL):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines(keepends=True):
            match = _LINE.fullmatch(line)
            if match:
                labels[match[2]] = float(match[1])
    return labels


def _lay_out(out: Path, references: dict[int, Photograph], labels: dict[str, float]) -> None:
    """Write the reference images, `references.json` and the journal of labels.

    Existing reference images are kept. `references.json` and the journal are always rewritten. Temporary files that a
    killed process left are removed.
    """
    make_folder(out / IMAGES)
    for leftover in out.glob("*/.*.partial.*"):  # a file of a process that was killed
        leftover.unlink()
    origin = []
    for number, photo in references.items():
        path = out / "reference_images" / f"I{number:02}.BMP"
        if not path.exists():
            _write_bmp(path, photo.pixels)
        origin.append(
            {
                "reference": path.name,
                "file": photo.file,
                "source": photo.source,
                "licence": photo.licence,
                "pixels": f"sha256 {_digest(photo.pixels)}",
            }
        )
    write_json(out / REFERENCES, origin)
    write_text(out / _JOURNAL, _lines(labels))


def _run(
    out: Path,
    tasks: list[_Task],
    references: dict[int, Photograph],
    levels: list[int],
    seed: int,
    metric: str | None,
) -> Iterator[tuple[_Task, list[float]]]:
    """Run the tasks on all cores and yield each finished task with its labels."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        futures = {
            pool.submit(_distort, out, task, references[task.reference].pixels, levels, seed, metric): task
            for task in tasks
        }
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _distort(
    out: Path, task: _Task, reference: Pixels, levels: list[int], seed: int, metric: str | None
) -> list[float]:
    """Write the missing images of a task. Return the labels of all images of the task; without a metric, return []."""
    from srm_model.data.distortions import DISTORTIONS

    images = []
    for level in levels:
        path = out / IMAGES / task.name(level)
        if path.exists():
            if metric is not None:
                images.append(np.asarray(open_rgb(path)))
            continue
        rng = np.random.default_rng([seed, task.reference, task.kind, level])
        images.append(DISTORTIONS[task.kind](reference, level, rng))
        _write_bmp(path, images[-1])
    return [] if metric is None else metric_labels(metric, images, reference)


def _append(out: Path, labels: dict[str, float]) -> None:
    with (out / _JOURNAL).open("a", encoding="utf-8", newline="\n") as journal:
        journal.write(_lines(labels))


def _lines(labels: dict[str, float]) -> str:
    return "".join(f"{label:.5f} {name}\n" for name, label in labels.items())


def _write_bmp(path: Path, pixels: Pixels) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, "BMP")


def _digest(pixels: Pixels) -> str:
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
