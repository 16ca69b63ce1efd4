"""Measure the time of each step of loading an image: `python -m bench.loading IMAGES`.

The images are the first `--most` files of the folder IMAGES, and are loaded as in training. These steps are
timed separately: decoding an image, decoding and resizing it, reading the resized image from the image cache,
random cropping and mirroring, and conversion to float32. Times are CPU time in milliseconds per image, for one
worker. Each step is timed in several passes over the images. The shortest time is reported, because other
processes affect it least.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import Call, machine_with_load, parser, write_lines
from srm_model.data import ImageCache
from srm_model.data.images import open_rgb
from srm_model.data.transforms import load_resized, random_crop_and_flip, to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


def parts(paths: list[Path], size: int, folder: Path) -> dict[str, Call]:
    """Return a dictionary from the name of each loading step to its function.

    The functions take no arguments. Each call runs the step once for every image in `paths`. The step "the same
    from a cache" reads the image cache, which is stored in `folder`.
    """
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
    """Run `work` several times; return the shortest CPU time of a run, in milliseconds per image."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times) * 1e3 / images


def main(arguments: list[str] | None = None) -> None:
    """Print the time of each step for each image size, and write the times to the file of `--out`, if it is given."""
    made = parser("loading", __doc__)
    made.add_argument("images", type=Path, help="folder of images")
    made.add_argument("--image-size", type=int, nargs="+", default=[224, 384, 512])
    made.add_argument(
        "--most", type=int, default=12, help="read at most this many images (default: %(default)s)"
    )
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines to FILE")
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    found = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    paths = found[: options.most]
    if not paths:
        made.error(f"{options.images}: no images in it; expected files that end in {', '.join(SUFFIXES)}")
    rows: list[dict[str, Any]] = [{**machine_with_load("cpu"), "benchmark": "loading", "images": len(paths)}]
    for size in options.image_size:
        with tempfile.TemporaryDirectory() as folder:
            for name, work in parts(paths, size, Path(folder)).items():
                elapsed = milliseconds(work, len(paths), options.repeats)
                print(f"{size}²  {name:<22}{elapsed:9.3f} ms", flush=True)
                rows.append({"image_size": size, "part": name, "ms": round(elapsed, 4)})
    write_lines(options.out, rows)


if __name__ == "__main__":
    main()
