"""Measure a job and write its line to a study's results."""

from __future__ import annotations

import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from srm_model import runs
from srm_model.reports.records import Records
from srm_model.study.context import Context
from srm_model.study.jobs import Job


def record(job: Job, c: Context) -> None:
    """Measure a job and append its line to the results.

    If a job already has a line in the results, the job is a training whose weights were lost or changed after the line
    was written. In this case, `record` runs the training again, but appends no second line. The new weights must equal
    the original weights.

    Raises:
        ValueError: A repeated training gave weights that differ from the original weights.
    """
    start = time.perf_counter()
    values = job.measure()
    records = Records(c.out)
    known = records.find(job.kind, job.identity)
    if known is not None:
        if values["sha256"] != known["values"]["sha256"]:
            raise ValueError(
                f"{job.label}: its weights were lost, and a repeated training gave different weights, so new results "
                "would not match the stored results (cause: other hardware or other versions); expected the original "
                f"folder {known['values']['folder']}, or another --out"
            )
        return
    gpu = c.device.type == "cuda"
    records.add(
        {
            "kind": job.kind,
            "identity": job.identity,
            "values": values,
            "seconds": round(time.perf_counter() - start, 1),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(c.device) if gpu else c.device.type,
            "versions": runs.versions(),
            "commit": _commit(),
        }
    )


def _commit() -> str | None:
    """Return the commit of the code, followed by "+" if there are uncommitted changes, or None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
