"""`srm-iqa score`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from srm_model.cli import runs
from srm_model.data import load_image


def run(args: argparse.Namespace) -> int:
    """Print a line per readable file; 2 where a file could not be read."""
    folder = runs.one_checkpoint(args.checkpoint)
    device = runs.device_from(args.device)
    model, _ = runs.open_checkpoint(folder, device, args.backend)
    failed = False
    for batch in _batches(args.images, args.batch_size):
        loaded = [(path, _load(path, model.config.image_size)) for path in batch]
        images = [image for _, image in loaded if isinstance(image, Tensor)]
        scores: list[float] = []
        if images:
            with torch.inference_mode():
                scores = model(torch.stack(images).to(device)).tolist()
        for path, image in loaded:
            if isinstance(image, Tensor):
                score = scores.pop(0)
                print(json.dumps({"path": path, "score": score}) if args.json else f"{score:.4f}\t{path}")
            else:
                failed = True
                runs.say(f"srm-iqa score: {image}")
                if args.json:
                    print(json.dumps({"path": path, "error": image}))
    return 2 if failed else 0


def _batches(paths: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


def _load(path: str, image_size: int) -> Tensor | str:
    """The image, or the sentence that says why there is none."""
    try:
        return load_image(path, image_size)
    except ValueError as error:
        return " ".join(str(error).split())
