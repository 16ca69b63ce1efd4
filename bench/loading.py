"""Where the time of loading an image goes: decoding, resizing, augmentation, conversion.

`python -m bench.loading IMAGES` reads the first images of a folder as training reads them. Times are processor
milliseconds an image on one worker, the least of several passes, so that other work on the machine does not lengthen
them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import record
from srm_model.data import ImageCache
from srm_model.data.images import open_rgb
from srm_model.data.transforms import load_resized, random_crop_and_flip, to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


def parts(paths: list[Path], size: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Name → the work of one pass over all images."""
    cache = ImageCache(folder, 1 << 34)
    resized = [cache.get(path, size) for path in paths]
    rng = np.random.default_rng(0)
    crops = [random_crop_and_flip(pixels, size, rng) for pixels in resized]
    return {
        "decode": lambda: [np.asarray(open_rgb(path)) for path in paths],
        "decode and resize": lambda: [load_resized(path, size) for path in paths],
        "the same from a cache": lambda: [cache.get(path, size) for path in paths],
        "crop and mirror": lambda: [random_crop_and_flip(pixels, size, rng) for pixels in resized],
        "to float32": lambda: [to_tensor(crop) for crop in crops],
    }


def milliseconds(work: Callable[[], object], images: int, repeats: int) -> float:
    """The least processor time of a pass, for one image."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times) * 1e3 / images


def images_in(folder: Path, most: int) -> list[Path]:
    """The first images of a folder, by name; ValueError where there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:most]
    if not found:
        raise ValueError(f"{folder}: no image is in it, whose name ends in {', '.join(SUFFIXES)}")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("--image-size", type=int, nargs="+", default=[224, 384, 512])
    parser.add_argument("--most", type=int, default=12, help="images read (default: 12)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON lines")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        paths = images_in(options.images, options.most)
    except ValueError as error:
        parser.error(str(error))
    rows: list[dict[str, Any]] = [{**record.machine("cpu"), "benchmark": "loading", "images": len(paths)}]
    for size in options.image_size:
        with tempfile.TemporaryDirectory() as folder:
            for name, work in parts(paths, size, Path(folder)).items():
                elapsed = milliseconds(work, len(paths), options.repeats)
                print(f"{size}²  {name:<22}{elapsed:9.3f} ms", flush=True)
                rows.append({"image_size": size, "part": name, "ms": round(elapsed, 4)})
    if options.out:
        record.write_lines(options.out, rows)


if __name__ == "__main__":
    main()
