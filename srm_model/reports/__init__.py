"""Write self-contained HTML reports of runs, studies and audits."""

from __future__ import annotations

from pathlib import Path

from srm_model.files import write_text
from srm_model.reports.audit import write_audit
from srm_model.reports.page import render
from srm_model.reports.run import read_run
from srm_model.reports.study import write_study

__all__ = ["write_audit", "write_report", "write_study"]


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run as a single page, with pictures as data URIs, charts as inline SVG and no scripts.

    The page names the parts that are missing from the run.

    Args:
        run: Run folder, or the folder `--out` of `srm-iqa attack --model`.
        out: File to write. Default: `report.html` in the run folder.

    Returns:
        The path of the page.

    Raises:
        ValueError: The folder is missing or is not a run folder, or a file in it is malformed.
    """
    run = Path(run)
    path = Path(out) if out is not None else run / "report.html"
    write_text(path, render(read_run(run)))
    return path
