"""Images per second of a training step, per backbone, neck and backend, and how long it waits for data:
`python -m bench.training`.

Steps of all models are interleaved in one process, and the medians are told with their ratio to the first neck of the
same backbone: on a busy machine only the ratios mean something. A step is the training loop's own: forward under
autocast, losses, backward, clipping, AdamW. Peak memory is a GPU's alone, beyond weights and optimiser. For the share
of time that is data, the first model of each backbone reads JPEG files, decoded anew and from a cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from srm_kernels import backends
from srm_model import SRMConfig, build_model
from srm_model.config import NECKS
from srm_model.data import ImageCache
from srm_model.data.transforms import centre_crop, load_resized, to_tensor
from srm_model.training.optimisation import autocast_dtype, parameter_groups


class Case:
    """One model and its optimiser; `step` trains on a batch."""

    def __init__(self, backbone: str, neck: str, backend: str | None, options: argparse.Namespace) -> None:
        self.backbone, self.neck, self.backend = backbone, neck, backend
        self.device = torch.device(options.device)
        self.config = SRMConfig(
            image_size=options.image_size,
            batch_size=options.batch_size,
            precision=options.precision,
            backend=backend,
        )
        torch.manual_seed(0)
        model: Any = build_model(backbone, neck=neck, config=self.config).train()
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        self.dtype = autocast_dtype(options.precision, self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(model, self.config), fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.seconds: list[float] = []
        self.peak = 0

    def step(self, images: torch.Tensor, mos: torch.Tensor) -> None:
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

    def timed(self, images: torch.Tensor, mos: torch.Tensor) -> float:
        """Seconds of a step, the device's own work included."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()  # by all models of the run
        start = time.perf_counter()
        self.step(images, mos)
        if cuda:
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - held)
        return time.perf_counter() - start


class Files(torch.utils.data.Dataset[Any]):
    """Photographs on disk, decoded and resized as in training."""

    def __init__(self, paths: list[Path], size: int, cache: ImageCache | None) -> None:
        self.paths, self.size, self.cache = paths, size, cache

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        read = load_resized if self.cache is None else self.cache.get
        return to_tensor(centre_crop(read(self.paths[index], self.size), self.size)), 0.5


def cases(options: argparse.Namespace) -> list[Case]:
    """Every backbone with every neck, and the necks with operators on every backend that can run."""
    available = [name for name, status in backends().items() if status.available]
    chosen = options.backends or [None, *available]
    return [
        Case(backbone, neck, backend, options)
        for backbone in options.backbones
        for neck in options.necks
        for backend in (chosen if neck != "none" else [None])
    ]


def compare(found: list[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Median images per second of each, and the ratio to the first one of its backbone."""
    generator = torch.Generator().manual_seed(0)
    side = options.image_size
    images = torch.rand(options.batch_size, 3, side, side, generator=generator)
    images = images.to(options.device).to(memory_format=torch.channels_last)
    mos = torch.rand(options.batch_size, generator=generator).to(options.device)
    for case in found:
        case.model.calibrate(images)
    for repeat in range(-options.warmup, options.repeats):
        for case in found:
            elapsed = case.timed(images, mos)
            if repeat >= 0:
                case.seconds.append(elapsed)
    rows = []
    for case in found:
        first = next(other for other in found if other.backbone == case.backbone)
        ratios = [a / b for a, b in zip(first.seconds, case.seconds, strict=True)]
        rows.append(
            {
                "backbone": case.backbone,
                "neck": case.neck,
                "backend": case.backend,
                "images_per_second": options.batch_size / statistics.median(case.seconds),
                "speed_over_first": statistics.median(ratios),
                "peak_mib": case.peak / 2**20 if case.peak else None,
            }
        )
    return rows


def data_shares(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of time that training waits for images decoded anew, then kept in a folder (its second pass)."""
    side = options.image_size
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{number}.jpg" for number in range(options.batch_size * options.repeats)]
        for path in paths:
            pixels = rng.integers(0, 256, (side // 8 + 1, side // 6 + 1, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((side * 4 // 3, side)).save(path, quality=95)
        cache = ImageCache(folder / "cache", 10**10)
        for path in paths:
            cache.get(path, side)
        return [
            {"images": how, "workers": options.workers, **_waited(case, Files(paths, side, kept), options)}
            for how, kept in (("decoded", None), ("cached", cache))
        ]


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
        case.timed(images, mos.to(case.device, torch.float32, non_blocking=True))
    seconds = time.perf_counter() - begin
    return {"data_share": waiting / seconds, "images_per_second": len(files) / seconds}


def main(arguments: list[str] | None = None) -> None:
    """Print a line per model and per way of reading; with --json also write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--backbones", nargs="+", default=["mobilenetv3_large_100"])
    parser.add_argument(
        "--necks", nargs="+", default=["quadratic", "srm", "none"], choices=NECKS, help="the first is 1.00"
    )
    parser.add_argument("--backends", nargs="+", help="default: the fastest, and each that can run here")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    cuda = options.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if cuda else platform.machine()
    print(
        f"torch {torch.__version__}, {machine}, {torch.get_num_threads()} threads, {options.precision}, "
        f"B={options.batch_size}, {options.image_size}², training step"
    )
    found = cases(options)
    steps = compare(found, options)
    print(f"{'backbone':24} {'neck':10} {'backend':10} {'images/s':>9} {'speed':>7} {'peak MiB':>9}")
    for row in steps:
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(
            f"{row['backbone']:24} {row['neck']:10} {row['backend'] or 'fastest':10} "
            f"{row['images_per_second']:9.2f} {row['speed_over_first']:7.2f} {peak:>9}"
        )
    data = []
    for backbone in options.backbones:
        case = next(case for case in found if case.backbone == backbone)
        for row in data_shares(case, options):
            data.append({"backbone": backbone, "neck": case.neck, **row})
            print(
                f"{backbone} {case.neck}, images {row['images']}, {row['workers']} workers: "
                f"{row['data_share']:.0%} of the time waiting for data, {row['images_per_second']:.2f} images/s"
            )
    if options.json:
        settings = {**vars(options), "torch": torch.__version__, "machine": machine}
        Path(options.json).write_text(
            json.dumps({"settings": settings, "steps": steps, "data": data}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
