"""A study as one page, and its tables and figures as files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from srm_model.files import write_text
from srm_model.reports.blocks import whole_page
from srm_model.reports.figures import figures
from srm_model.reports.markup import Markup, element, join
from srm_model.reports.records import StudyResults
from srm_model.reports.tables import Table, html, markdown, tables


def write_study(
    folder: str | Path,
    *,
    table_numbers: Sequence[int] | None = None,
    figure_numbers: Sequence[int] | None = None,
    out: str | Path | None = None,
) -> tuple[list[Table], list[Path]]:
    """Write tables (Markdown, HTML) and figures (SVG, PNG) of the study in `folder`; returns tables and files.

    They go to `tables/` and `figures/` in the folder, and with nothing chosen by number all of them to one page
    `report.html`, or `out`, too. A table without results says so.
    """
    folder = Path(folder)
    results = StudyResults.read(folder)
    every = table_numbers is None and figure_numbers is None
    chosen = tables(results, table_numbers) if every or table_numbers is not None else []
    written = []
    for table in chosen:
        place = folder / "tables" / f"table-{table.number:02d}"
        write_text(place.with_suffix(".md"), markdown(table))
        write_text(place.with_suffix(".html"), _page(f"{results.title}, table {table.number}", html(table)))
        written += [place.with_suffix(".md"), place.with_suffix(".html")]
    drawn: list[Path] = []
    if every or figure_numbers is not None:
        drawn = figures(results, folder / "figures", figure_numbers)
    written += drawn
    if every:
        pictures = [_picture(path) for path in drawn if path.suffix == ".png"]
        page = Path(out) if out is not None else folder / "report.html"
        content = join([html(table) for table in chosen], pictures)
        write_text(page, _page(results.title, content))
        written.append(page)
    return chosen, written


def _picture(path: Path) -> Markup:
    number = path.stem.rpartition("-")[2]
    data = base64.b64encode(path.read_bytes()).decode()
    image = element(
        "img", src=f"data:image/png;base64,{data}", alt=f"Figure {number}", style="max-width: 100%"
    )
    return element("figure", element("figcaption", f"Figure {number}"), image)


def _page(title: str, content: Markup) -> Markup:
    return whole_page(title, element("main", element("h1", title), content))
