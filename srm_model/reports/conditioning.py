"""Build the page of `srm-iqa diagnose`: tables and curves of the conditioning, and pictures of landmark positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from srm_kernels.landmarks import LANDMARK_METHODS
from srm_model.reports.blocks import caption, missing, row, section, table, whole_page
from srm_model.reports.charts import Series, line_chart
from srm_model.reports.markup import Child, Markup, element
from srm_model.reports.pictures import png_bytes, png_uri
from srm_model.reports.text import count, listing, significant

_DISC = {"fill": "#ffd23f", "fill_opacity": "0.75", "stroke": "#101820", "stroke_width": "0.7"}
QUANTILES = ("median", "p90", "max")
COLUMNS = ("κ median", "p90", "max", "ρ median", "p90", "max", "error median", "p90", "max", "solved by")


def render(found: Mapping[str, Any], about: Mapping[str, Any], images: Sequence[Image.Image]) -> Markup:
    """Return the page as HTML.

    Args:
        found: Result of `diagnose`.
        about: A mapping with the name of the checkpoint as "checkpoint", the name of the dataset as "data", and the
            number of images as "images".
        images: The images whose landmark positions are in `found`.
    """
    lede = (
        f"Checkpoint {about['checkpoint']}, {count(int(about['images']), 'image')} of {about['data']}, "
        f"{_landmark_count(found)}. Every link, head and image has its own system."
    )
    title = element("h1", "Conditioning of the landmark systems")
    main = element(
        "main",
        element("header", title, element("p", lede, class_="lede")),
        section("By setting (the article's Table 1)", _table(found)),
        section("By link and head", _links(found)),
        section("Condition numbers and spectra", _curves(found)),
        section("Error of the attention by landmarks", _errors(found)),
        section("Changes in the choice of landmarks", _changes(found)),
        section("Positions of the landmarks", _landmarks(found, images)),
    )
    return whole_page("Conditioning", main)


def _landmark_count(found: Mapping[str, Any]) -> str:
    """Return a text with the number of landmarks in use. A link with fewer keys than `rank` uses one per key."""
    counts = sorted({link["rank"] for link in found["links"].values()})
    used = f"r = {' or '.join(map(str, counts))}"
    few = "" if counts == [found["rank"]] else f" instead of {found['rank']}, because there are no more keys"
    return used + few


def markdown(found: Mapping[str, Any]) -> str:
    """Format `found` as four Markdown tables.

    The first table is Table 1 of the article, with one row for each setting. The second table has one row for each
    link. The third and the fourth table have one row for each landmark method. The third table shows the median error
    of the attention for each r. The fourth table shows the share of landmark sets that change when every pixel
    changes by a small step.
    """
    ranks, methods = _ranks(found), _methods(found)
    links = {name: _cells(link["all"]) for name, link in found["links"].items()}
    tables = [
        _grid("setting", COLUMNS, {name: _cells(value) for name, value in found["table"].items()}),
        _grid("link", COLUMNS, links),
        _grid(
            "median error, landmarks",
            [f"r = {rank}" for rank in ranks],
            {name: _by_rank(found, method, ranks) for method, name in methods},
        ),
        _grid(
            "sets of landmarks that change",
            _steps(found),
            {name: _by_step(found, method) for method, name in methods},
        ),
    ]
    return "\n".join(tables)


def _grid(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def _methods(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names and titles of the landmark methods that were measured."""
    return [
        (name, LANDMARK_METHODS[name].title) for name in dict.fromkeys(e["method"] for e in found["errors"])
    ]


def _ranks(found: Mapping[str, Any]) -> list[int]:
    return sorted({entry["rank"] for entry in found["errors"]})


def _steps(found: Mapping[str, Any]) -> list[str]:
    return [f"{step:g}/255" for step in dict.fromkeys(entry["step"] for entry in found["changes"])]


def _by_step(found: Mapping[str, Any], method: str) -> list[str]:
    shares = [entry["share"] for entry in found["changes"] if entry["method"] == method]
    return [f"{100 * share:.3g} %" for share in shares]


def _cells(summary: Mapping[str, Any]) -> list[str]:
    figures = [
        _figure(summary[name][quantile]) for name in ("kappa", "residual", "error") for quantile in QUANTILES
    ]
    solvers = summary["solvers"]
    return [*figures, listing(_share(name, share) for name, share in solvers.items())]


def _share(name: str, share: float) -> str:
    return name if share == 1 else f"{name} {100 * share:.3g} %"


def _figure(value: float | None) -> str:
    return "∞" if value is None or not math.isfinite(value) else significant(value)


def _by_rank(found: Mapping[str, Any], method: str, ranks: Sequence[int]) -> list[str]:
    values = {entry["rank"]: entry["median"] for entry in found["errors"] if entry["method"] == method}
    return [_figure(values[rank]) if rank in values else "" for rank in ranks]


def _table(found: Mapping[str, Any]) -> Child:
    last = (len(COLUMNS),)
    rows = [
        row(name, *_cells(value), words=last, class_="total" if name == "full" else None)
        for name, value in found["table"].items()
    ]
    return [
        table(["Setting", *COLUMNS], rows, words=(0, *last)),
        caption(
            "full: the checkpoint's own settings; each other row changes one of them. no fp32: the softmax blocks in "
            "bf16. κ = σ_max/σ_min of W + λI, or of the equilibrated system. ρ: relative residual of the solve. "
            "error: ‖Y − Y*‖/‖Y*‖ of the attention against exact attention with the same keys. ∞: the system is "
            "singular or its solution is not finite."
        ),
    ]


def _links(found: Mapping[str, Any]) -> Child:
    last = (len(COLUMNS),)
    rows = []
    for name, link in found["links"].items():
        rows.append(row(name, *_cells(link["all"]), words=last, class_="total"))
        rows += [
            row(f"{name}, head {number}", *_cells(head), words=last)
            for number, head in enumerate(link["heads"], 1)
        ]
    return table(["Link", *COLUMNS], rows, words=(0, *last))


def _curves(found: Mapping[str, Any]) -> Child:
    kappas, spectra = [], []
    for look, (name, link) in enumerate(found["links"].items()):
        values = np.log10([value for value in link["kappas"] if value is not None and value > 0])
        values = values[np.isfinite(values)]
        if len(values):
            kappas.append(Series(name, values, np.arange(1, len(values) + 1) / len(link["kappas"]), look))
        median = np.array(link["spectrum"]["median"])
        spectra.append(Series(name, np.arange(1, len(median) + 1), np.log10(median), look))
    charts = []
    if kappas:
        charts.append(
            line_chart(
                kappas,
                title="Distribution of κ",
                note="share of systems with a smaller condition number",
                x_label="log₁₀ κ",
                y_label="share",
                y_limits=(0.0, 1.0),
                epochs=False,
            )
        )
    charts.append(
        line_chart(
            spectra,
            title="Singular values of W + λI",
            note="median over systems, largest first",
            x_label="index",
            y_label="log₁₀ σ",
            epochs=False,
        )
    )
    return element("div", charts, class_="panels")


def _errors(found: Mapping[str, Any]) -> Child:
    ranks = _ranks(found)
    rows = [row(name, *_by_rank(found, method, ranks)) for method, name in _methods(found)]
    series = []
    for look, (method, name) in enumerate(_methods(found)):
        known = [
            (math.log2(entry["rank"]), math.log10(entry["median"]))
            for entry in found["errors"]
            if entry["method"] == method and entry["median"] and math.isfinite(entry["median"])
        ]
        if len(known) > 1:
            series.append(Series(name, [x for x, _ in known], [y for _, y in known], look))
    chart = None
    if series:
        chart = line_chart(
            series,
            title="Median error of the attention",
            x_label="log₂ r",
            y_label="log₁₀ error",
            epochs=False,
        )
    title = "Median of ‖Y − Y*‖/‖Y*‖ over links, heads and images, with the solver of the checkpoint."
    numbers = table(["Landmarks", *(f"r = {rank}" for rank in ranks)], rows, title=title)
    return element("div", numbers, chart, class_="pair")


def _changes(found: Mapping[str, Any]) -> Child:
    rows = [row(name, *_by_step(found, method)) for method, name in _methods(found)]
    return [
        table(["Landmarks", *_steps(found)], rows),
        caption(
            "Share of landmark sets that change when every pixel moves up or down by this step, over the links, heads "
            "and images of one batch. When a set changes, the score jumps. No gradient shows this jump, so gradient "
            "attacks may overstate robustness."
        ),
    ]


def _landmarks(found: Mapping[str, Any], images: Sequence[Image.Image]) -> Child:
    blocks: list[Child] = []
    for number, image in enumerate(images):
        for name in found["links"]:
            maps = [e for e in found["landmarks"] if e["image"] == number and e["link"] == name]
            if maps:
                figures = [_map(image, entry) for entry in maps]
                blocks.append(element("h3", f"Image {number + 1}, {name}"))
                blocks.append(element("div", figures, class_="strip", style=f"--columns: {len(figures)}"))
    shown = caption("A disc marks a key that a head chose. It is larger if more heads chose the key.")
    return [shown, *blocks] if blocks else missing("No picture was kept.")


def _map(image: Image.Image, entry: Mapping[str, Any]) -> Markup:
    counts = np.array(entry["counts"])
    height, width = counts.shape
    discs = []
    for y, x in zip(*np.nonzero(counts), strict=True):
        share = counts[y, x] / entry["heads"]
        radius = 240 / max(height, width) * (0.12 + 0.3 * math.sqrt(min(share, 1.0)))
        cx, cy = (x + 0.5) * 240 / width, (y + 0.5) * 240 / height
        place = {"cx": f"{cx:.1f}", "cy": f"{cy:.1f}", "r": f"{radius:.1f}"}
        discs.append(element("circle", **place, **_DISC))
    shown = png_bytes(image.convert("RGB").resize((240, 240)))
    picture = element("image", href=png_uri(shown), width=240, height=240)
    label = (
        f"{LANDMARK_METHODS[entry['method']].title}: {count(int((counts > 0).sum()), 'key')} of {counts.size}"
    )
    svg = element("svg", picture, discs, viewBox="0 0 240 240", role="img", aria_label=label)
    return element("figure", svg, element("figcaption", label))
