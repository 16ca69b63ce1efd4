"""Write the page of an audit: the verdict, the checks, the curves and, if present, the certificates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srm_model.files import write_text
from srm_model.reports.blocks import caption, missing, row, section, table, whole_page
from srm_model.reports.charts import Series, line_chart
from srm_model.reports.markup import Child, Markup, element
from srm_model.reports.text import budget_text, count, fixed, listing, significant


def write_audit(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of an audit.

    Args:
        document: `Audit.to_dict()` or the contents of audit.json. `Audit.to_dict()` contains all required keys. Three
            more keys are optional: `title`, `dataset` (a text) and `certificates`. An audit.json of an older version
            has no key `has_gradient`, which then counts as true.
        path: File to write.

    Returns:
        The path.
    """
    path = Path(path)
    write_text(path, _render(document))
    return path


def _render(document: Mapping[str, Any]) -> Markup:
    title = str(document.get("title") or f"Audit of {document['model']}")
    main = element(
        "main",
        element("header", element("h1", title), element("p", _settings(document), class_="meta")),
        _verdict(document),
        section("Checks", _checks(document)),
        section("Curves", _curves(document)),
        _certificates(document),
        section("Limits of this page", *(element("p", text) for text in _LIMITS)),
    )
    return whole_page(title, main)


_LIMITS = (
    "The checks find attacks that do not work; they do not prove that a model is robust. Another attack may still "
    "break a model that passes all checks. If a model fails a check, its robust figures are not reliable.",
    "Reach is how far an attack moves a score, in units of the score. It is the mean over attacks that raise the score "
    "and attacks that lower it, and over the images. It is measured on a few images; if a check passes narrowly, "
    "repeat it with more images.",
)


def _settings(document: Mapping[str, Any]) -> str:
    parts = [
        budget_text((document["norm"], document["eps"])),
        count(document["images"], "image"),
        f"PGD with {count(document['steps'], 'step')} and {count(document['restarts'], 'restart')}",
        f"{document['queries']:,} queries",
        f"seed {document['seed']}",
    ]
    if document.get("dataset"):
        parts.insert(0, str(document["dataset"]))
    return " · ".join(parts)


def _verdict(document: Mapping[str, Any]) -> Markup:
    failed = [check["title"].lower() for check in document["checks"] if check["passed"] is False]
    open_ = [check["title"].lower() for check in document["checks"] if check["passed"] is None]
    if not document.get("has_gradient", True):
        return _without_gradient(failed, open_, len(document["checks"]))
    if failed:
        said = element("strong", f"{count(len(failed), 'check')} failed.")
        rest = (
            f" Not true of this model: {listing(failed)}. Its figures under gradient attacks do not measure its "
            "robustness until the cause is known."
        )
        return element("p", said, rest, class_="notice", role="note")
    asked = len(document["checks"]) - len(open_)
    rest = f" All {asked} checks that could be run passed: the attacks work on this model as they should."
    if open_:
        rest += f" Not run: {listing(open_)}."
    return element("p", element("b", "No check failed."), rest, class_="lede")


def _without_gradient(failed: list[str], open_: list[str], checks: int) -> Markup:
    said = (
        " This is not evidence of robustness: only attacks that use scores alone apply, and they are weaker than "
        "gradient attacks. If the model is meant to be differentiable, something in it stops the gradient, for example "
        f"torch.no_grad or detach. Not run: {listing(open_)}."
    )
    if failed:
        said += f" Of the other checks, {len(failed)} failed. Not true of this model: {listing(failed)}."
    else:
        said += f" The other {checks - len(open_)} checks passed."
    strong = element("strong", "The scores have no gradient.")
    return element("p", strong, said, class_="notice", role="note")


def _checks(document: Mapping[str, Any]) -> Markup:
    rows = [
        row(
            check["title"],
            _mark(check["passed"]),
            check["figure"],
            check["meaning"],
            words=(1, 2, 3),
            class_=None if check["passed"] is not False else "changed",
        )
        for check in document["checks"]
    ]
    return table(["Check", "verdict", "measured", "what failing means"], rows, words=range(4))


def _mark(passed: bool | None) -> Markup:
    if passed is None:
        return element("span", "not run", class_="missing")
    return element("span", "passed" if passed else "failed", class_=None if passed else "fail")


def _curves(document: Mapping[str, Any]) -> Child:
    checks = {check["name"]: check for check in document["checks"]}
    charts = []
    for name, title, label in (
        ("steps", "Reach over the steps of PGD, fixed step size and start", "step"),
        ("eps", "Reach over the budget", "multiple of ε"),
    ):
        data = checks.get(name, {}).get("data") or {}
        values = [math.nan if y is None else y for y in data.get("y", [])]
        if any(map(math.isfinite, values)):
            series = Series("reach", data["x"], values, 0)
            charts.append(line_chart([series], title=title, x_label=label, y_label="reach"))
    if not charts:
        return missing("No gradient attack could be run, so there are no curves.")
    return element("div", charts, class_="panels")


def _certificates(document: Mapping[str, Any]) -> Markup | None:
    found = document.get("certificates")
    if not found:
        return None
    rows = []
    for entry in found:
        widths = [
            high - low
            for low, high in zip(entry["lower"], entry["upper"], strict=True)
            if low is not None and high is not None and math.isfinite(high - low)
        ]
        middle = sorted(widths)[len(widths) // 2] if widths else math.nan
        rows.append(
            row(
                f"L2 ε = {entry['stated']:g} at 512² ({significant(entry['eps'])} here)",
                f"{len(widths)} of {len(entry['lower'])}",
                fixed(middle),
                f"{100 * entry['ordered']:.0f} %",
            )
        )
    first = found[0]
    return section(
        "Bounds by median smoothing",
        table(["Budget", "images bounded", "median width", "pairs whose order is certain"], rows),
        caption(
            f"Noise σ = {first['sigma']:g} per pixel value, {first['samples']:,} noisy copies of each image, "
            f"confidence {first['confidence']:g} per interval. The interval bounds the median-smoothed score, which "
            "is a different and slower model; it proves nothing about the model that was attacked above. The order "
            "of a pair is certain if the two intervals do not overlap."
        ),
    )
