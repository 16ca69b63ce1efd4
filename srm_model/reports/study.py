"""Write the page of a study, and write the tables and figures of the study as separate files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srm_model.files import write_text
from srm_model.reports.blocks import whole_page
from srm_model.reports.markup import Markup, element, join
from srm_model.reports.pictures import png_uri
from srm_model.reports.records import StudyResults
from srm_model.reports.study_figures import figures
from srm_model.reports.study_tables import Table, html, markdown, tables


def write_study(
    folder: str | Path,
    *,
    table_numbers: Sequence[int] | None = None,
    figure_numbers: Sequence[int] | None = None,
    out: str | Path | None = None,
) -> tuple[list[Table], list[Path]]:
    """Write a study's tables (Markdown, HTML) and figures (SVG, PNG) to `tables/` and `figures/` in its folder.

    If neither `table_numbers` nor `figure_numbers` is given, the function writes all tables and figures, and a page
    that shows all of them. Otherwise, it writes only the tables and figures whose numbers are given.

    Args:
        folder: Folder of the study.
        table_numbers: Numbers of the tables to write.
        figure_numbers: Numbers of the figures to write.
        out: File of the page with all tables and figures. Default: `report.html` in the study's folder. If
            `table_numbers` or `figure_numbers` is given, no page is written.

    Returns:
        The tables, and the paths of all written files.

    Raises:
        ValueError: The folder is not the folder of a study, or a given number belongs to no table or figure.
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
    title = f"Figure {path.stem.rpartition('-')[2]}"
    image = element("img", src=png_uri(path.read_bytes()), alt=title, style="max-width: 100%")
    return element("figure", element("figcaption", title), image)


def _page(title: str, content: Markup) -> Markup:
    return whole_page(title, element("main", element("h1", title), content))
