"""Build the parts of the HTML pages: sections, tables, and headings with the names of necks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from srm_model.necks import NECKS
from srm_model.reports.charts import swatch
from srm_model.reports.markup import Child, Markup, element, join
from srm_model.reports.style import STYLE
from srm_model.reports.text import setting


def look(neck: str) -> int:
    """Return the index of the neck's colour, dash and marker, which are the same in every chart.

    The name of a model from another package gives 0, because a page shows only one such model.
    """
    return NECKS[neck].look if neck in NECKS else 0


def whole_page(title: str, main: Markup) -> Markup:
    """Return a complete HTML document whose body contains the element `main`."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    return join(Markup("<!doctype html>\n"), element("html", head, element("body", main), lang="en"), "\n")


def section(title: str, *content: Child) -> Markup:
    return element("section", element("h2", title), *content)


def missing(text: str) -> Markup:
    """Return a note that says which part of the run is missing."""
    return element("p", text, class_="missing")


def caption(text: str) -> Markup:
    return element("p", text, class_="caption")


def neck_heading(neck: str) -> Markup:
    return element("h3", swatch(look(neck)), neck)


def table(
    columns: Sequence[str], rows: Sequence[Markup], *, words: Iterable[int] = (0,), title: str | None = None
) -> Markup:
    """Return a scrollable table.

    `words` are the indices of the columns that contain words. The headings of these columns are left-aligned; the other
    headings are right-aligned. The cells of `rows` keep their own alignment.
    """
    left = set(words)
    head = [
        element("th", name, class_=None if i in left else "n", scope="col") for i, name in enumerate(columns)
    ]
    body = element(
        "table",
        element("caption", title) if title else None,
        element("thead", element("tr", head)),
        element("tbody", rows),
    )
    return element("div", body, class_="scroll", tabindex=0)


def row(head: Child, *cells: Child, words: Iterable[int] = (), class_: str | None = None) -> Markup:
    """Return a table row: a heading, then cells.

    `words` are the positions of the cells that contain words; the first cell after the heading has position 1. These
    cells are left-aligned; the other cells are right-aligned.
    """
    left = set(words)
    data = [element("td", cell, class_=None if i in left else "n") for i, cell in enumerate(cells, start=1)]
    return element("tr", element("th", head, scope="row"), data, class_=class_)


def neck_row(neck: str, *cells: Child) -> Markup:
    name = element("th", swatch(look(neck)), neck, class_="neck", scope="row")
    return element("tr", name, [element("td", cell, class_="n") for cell in cells])


def group(title: str, columns: int) -> Markup:
    """Return a heading that spans all columns of a table."""
    return element("tr", element("th", title, colspan=columns, scope="rowgroup"), class_="group")


def pairs(values: Mapping[str, Any]) -> Markup:
    """Return a table of names and values. The entries of a nested dict become rows named `outer.inner`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if nested else {key: value}
    rows = [row(key, element("code", setting(value)), words=(1,)) for key, value in flat.items()]
    return element("div", element("table", element("tbody", rows)), class_="scroll", tabindex=0)
