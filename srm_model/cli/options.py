"""Arguments that several subcommands share, and the config they amount to."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from srm_model.config import REGISTERED, STORED, SRMConfig, registered
from srm_model.files import read_json

if TYPE_CHECKING:
    import torch

_REASON = 120  # characters of what PyTorch says about a device
_HELP = {
    "epochs": "passes over the training images",
    "batch_size": "images of one optimiser step, over all processes",
    "accumulate": "micro-batches that a batch is cut into, to need less memory",
    "attack_steps": "PGD steps",
    "attack_restarts": "PGD restarts, each from a random start",
    "attack_batch_size": "images attacked together",
    "attack_queries": "scores per image that the black-box attack may ask for",
    "image_size": "side of the square that is trained on and scored, in pixels",
    "precision": "fp32, bf16, fp16 or auto: bf16 or fp16 on a GPU, fp32 on a CPU",
    "lr_backbone": "learning rate of the backbone",
    "lr_neck": "learning rate of neck and head",
    "seed": "of the split, the initial weights, the order of images and the attacks",
}


def add_config(parser: argparse.ArgumentParser, *fields: str) -> None:
    """Flags for some fields of `SRMConfig`, and `--config` and `--set` for all."""
    group = parser.add_argument_group(
        "config", "Every constant is a field of SRMConfig. --set overrules flags, flags overrule --config."
    )
    defaults = SRMConfig().to_dict()
    attacking = "attack_steps" in fields
    texts = _HELP | ({"seed": "of the attacks; the split is that of training"} if attacking else {})
    for field in fields:
        default = "the checkpoint's" if attacking else defaults[field]
        group.add_argument(
            f"--{field.removeprefix('attack_').replace('_', '-')}"
            if field != "attack_batch_size"
            else "--batch-size",
            dest=f"config_{field}",
            type=type(defaults[field]),
            metavar="RATE" if field.startswith("lr_") else field.rpartition("_")[2].upper(),
            help=f"{texts[field]} (default: {default})",
        )
    group.add_argument(
        "--config", metavar="FILE", help="JSON with some fields, or a checkpoint's config.json"
    )
    values = group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one field; VALUE is JSON, none, or plain text, such as --set links=[[4,3],[3,2]] (repeatable); "
        "%(registered)s",
    )
    values.registered = _Registered()  # type: ignore[attr-defined]


class _Registered:
    """The values of registered fields as `--help` lists them: what they are is imported when they are printed."""

    def __str__(self) -> str:
        return "; ".join(
            f"{name}: {', '.join(value or 'none' for value in registered(name))}" for name in REGISTERED
        )


def config_from(args: argparse.Namespace, base: SRMConfig | None = None) -> SRMConfig:
    """`base` (default: SRMConfig()) with what the arguments of `add_config` change."""
    changes: dict[str, Any] = {}
    if args.config is not None:
        changes |= _read(args.config)
    changes |= {
        name.removeprefix("config_"): value
        for name, value in vars(args).items()
        if name.startswith("config_") and value is not None
    }
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: expected KEY=VALUE")
        changes[key.strip()] = _value(value.strip())
    return (base or SRMConfig()).replace(**changes)


def attack_config_from(args: argparse.Namespace, trained: SRMConfig) -> SRMConfig:
    """`trained` with other settings of the attack; ValueError for a field that the weights as trained do not follow."""
    config = config_from(args, trained)
    followed = (*config.attack_settings(), "attack_sweep_steps", "seed", "backend")
    before = trained.to_dict()
    kept = [
        key
        for key, value in config.to_dict().items()
        if value != before[key] and key not in followed and not key.startswith(("eps_", "smoothing_"))
    ]
    if kept:
        raise ValueError(
            f"{', '.join(kept)}: of the model as it was trained; --set and --config change attack_*, pair_*, eps_*, "
            "smoothing_*, eot_samples, seed and backend here (a study's swaps put others into trained weights)"
        )
    return config


def add_device(parser: argparse.ArgumentParser, *, workers: bool = False) -> None:
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: cuda where there is one)")
    if workers:
        parser.add_argument("--workers", type=int, default=0, help="processes that load images (default: 0)")


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-pixels",
        type=not_negative,
        metavar="N",
        help="refuse to decode images of more than N pixels; 0: no limit (default: Pillow's, 178956970)",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        type=backend_name,
        default=STORED,
        metavar="NAME",
        help="of the operators; none picks the fastest that can run (default: the one of training)",
    )


def backend_name(text: str) -> str | None:
    """A backend, or "none" for None, for argparse."""
    return None if text.lower() == "none" else text


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def seconds(text: str) -> float:
    """A span of time above 0, for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a span above 0")
    return number


def not_negative(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def byte_count(text: str) -> int:
    """A size such as 500MB or 20GB, decimal, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?B?)", text)
    size = int(float(match[1]) * 1000 ** " kMGT".index(match[2].rstrip("B") or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 20GB")
    return size


def width_and_height(text: str) -> tuple[int, int]:
    """A size in pixels such as 512x384, for argparse."""
    match = re.fullmatch(r"([1-9]\d{0,5})[x×]([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width and a height such as 512x384")
    return int(match[1]), int(match[2])


def budget(text: str) -> float:
    """`parse_budget` for argparse."""
    from srm_model.attacks.problem import parse_budget

    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device_from(name: str | None) -> torch.device:
    """The device asked for, by default CUDA where there is one; ValueError where it cannot be used.

    Under torchrun the default is the GPU of the local rank.
    """
    import torch

    if name is None:
        gpu = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which a device without memory ("meta") cannot do
    except (RuntimeError, AssertionError, ImportError, AttributeError, NotImplementedError) as error:
        reason = re.split(r"\.\s|\n", str(error))[0][:_REASON]  # PyTorch goes on for a page
        raise ValueError(
            f"--device {name}: not a device that can be used here ({reason}); expected such as cpu or cuda:0"
        ) from None
    return device


def named_folders(pairs: Sequence[str]) -> dict[str, str]:
    """Folders by name from NAME=FOLDER."""
    found = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--data {pair}: expected NAME=FOLDER")
        found[name] = folder
    return found


def _read(path: str) -> dict[str, Any]:
    values = read_json(path)
    if isinstance(values, dict) and "format" in values:
        values = values.get("config")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object of config fields")
    return values


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
