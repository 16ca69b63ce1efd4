"""Run one job of a study, or all jobs without a result; several processes on this machine can share the jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from srm_model import runs
from srm_model.checkpoint import CONFIG
from srm_model.files import claimed, read_json
from srm_model.reports.records import Records
from srm_model.study.context import Context
from srm_model.study.jobs import CLEAN, Job
from srm_model.study.records import record

CLAIMS = "claims.lock"
WAIT = 2.0  # seconds between checks for results of other processes


def missing(jobs: Sequence[Job], out: Path) -> list[Job]:
    """Return jobs without a result, and finished trainings that must run again.

    A finished training must run again if a job without a result needs its weights, but the weights are lost or changed.
    """
    records = Records(out)
    without = [job for job in jobs if records.find(job.kind, job.identity) is None]
    trained = {
        str(job.needs[0].folder): line["values"]["sha256"]
        for job in jobs
        if job.kind == CLEAN and (line := records.find(CLEAN, job.identity)) is not None
    }
    needed = {str(model.folder) for job in without if job.kind != CLEAN for model in job.needs}
    lost = {
        folder
        for folder in needed & trained.keys()
        if not (path := out / folder / CONFIG).is_file() or read_json(path)["sha256"] != trained[folder]
    }
    return [job for job in jobs if job in without or (job.kind == CLEAN and str(job.needs[0].folder) in lost)]


def share(jobs: Sequence[Job], c: Context) -> None:
    """Run the jobs that `missing` returns, until no job is left; skip a job while another process runs it."""
    while left := missing(jobs, c.out):
        untrained, count, idle = _untrained(left), len(left), True
        for job in left:
            if _waits_for(job, untrained):
                continue
            if _attempt(job, jobs, c, f"{count} to do: {job.label}"):
                idle, count = False, count - 1
                untrained.pop(str(job.needs[0].folder) if job.kind == CLEAN else "", None)
        if idle:
            time.sleep(WAIT)


def find_job(name: str, jobs: Sequence[Job], out: Path) -> Job | None:
    """Return the job with this name, or None if the job need not run (see `missing`).

    Raises:
        ValueError: No job has this name, or the job needs a training that must run first.
    """
    job = next((job for job in jobs if job.name == name), None)
    if job is None:
        raise ValueError(f"job {name!r}: not in the study; expected a name that --list prints")
    left = missing(jobs, out)
    if job not in left:
        return None
    if waiting := _waits_for(job, _untrained(left)):
        raise ValueError(f"job {name!r}: needs {', '.join(waiting)}; run that first")
    return job


def do_one(job: Job, jobs: Sequence[Job], c: Context) -> None:
    """Run a job; raise ValueError if another process runs it or has finished it."""
    if not _attempt(job, jobs, c, job.label):
        raise ValueError(f"job {job.name!r}: another process on this machine is doing it")


def _untrained(left: Sequence[Job]) -> dict[str, str]:
    """Return the names of the training jobs in `left`, keyed by the model's folder."""
    return {str(job.needs[0].folder): job.name for job in left if job.kind == CLEAN}


def _waits_for(job: Job, untrained: dict[str, str]) -> list[str]:
    """Return the names of the trainings that must run before a job."""
    folders = () if job.kind == CLEAN else [str(model.folder) for model in job.needs]
    return [untrained[folder] for folder in folders if folder in untrained]


def claim_of(job: Job) -> str:
    """Return the name that a process locks while it runs a job."""
    return f"{job.kind} {json.dumps(job.identity)}"


def _attempt(job: Job, jobs: Sequence[Job], c: Context, note: str) -> bool:
    """Run a job unless another process runs it or has finished it; return whether this process ran it."""
    with claimed(c.out / CLAIMS, claim_of(job)) as mine:
        if not mine or job not in missing(jobs, c.out):
            return False
        if c.progress:
            runs.say(note)
        record(job, c)
        return True


def check_sets(jobs: Sequence[Job], out: Path) -> None:
    """Raise ValueError if the fingerprint of a dataset has changed since a model was trained on the dataset."""
    records = Records(out)
    for job in (job for job in jobs if job.kind == CLEAN):
        line = records.elsewhere(CLEAN, job.identity, "fingerprint")
        if line is not None:
            raise ValueError(
                f"{out}: its results were measured on another version of the dataset {job.identity['data']} "
                f"(fingerprint {line['identity']['fingerprint'][:12]}, now {job.identity['fingerprint'][:12]}); "
                "expected the same dataset, or another folder with --out"
            )
