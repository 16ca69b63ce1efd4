"""Correlate metrics of distorted Kodak photographs with mean opinion scores (MOS): `python -m bench.opinions`.

The photographs are distorted by the same functions as in `srm-iqa data synthesize --opinions`. Three
full-reference metrics of piq score the distorted images: VSI, FSIM and SSIM. FSIM and SSIM are computed on
the luminance, and SSIM is computed without downsampling, because the published correlations for TID2013 were
computed in this way. A result row belongs to one photograph and one distortion type. For each of the five
distortion levels, it has the score of each metric, the mean opinion score and the PSNR.

The summary has Spearman's correlation of each metric with the mean opinion scores of TID2013. The correlation
is computed for each distortion type alone, for all types together, and for the default types of
`srm-iqa data synthesize --opinions` together. The last line of the summary has the published correlations.

With `--evaluation`, the command also stores how the checkpoint of the package scores the test images, for the table of
docs/DATASETS.md. `python -m bench.report bench/results/cpu --pages docs/DATASETS.md` writes the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.harness import RESULTS, write_lines
from srm_model.checkpoint import read_card, shipped
from srm_model.config import SRMConfig
from srm_model.data.distortions import DISTORTIONS, psnr
from srm_model.data.labels import import_piq
from srm_model.data.opinions import CROP, LEFT_OUT, number_of, read_opinions
from srm_model.data.photographs import Frame, from_folder
from srm_model.data.tid2013 import split_by_reference, type_and_level
from srm_model.files import read_json
from srm_model.metrics import srocc
from srm_model.profiling.results import append, read

METRICS = ("vsi", "fsim", "ssim")
LEVELS = (1, 2, 3, 4, 5)
CHECKPOINT_ROWS = "opinions-checkpoint.jsonl"
# Cited figures for all of TID2013. They were not computed again: the images of TID2013 are not part of this project.
PUBLISHED = {"vsi": 0.897, "fsim": 0.802, "ssim": 0.637}
WITHIN = 0.03
Row = dict[str, Any]


def rows(
    folder: Path, opinions: Path, types: Sequence[int], seed: int, known: Sequence[Row]
) -> Iterator[Row]:
    """Yield a row for each pair of photograph and distortion type that has no row with this seed in `known`."""
    piq, people = import_piq(), read_opinions(opinions)
    done = {(row["photograph"], row["type"], row["seed"]) for row in known}
    for photograph in from_folder(folder, Frame(crop=CROP)):
        number = number_of(photograph.file)
        for kind in types:
            if (number, kind, seed) in done:
                continue
            images = [
                DISTORTIONS[kind](
                    photograph.pixels, level, np.random.default_rng([seed, number, kind, level])
                )
                for level in LEVELS
            ]
            distorted, original = _batch(images), _batch([photograph.pixels] * len(LEVELS))
            with torch.no_grad():
                found = _scores(piq, distorted, original)
            yield {
                "photograph": number,
                "type": kind,
                "seed": seed,
                "mos": [people[number, kind, level] for level in LEVELS],
                "psnr": [round(psnr(photograph.pixels, image), 2) for image in images],
                **{name: [round(float(value), 5) for value in values] for name, values in found.items()},
            }


def _scores(piq: ModuleType, distorted: Tensor, original: Tensor) -> dict[str, Tensor]:
    """Return a dictionary from the name of each metric to the scores (B,) of images (B, 3, H, W)."""
    options: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = [(luma * images).sum(1, keepdim=True) for images in (distorted, original)]
    return {
        "vsi": piq.vsi(distorted, original, **options),
        "fsim": piq.fsim(distorted, original, chromatic=False, **options),
        "ssim": piq.ssim(*grey, downsample=False, **options),
    }


def _batch(images: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255)


def correlation(chosen: Sequence[Row], metric: str) -> float:
    """Return Spearman's correlation of a metric with the mean opinion scores."""
    return srocc([x for row in chosen for x in row[metric]], [x for row in chosen for x in row["mos"]])


def checkpoint_rows(path: Path, sha256: str) -> list[Row]:
    """Return a row for each distortion type: the names, labels and scores of a checkpoint's test images.

    Args:
        path: The checkpoint's `evaluation.json`.
        sha256: Hash of the weights that must have been evaluated.

    Raises:
        ValueError: The file has other weights, another split than the test split, or labels that are not opinions.
    """
    found = read_json(path)
    about = found.get("sha256"), found.get("split"), str(found.get("labels")).partition(":")[0]
    if about != (sha256, "test", "opinions"):
        raise ValueError(
            f"{path}: has (weights, split, labels) {about}; expected {(sha256, 'test', 'opinions')}, the weights "
            "of the checkpoint of the package"
        )
    kept: dict[int, Row] = {}
    for name, mos, score in zip(found["names"], found["mos"], found["scores"], strict=True):
        kind = int(type_and_level(name).partition("_")[0])
        row = kept.setdefault(
            kind, {"checkpoint": sha256, "type": kind, "names": [], "mos": [], "scores": []}
        )
        for key, value in (("names", name), ("mos", mos), ("scores", score)):  # rounding would make ties
            row[key].append(value)
    return [kept[kind] for kind in sorted(kept)]


def level_means(found: Sequence[Row], names: Sequence[str]) -> list[float]:
    """Return what a predictor that knows only the level predicts for images of one distortion type.

    Args:
        found: Rows of the type, with all photographs.
        names: Names of images of the type, such as i01_02_3.bmp. Their photographs are not training photographs.

    Returns:
        For each name, the mean opinion score of the training photographs at the level of the image.
    """
    parts = split_by_reference((str(row["photograph"]) for row in found), SRMConfig.seed)
    trained = [row["mos"] for row in found if parts[str(row["photograph"])] == "train"]
    means = np.mean(trained, axis=0)
    places = [tuple(map(int, Path(name).stem[1:].split("_"))) for name in names]
    if any(parts[str(photograph)] == "train" for photograph, _, _ in places):
        raise ValueError(f"{names[0]} and others: images of training photographs; expected other photographs")
    return [float(means[LEVELS.index(level)]) for _, _, level in places]


def summary(found: Sequence[Row]) -> list[str]:
    """Return the lines of a table of correlations.

    The table has one line for each distortion type, then a line for all types together, a line for all types
    except `LEFT_OUT`, and a last line with the published correlations. In the two lines for several types,
    `!` marks a correlation that differs from the published one by more than `WITHIN`.
    """
    lines = [f"{'type':56}" + "".join(f"{name:>12}" for name in METRICS)]
    for kind in sorted({row["type"] for row in found}):
        chosen = [row for row in found if row["type"] == kind]
        values = "".join(f"{correlation(chosen, name):12.3f}" for name in METRICS)
        lines.append(f"{kind:2} {DISTORTIONS[kind].name:53}{values}")
    kept = [row for row in found if row["type"] not in LEFT_OUT]
    for title, chosen in (("all", found), (f"without types {', '.join(map(str, LEFT_OUT))}", kept)):
        if chosen:
            whole = {name: correlation(chosen, name) for name in METRICS}
            marks = {name: "" if abs(whole[name] - PUBLISHED[name]) <= WITHIN else "!" for name in METRICS}
            lines.append(
                f"{title:56}" + "".join(f"{whole[name]:.3f}{marks[name]}".rjust(12) for name in METRICS)
            )
    lines.append(f"{'published for TID2013':56}" + "".join(f"{PUBLISHED[name]:12.3f}" for name in METRICS))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.opinions", description=__doc__)
    parser.add_argument(
        "--photographs",
        type=Path,
        metavar="DIR",
        help="folder of the Kodak photographs (default: summarise the rows only)",
    )
    parser.add_argument("--opinions", type=Path, metavar="FILE", help="TID2013's mos_with_names.txt")
    parser.add_argument(
        "--types", type=int, nargs="+", choices=sorted(DISTORTIONS), default=sorted(DISTORTIONS)
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "opinions.jsonl", metavar="FILE")
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="write the scores in this evaluation.json of the checkpoint of the package to "
        f"{CHECKPOINT_ROWS}, in the folder of --out",
    )
    options = parser.parse_args(arguments)
    if options.evaluation is not None:
        try:
            scored = checkpoint_rows(options.evaluation, read_card(shipped())["sha256"])
        except (ValueError, OSError) as error:
            parser.error(str(error))
        write_lines(options.out.parent / CHECKPOINT_ROWS, scored)
    known = read(options.out) if options.out.is_file() else []
    if options.photographs is not None:
        if options.opinions is None:
            parser.error("--photographs needs --opinions")
        for row in rows(options.photographs, options.opinions, options.types, options.seed, known):
            append(options.out, row)
            known.append(row)
            print(f"photograph {row['photograph']}, type {row['type']}", file=sys.stderr)
    chosen = [row for row in known if row["type"] in options.types and row["seed"] == options.seed]
    if not chosen:
        parser.error(f"{options.out}: no rows; give --photographs and --opinions")
    print("\n".join(summary(chosen)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
