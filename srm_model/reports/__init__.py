"""Self-contained HTML pages: about a run, its results, pictures, curves and settings; and about an audit."""

from __future__ import annotations

from pathlib import Path

from srm_model.files import write_text
from srm_model.reports.audit import write_audit
from srm_model.reports.page import render
from srm_model.reports.run import read_run
from srm_model.reports.study import write_study

__all__ = ["write_audit", "write_report", "write_study"]


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of the run folder `run` to `out`, by default `report.html` in the folder; returns its path.

    The page holds everything it shows: pictures as data URIs, charts as inline SVG, no scripts. Parts that the
    run lacks are said to be missing. A folder that is absent or no run, or a file in it that is broken, is a
    ValueError that names it.
    """
    run = Path(run)
    path = Path(out) if out is not None else run / "report.html"
    write_text(path, render(read_run(run)))
    return path
