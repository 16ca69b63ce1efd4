"""Describe the machine, versions and commit of a measurement."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Measurements are put in one table only if all these values are equal.
IDENTITY = ("device", "driver", "capability", "threads", "torch", "cuda", "triton", "commit")


def machine(device: torch.device | str) -> dict[str, Any]:
    """Describe a machine: device, driver, capability, memory, threads, versions, commit and clocks.

    A "+" after the commit means that the checkout has uncommitted changes. A value is None if it is unknown or does not
    exist. For example, a CPU has no driver and no compute capability, and an installed wheel has no commit.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "kind": device.type,
        "driver": _nvidia_smi(device, "driver_version")[0] if cuda else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        "memory": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "clocks": clocks(device),
    }


def clocks(device: torch.device) -> dict[str, float | None]:
    """Return the current clock rates in MHz.

    For a GPU, the result has the clock rates of the multiprocessors and of the memory, and the maximum of each of these
    two rates. For a CPU, the result has the mean clock rate of the cores.
    """
    if device.type == "cuda":
        names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
        found = _nvidia_smi(device, *names)
        return {name.removeprefix("clocks."): _number(text) for name, text in zip(names, found, strict=True)}
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return {"cpu": None}
    speeds = [float(value) for value in re.findall(r"^cpu MHz\s*: ([\d.]+)", text, flags=re.MULTILINE)]
    return {"cpu": round(sum(speeds) / len(speeds), 1) if speeds else None}


def folder_name(about: dict[str, Any]) -> str:
    """Return the folder name of a machine's results: `cpu`, or the GPU's name, for example `nvidia-h200`.

    The GPU's name is written in lower case, with dashes between the words.
    """
    if about["kind"] != "cuda":
        return str(about["kind"])
    return re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")


def sentence(about: dict[str, Any]) -> str:
    """Describe a machine and its versions in one line."""
    parts = [str(about["device"])]
    if about["capability"]:
        parts.append(f"compute capability {about['capability']}, driver {about['driver']}")
    else:
        parts.append(f"{about['threads']} thread{'s' if about['threads'] != 1 else ''}")
    parts += [f"torch {about['torch']}", f"triton {about['triton'] or 'absent'}"]
    parts.append(f"commit {about['commit'] or 'unknown'}")
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine()
    )


def _nvidia_smi(device: torch.device, *names: str) -> list[str | None]:
    """Query nvidia-smi for properties of a device.

    nvidia-smi finds the device by its UUID. If the query fails, all returned values are None.
    """
    identifier = str(torch.cuda.get_device_properties(device).uuid)
    query = [
        "nvidia-smi",
        f"--query-gpu={','.join(names)}",
        "--format=csv,noheader,nounits",
        f"--id=GPU-{identifier.removeprefix('GPU-')}",
    ]
    text = _output(query, None)
    values: list[str | None] = [value.strip() for value in text.split(",")] if text else []
    return values if len(values) == len(names) else [None] * len(names)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent.parent
    top = _output(["git", "rev-parse", "--show-toplevel"], root)
    if top is None or Path(top).resolve() != root:  # not a checkout, or a checkout of another project
        return None
    return _output(["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"], root)


def _output(command: list[str], folder: Path | None) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
