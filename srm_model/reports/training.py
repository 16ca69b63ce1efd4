"""Show training curves and the logged diagnostics of the neck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from srm_model.reports.blocks import look, missing, neck_heading, neck_row, row, table
from srm_model.reports.charts import Series, line_chart
from srm_model.reports.markup import Child, Markup, element
from srm_model.reports.run import Neck, Run, numbers
from srm_model.reports.text import DASH, clock, fixed, spread

# Index of the first colour of the style sheet's ordered ramp. Loss parts and stages use the ramp; necks use the
# colours before the ramp.
RAMP = 4
LOSS_PARTS = {  # name of each part, and index of its colour; defences use colours before the ramp, which has four
    "mse": ("squared error", RAMP),
    "tau": ("τ loss", RAMP + 1),
    "entropy": ("gate entropy", RAMP + 2),
    "balance": ("gate balance", RAMP + 3),
    "gradient": ("gradient norm", 1),
    "consistency": ("squared change of the score under attack", 2),
}
# Names of logged quantities, in the order of the table. Other quantities follow under their own names.
DIAGNOSTICS = {
    "links.logit_std": "standard deviation of the attention logits",
    "links.attention_entropy": "entropy of the landmark attention, as a share of uniform",
    "links.kappa": "κ, condition number of the regularised landmark matrix",
    "links.residual": "ρ, relative residual of the landmark solve",
    "links.gain": "‖X‖ / ‖RV‖, gain of the landmark solve",
    "links.sigma_before_tau": "σ̄ / √d, scale of the attention output over its target",
    "links.tau": "τ, learned rescaler of the attention output",
    "links.sigma_after_tau": "τ σ̄ / √d, the same scale after τ",
    "update_ratio": "size of the neck's update relative to the map it is added to",
    "gate_entropy": "entropy of the gate's weights, as a share of uniform",
    "norm": "‖M‖, norm of the fused map before the cap",
    "gain": "γ, factor of the gain cap",
}


def training(run: Run) -> Child:
    """Return the content of the training section: best epochs, validation SROCC, total loss and its parts."""
    trained = [neck for neck in run.necks if neck.history]
    if not trained:
        return missing("No training history was found.")
    columns = ["Neck", "epochs", "best epoch", "its validation SROCC", "images/s", "waiting for data", "time"]
    rows = [neck_row(neck.name, *_summary(neck)) for neck in trained]
    charts = [
        _curves(trained, "val_srocc", "Validation SROCC", "SROCC"),
        _curves(trained, "loss", "Training loss, total", "loss"),
        *map(_loss_parts, trained),
    ]
    title = "The checkpoint of the best epoch by validation SROCC was tested and attacked."
    return [table(columns, rows, title=title), element("div", charts, class_="panels")]


def mechanism(run: Run) -> Child:
    """Return the content of the diagnostics section: two charts and a table for each neck.

    The charts show the gate weights and the share of capped images over the epochs. The table shows the other logged
    diagnostics of the first and the last epoch.
    """
    logged = [neck for neck in run.necks if any(map(_diagnostics, neck.history))]
    if not logged:
        return missing("No diagnostics of a neck were logged.")
    return [
        [
            neck_heading(neck.name),
            element("div", _gate(neck), _cap(neck), class_="panels"),
            _diagnostics_table(neck),
        ]
        for neck in logged
    ]


def _summary(neck: Neck) -> list[str]:
    values = _column(neck, "val_srocc")
    best = int(np.nanargmax(values)) if np.isfinite(values).any() else None
    speeds, seconds = _column(neck, "images_per_second"), _column(neck, "seconds")
    waiting = _column(neck, "data_share")
    known = np.isfinite(waiting) & np.isfinite(seconds)
    share = (waiting * seconds)[known].sum() / seconds[known].sum() if known.any() else math.nan
    return [
        str(len(neck.history)),
        DASH if best is None else f"{_epochs(neck)[best]:g}",
        DASH if best is None else fixed(values[best]),
        f"{np.nanmean(speeds):.1f}" if np.isfinite(speeds).any() else DASH,
        DASH if math.isnan(share) else f"{share:.0%}",
        clock(np.nansum(seconds)) if np.isfinite(seconds).any() else DASH,
    ]


def _curves(necks: Sequence[Neck], key: str, title: str, y_label: str) -> Markup | None:
    found = [(neck, _column(neck, key)) for neck in necks]
    series = [
        Series(neck.name, _epochs(neck), values, look(neck.name))
        for neck, values in found
        if np.isfinite(values).any()
    ]
    if not series:
        return None
    limits = None
    if key == "val_srocc":
        lowest = min(float(np.nanmin(line.y)) for line in series)
        limits = (min(0.0, math.floor(5 * lowest) / 5), 1.0)
    return line_chart(series, title=title, x_label="epoch", y_label=y_label, y_limits=limits)


def _loss_parts(neck: Neck) -> Markup | None:
    """Draw the parts of the loss, each multiplied by its weight in the total loss."""
    series = []
    for part, (label, colour) in LOSS_PARTS.items():
        weight = 1 if part == "mse" else neck.config.get(f"weight_{part}")
        values = _column(neck, f"loss_{part}")
        if weight is not None and np.isfinite(values).any():
            name = label if part == "mse" else f"{weight:g} × {label}"
            series.append(Series(name, _epochs(neck), weight * values, colour))
    if len(series) < 2:
        return None
    return line_chart(series, title=f"Parts of the loss, {neck.name}", x_label="epoch", y_label="loss")


def _gate(neck: Neck) -> Markup | None:
    rows = [numbers(_diagnostics(entry).get("gate_weights")) for entry in neck.history]
    width = max(map(len, rows))
    if width == 0:
        return None
    stages = neck.config.get("fused_stages", [])
    names = [f"stage {stage}" for stage in (stages if len(stages) == width else range(1, width + 1))]
    series = [
        Series(name, _epochs(neck), [entry[i] if i < len(entry) else math.nan for entry in rows], RAMP + i)
        for i, name in enumerate(names)
    ]
    note = f"mean over images; uniform is {1 / width:.2f}"
    return line_chart(
        series, title="Gate weights", note=note, x_label="epoch", y_label="weight", y_limits=(0.0, 1.0)
    )


def _cap(neck: Neck) -> Markup | None:
    """Draw the share of images with γ < 1 in each epoch, for all training images and one batch of validation images."""
    diagnosed = [numbers(_diagnostics(entry).get("gain_active")) for entry in neck.history]
    found = {
        "training": _column(neck, "gain_active"),
        "validation": np.array([float(np.mean(share)) if share else math.nan for share in diagnosed]),
    }
    series = [
        Series(name, _epochs(neck), values, RAMP + 2 * i)
        for i, (name, values) in enumerate(found.items())
        if np.isfinite(values).any()
    ]
    if not series:
        return None
    note = "share of images that it reduces (γ < 1)"
    return line_chart(
        series, title="Gain cap", note=note, x_label="epoch", y_label="share of images", y_limits=(0.0, 1.0)
    )


def _diagnostics_table(neck: Neck) -> Markup | None:
    logged = [_quantities(_diagnostics(entry)) for entry in neck.history]
    keys = dict.fromkeys([*DIAGNOSTICS, *(key for entry in logged for key in entry)])
    rows = []
    for key in keys:
        values = [entry.get(key, []) for entry in logged]
        present = [value for value in values if value]
        if present and key not in ("gate_weights", "gain_active"):
            name = DIAGNOSTICS.get(key) or element("code", key)
            ends = [spread(value) for value in (present[0], present[-1])[: len(logged)]]
            rows.append(row(name, *ends))
    if not rows:
        return None
    columns = ["first epoch", "last epoch"] if len(logged) > 1 else ["value"]
    title = "Medians over a batch of validation images; in brackets the range over links, stages or heads."
    return table(["Quantity", *columns], rows, title=title)


def _quantities(diagnostics: dict[str, Any]) -> dict[str, list[float]]:
    """Return a dict from each quantity to its values, for all links and heads.

    Where quantiles of a quantity were logged, its only values are the medians.
    """
    found: dict[str, list[float]] = {}
    for key, value in diagnostics.items():
        if key != "links" or not isinstance(value, dict):
            found[key] = _values(value)
            continue
        for link in value.values():
            for name, entry in link.items() if isinstance(link, dict) else ():
                found.setdefault(f"links.{name}", []).extend(_values(entry))
    return found


def _values(value: Any) -> list[float]:
    return numbers(value.get("median")) if isinstance(value, dict) and "median" in value else numbers(value)


def _epochs(neck: Neck) -> list[float]:
    """Return the numbers of the epochs, counted from 1."""
    return [float(i) for i in range(1, len(neck.history) + 1)]


def _column(neck: Neck, key: str) -> np.ndarray:
    """Return the values of a logged quantity, one per epoch. Missing values are NaN."""
    found = [numbers(entry.get(key)) for entry in neck.history]
    return np.array([values[0] if values else math.nan for values in found])


def _diagnostics(entry: dict[str, Any]) -> dict[str, Any]:
    logged = entry.get("diagnostics")
    return logged if isinstance(logged, dict) else {}
