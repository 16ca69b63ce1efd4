"""Measure training steps, and the share of time spent waiting for data: `python -m bench.training`.

For each backbone, the command builds a model for every neck and backend in one process. It times one step of
each model in turn, so changes of the machine's speed affect all models equally. The table also has the ratio
of each model's speed to the speed of the model with the first neck and backend. On a busy machine, only this
ratio is meaningful. A training step consists of the forward pass under autocast, the losses, the backward
pass, gradient clipping and AdamW. Peak memory is measured on a GPU only. It excludes memory that is allocated
before the step, such as the weights and the optimiser state.

The share of time spent waiting for data is measured for each backbone with its first neck and backend only. It is
measured twice: with JPEG files that are decoded at each step, and with decoded images from a cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from bench.harness import Recorder, available_backends, effort_of, timing_parser
from srm_kernels.checks import current_name
from srm_model import SRMConfig, build_model
from srm_model.data import ImageCache
from srm_model.data.transforms import centre_crop, load_resized, to_tensor
from srm_model.necks import NECKS
from srm_model.profiling import measure_together
from srm_model.profiling.machines import sentence
from srm_model.profiling.memory import peak
from srm_model.training.optimisation import autocast_dtype, parameter_groups

TARGET = 1.3  # least speedup of the fused neck over the quadratic neck on a GPU, at 512²
Rows = list[dict[str, Any]]


class Case:
    """A model and its optimiser; `step` trains on a batch."""

    def __init__(self, backbone: str, neck: str, backend: str | None, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        sizes = {"image_size": options.image_size, "batch_size": options.batch_size}
        self.config = SRMConfig(**sizes, landmarks="leverage", precision=options.dtype, backend=backend)
        self.about = {
            "backbone": backbone,
            "neck": neck,
            "backend": backend,
            "dtype": options.dtype,
            "image_size": options.image_size,
            "batch": options.batch_size,
        }
        torch.manual_seed(0)
        model: Any = build_model(backbone, neck=neck, config=self.config).train()
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        self.dtype = autocast_dtype(options.dtype, self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(model, self.config), fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def step(self, images: torch.Tensor, mos: torch.Tensor) -> None:
        """Train on images (B, 3, h, w) with opinion scores (B,)."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            scores, losses = self.model(images, return_losses=True)
        loss = nn.functional.mse_loss(scores.float(), mos)
        for name, value in losses.items():
            loss = loss + getattr(self.config, f"weight_{name}") * value.float()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.clamp_()


class Files(torch.utils.data.Dataset[Any]):
    """Photographs on disk, decoded and resized as in training."""

    def __init__(self, paths: list[Path], size: int, cache: ImageCache | None) -> None:
        self.paths, self.size, self.cache = paths, size, cache

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        load = load_resized if self.cache is None else self.cache.get
        return to_tensor(centre_crop(load(self.paths[index], self.size), self.size)), 0.5


def cases(backbone: str, options: argparse.Namespace) -> list[Case]:
    """Return one case per neck and backend, or one case per neck if the neck has no attention."""
    chosen = options.backends or [None, *available_backends()]
    return [
        Case(backbone, neck, backend, options)
        for neck in options.necks
        for backend in (chosen if NECKS[neck].attention else [None])
    ]


def compare(found: list[Case], options: argparse.Namespace) -> Rows:
    """Return a row per case: times of a step, images per second, speed relative to the first case, peak GPU memory."""
    device, side = torch.device(options.device), options.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch_size, 3, side, side, generator=generator)
    images = images.to(device).to(memory_format=torch.channels_last)
    mos = torch.rand(options.batch_size, generator=generator).to(device)
    for case in found:
        case.model.calibrate(images)
    calls = {str(number): lambda case=case: case.step(images, mos) for number, case in enumerate(found)}
    times = list(measure_together(calls, device, effort_of(options)).values())
    return [
        {
            "kind": "step",
            **case.about,
            "ms": taken.to_dict(),
            "images_per_second": 1e3 * options.batch_size / taken.typical,
            "speed_over_first": times[0].typical / taken.typical,
            "peak_mib": peak(call, device).above / 2**20 if device.type == "cuda" else None,
        }
        for case, taken, call in zip(found, times, calls.values(), strict=True)
    ]


def data_shares(case: Case, options: argparse.Namespace) -> Rows:
    """Return two rows with the share of the training time that is spent waiting for images.

    The first row is measured with JPEG files that are decoded at each step, and the second row with decoded images from
    a cache.
    """
    side = options.image_size
    rng = np.random.default_rng(0)
    about = {name: value for name, value in case.about.items() if name != "backend"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{number}.jpg" for number in range(options.batch_size * options.batches)]
        for path in paths:
            pixels = rng.integers(0, 256, (side // 8 + 1, side // 6 + 1, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((side * 4 // 3, side)).save(path, quality=95)
        cache = ImageCache(folder / "cache", 10**10)
        for path in paths:
            cache.get(path, side)
        rows = []
        for how, kept in (("decoded", None), ("cached", cache)):
            waited = _waited(case, Files(paths, side, kept), options)
            rows.append({"kind": "data", **about, "images": how, "workers": options.workers, **waited})
        return rows


def _waited(case: Case, files: Files, options: argparse.Namespace) -> dict[str, float]:
    loader = DataLoader(
        files, options.batch_size, num_workers=options.workers, pin_memory=case.device.type == "cuda"
    )
    waiting, begin = 0.0, time.perf_counter()
    items = iter(loader)
    for _ in range(len(loader)):
        start = time.perf_counter()
        images, mos = next(items)
        waiting += time.perf_counter() - start
        images = images.to(case.device, non_blocking=True, memory_format=torch.channels_last)
        case.step(images, mos.to(case.device, torch.float32, non_blocking=True))
        if case.device.type == "cuda":
            torch.cuda.synchronize(case.device)
    seconds = time.perf_counter() - begin
    return {"data_share": waiting / seconds, "images_per_second": len(files) / seconds}


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each model, and the share of time spent waiting for data."""
    made = timing_parser("training", __doc__)
    made.add_argument("--backbones", nargs="+", default=["mobilenetv3_large_100"])
    made.add_argument(
        "--necks", nargs="+", default=["quadratic", "srm", "none"], choices=tuple(NECKS),
        help="measure these; speeds are relative to the first",
    )  # fmt: skip
    made.add_argument(
        "--backends", type=current_name, nargs="+", help="default: the fastest, and each that can run here"
    )
    made.add_argument("--image-size", type=int, default=512)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument(
        "--workers", type=int, default=0, help="processes that load data (default: %(default)s)"
    )
    made.add_argument(
        "--batches", type=int, default=7, help="batches of files to read (default: %(default)s)"
    )
    options = made.parse_args(arguments)
    recorder = Recorder(options.out, "training", options.device, options.note)
    print(sentence(recorder.machine))
    print(f"training step, {options.dtype}, B={options.batch_size}, {options.image_size}²")
    print(f"{'backbone':28} {'neck':10} {'backend':10} {'images/s':>9} {'speed':>7} {'peak MiB':>9}")
    for backbone in options.backbones:
        found = cases(backbone, options)
        for row in map(recorder.write, compare(found, options)):
            print(line_of(row), flush=True)
        for row in map(recorder.write, data_shares(found[0], options)):
            print(
                f"{backbone} {row['neck']}, images {row['images']}, {row['workers']} workers: "
                f"{row['data_share']:.0%} of the time waiting for data, {row['images_per_second']:.2f} images/s",
                flush=True,
            )


def line_of(row: dict[str, Any]) -> str:
    """Return the row of a step as a table line.

    On a GPU, `!` marks a fused neck whose speed relative to the first case is below `TARGET`.
    """
    fused = row["neck"] == "srm" and row["backend"] == "triton" and row["peak_mib"] is not None
    missed = " !" if fused and row["speed_over_first"] < TARGET else ""
    memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    return (
        f"{row['backbone']:28} {row['neck']:10} {row['backend'] or 'fastest':10} "
        f"{row['images_per_second']:9.2f} {row['speed_over_first']:7.2f} {memory:>9}{missed}"
    )


if __name__ == "__main__":
    main()
