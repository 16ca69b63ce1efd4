"""The line that a job leaves in a study's results."""

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
    """Measure a job and add its line, or see that weights trained again are those of the line that is there."""
    start = time.perf_counter()
    values = job.measure()
    records = Records(c.out)
    known = records.find(job.kind, job.identity)
    if known is not None:  # weights that were lost, trained again
        if values["sha256"] != known["values"]["sha256"]:
            raise ValueError(
                f"{job.label}: its weights were lost, and trained again, on other hardware or with other versions, "
                "they are others; what is missing of this model would not belong to what is there. Expected the folder "
                f"{known['values']['folder']} as it was, or another --out"
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
    """The commit that runs, with a + where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
