"""Define the arguments that several subcommands share, and make a config from the parsed arguments."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from srm_model.config import REGISTERED, STORED, SRMConfig, registered
from srm_model.files import read_json
from srm_model.norms import NORMS, norm_of

if TYPE_CHECKING:
    import torch

_REASON = 120  # characters of PyTorch's message about a device
_HELP = {
    "epochs": "passes over the training images",
    "batch_size": "images in one optimiser step, over all processes",
    "accumulate": "micro-batches per batch, to save memory",
    "attack_steps": "PGD steps",
    "attack_restarts": "PGD restarts, each from a random start",
    "attack_batch_size": "images attacked together",
    "attack_queries": "queries per image of the black-box attack",
    "image_size": "side of the square input in pixels",
    "precision": "fp32, bf16, fp16 or auto; auto is bf16 or fp16 on a GPU and fp32 on a CPU",
    "lr_backbone": "learning rate of the backbone",
    "lr_neck": "learning rate of neck and head",
    "seed": "seed of the split, the initial weights, the order of images and the attacks",
}


def add_config(parser: argparse.ArgumentParser, *fields: str) -> None:
    """Add `--config` and `--set`, which accept all fields of `SRMConfig`, and one option for each field in `fields`."""
    group = parser.add_argument_group(
        "config",
        "Every constant is a field of SRMConfig. --set overrides the other options, which override --config.",
    )
    defaults = SRMConfig().to_dict()
    attacking = "attack_steps" in fields
    texts = _HELP | ({"seed": "seed of the attacks; the split stays as in training"} if attacking else {})
    for field in fields:
        default = "the checkpoint's" if attacking else defaults[field]
        group.add_argument(
            f"--{field.removeprefix('attack_').replace('_', '-')}",
            dest=f"config_{field}",
            type=type(defaults[field]),
            metavar="RATE" if field.startswith("lr_") else field.rpartition("_")[2].upper(),
            help=f"{texts[field]} (default: {default})",
        )
    group.add_argument(
        "--config", metavar="FILE", help="JSON file with some fields, or a checkpoint's config.json"
    )
    values = group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one field; VALUE is JSON, none, or plain text, such as --set links=[[4,3],[3,2]] (repeatable); "
        "%(registered)s",
    )
    values.registered = _Registered()  # type: ignore[attr-defined]


class _Registered:
    """The accepted values of the fields in `REGISTERED`, as text for `--help`.

    The text is built only when the help is printed, because building the text imports torch.
    """

    def __str__(self) -> str:
        return "; ".join(
            f"{name}: {', '.join(value or 'none' for value in registered(name))}" for name in REGISTERED
        )


def config_from(args: argparse.Namespace, base: SRMConfig | None = None) -> SRMConfig:
    """Return the config `base`, changed by the options that `add_config` adds.

    Args:
        args: Parsed arguments.
        base: Config to change. Default: `SRMConfig()`.

    Raises:
        ValueError: A value of `--set` has no "=", the file of `--config` is not a JSON object of fields, a field is
            unknown, or `SRMConfig` does not accept a value.
        TypeError: The value of a field has the wrong type.
    """
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
    """Return the config of a trained model, changed by the attack settings in the arguments.

    Args:
        args: Parsed arguments, including the options that `add_config` adds.
        trained: Config of the model.

    Raises:
        ValueError: As in `config_from`, or an argument changes a field that cannot change after training.
        TypeError: As in `config_from`.
    """
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
            f"{', '.join(kept)}: fixed by training; here, --set and --config can change only attack_*, pair_*, "
            "eps_*, smoothing_*, eot_samples, seed and backend (a study's swaps change other fields)"
        )
    return config


def add_seed(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--seed", type=int, default=0, help=f"seed of {what} (default: 0)")


def add_device(parser: argparse.ArgumentParser, *, workers: bool = False) -> None:
    parser.add_argument("--device", help="device, such as cpu or cuda:0 (default: cuda if available)")
    if workers:
        parser.add_argument("--workers", type=int, default=0, help="processes that load images (default: 0)")


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-pixels",
        type=not_negative,
        metavar="N",
        help="reject images of more than N pixels; 0: no limit (default: Pillow's, 178956970)",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        type=backend_name,
        default=STORED,
        metavar="NAME",
        help="backend of the operators, such as triton; none selects it from the results of srm-iqa verify (default: "
        "as in training)",
    )


def backend_name(text: str) -> str | None:
    """Parse the name of a backend for argparse; return None for "none"."""
    return None if text.lower() == "none" else text


def positive(text: str) -> int:
    """Parse an integer of at least 1, for argparse."""
    return not_negative(text, 1)


def not_negative(text: str, least: int = 0) -> int:
    """Parse an integer of at least `least`, for argparse."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return number


def seconds(text: str) -> float:
    """Parse a finite number above 0, for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number


def byte_count(text: str) -> int:
    """Parse a size in decimal units, such as 500MB or 20GB, for argparse; return bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?B?)", text)
    size = int(float(match[1]) * 1000 ** " kMGT".index(match[2].rstrip("B") or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 20GB")
    return size


def width_and_height(text: str) -> tuple[int, int]:
    """Parse a size in pixels, such as 512x384, for argparse."""
    match = re.fullmatch(r"([1-9]\d{0,5})[x×]([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width and a height such as 512x384")
    return int(match[1]), int(match[2])


def budget(text: str) -> float:
    """Call `parse_budget` for argparse."""
    from srm_model.attacks.problem import parse_budget

    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def default_norms() -> list[str]:
    """Return the norms that have default budgets."""
    return [name for name, norm in NORMS.items() if norm.tables_of(SRMConfig())]


def budget_help(*, last: bool = False) -> str:
    """Return the end of the help text of `--eps`: each norm's note on its budgets, and each norm's default budgets.

    Args:
        last: Whether `--eps` has only one default budget for each norm: the last budget that `Norm.tables_of` returns.
            If False, all budgets that `Norm.tables_of` returns are defaults.
    """
    config, start = SRMConfig(), -1 if last else None
    notes = [norm.stated for norm in NORMS.values() if norm.stated]
    defaults = [
        f"{' and '.join(map(NORMS[name].brief, NORMS[name].tables_of(config)[start:]))} for {name}"
        for name in default_norms()
    ]
    return f"{'; '.join(notes)} (default: {', '.join(defaults)})"


def budgets_of(norm: str, given: Sequence[float] | None, config: SRMConfig) -> tuple[float, ...]:
    """Return the budgets of `--eps`, or the default budgets of the norm.

    Args:
        norm: Name of the norm.
        given: Budgets of `--eps`, or None.
        config: Config with the default budgets.

    Raises:
        ValueError: No budget is given, and the norm has no default budget.
    """
    found = norm_of(norm).tables_of(config) if given is None else tuple(given)
    if not found:
        raise ValueError(f"--norm {norm}: has no default budget; expected --eps")
    return found


def device_from(name: str | None) -> torch.device:
    """Return the named device after a check that it works, or the default device.

    Args:
        name: Name of the device, as accepted by `torch.device`. Default: a GPU if CUDA is available, otherwise "cpu".
            Under torchrun, the default GPU is the GPU of the local rank.

    Raises:
        ValueError: The named device cannot be used on this machine.
    """
    import torch

    if name is None:
        gpu = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on a device without memory ("meta")
    except (RuntimeError, AssertionError, ImportError, AttributeError, NotImplementedError) as error:
        reason = re.split(r"\.\s|\n", str(error))[0][:_REASON]  # PyTorch's message can fill a page
        raise ValueError(
            f"--device {name}: cannot be used on this machine ({reason}); expected a device such as cpu or cuda:0"
        ) from None
    return device


def named_folders(pairs: Sequence[str]) -> dict[str, str]:
    """Convert arguments NAME=FOLDER to a dict from name to folder."""
    found = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--data {pair}: expected NAME=FOLDER")
        found[name] = folder
    return found


def _read(path: str) -> dict[str, Any]:
    values = read_json(path)
    if isinstance(values, dict) and "format" in values:  # a checkpoint's config.json
        values = values.get("config")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object of config fields")
    return values


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
