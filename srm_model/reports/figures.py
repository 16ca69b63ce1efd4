"""Figures 3 to 5 of the article and one of our own, from a study's results, as SVG and PNG; they need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srm_model.files import atomic_path
from srm_model.reports.records import StudyResults, grouped
from srm_model.reports.text import attack_text, budget_text

FULL = "full"
# Okabe and Ito's, as on the report's page; each series has its own dash and marker too.
_COLOURS = ("#0072b2", "#c8540a", "#00805f", "#9a4f80", "#5f45a8", "#56b4e9")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8e5",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "srm-iqa",
    "figure.constrained_layout.use": True,
}


def figures(results: StudyResults, folder: str | Path, numbers: Sequence[int] | None = None) -> list[Path]:
    """Write the figures asked for, by default all, as figure-N.svg and .png; returns what was written.

    A figure whose results are missing is left out. Without matplotlib: a ModuleNotFoundError that says what to install.
    """
    for number in numbers or ():
        if number not in _BUILDERS:
            raise ValueError(
                f"figure {number}: the ones drawn from results are {', '.join(map(str, _BUILDERS))}"
            )
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "figures need matplotlib, which is not installed: pip install 'srm-iqa[figures]'"
        ) from None
    written = []
    with rc_context(_STYLE):
        for number in numbers or _BUILDERS:
            figure = Figure(figsize=(7.2, 2.9))
            if not _BUILDERS[number](results, figure):
                continue
            for suffix, settings in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 200})):
                path = Path(folder) / f"figure-{number}.{suffix}"
                with atomic_path(path) as temporary:
                    figure.savefig(temporary, format=suffix, **settings)
                written.append(path)
    return written


def _look(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def _name(identity: dict[str, Any]) -> str:
    return f"{identity['neck']}, {identity['backbone']}, {identity['data']}"


def _full(results: StudyResults, kind: str) -> list[dict[str, Any]]:
    return [line for line in results.records.of(kind) if line["identity"]["variant"] == FULL]


def _scale(results: StudyResults, figure: Any) -> bool:
    """Figure 3: the scale before and after τ, and τ, over the epochs; the mean over seeds."""
    groups = grouped(_full(results, "diagnostics"), "data", "backbone", "neck")
    if not groups:
        return False
    left, right = figure.subplots(1, 2)
    for number, group in enumerate(groups):
        epochs = [row["epoch"] for row in group[0]["values"]["trajectory"]]

        def over(name: str, group: list[dict[str, Any]] = group) -> np.ndarray:
            return np.mean([[row[name] for row in line["values"]["trajectory"]] for line in group], axis=0)

        look = _look(number)
        name = _name(group[0]["identity"])
        left.plot(epochs, over("sigma_before_tau"), **{**look, "linestyle": ":"}, label=f"{name}, before τ")
        left.plot(epochs, over("sigma_after_tau"), **{**look, "linestyle": "-"}, label=f"{name}, after τ")
        right.plot(epochs, over("tau"), **look, label=name)
    left.axhline(1, color="#5a626b", linewidth=0.8)
    left.set(xlabel="epoch", ylabel="σ̄ / √d, median", title="Scale of the attention output")
    right.set(xlabel="epoch", ylabel="τ, median", title="Learned rescaler")
    left.legend(fontsize=7)
    return True


def _gate(results: StudyResults, figure: Any) -> bool:
    """Figure 4: entropy, mean weights, γ and ‖M‖ of the gate over the test images of all seeds."""
    groups = grouped(_full(results, "diagnostics"), "data", "backbone", "neck")
    if not groups:
        return False
    figure.set_size_inches(7.2, 5.4)
    axes = figure.subplots(2, 2)
    for number, group in enumerate(groups):
        gate: dict[str, list[Any]] = {
            key: [value for line in group for value in line["values"]["gate"][key]]
            for key in ("entropy", "weights", "gain", "norm")
        }
        look = {"color": _COLOURS[number % len(_COLOURS)], "label": _name(group[0]["identity"]), "alpha": 0.6}
        stages = np.asarray(gate["weights"]).shape[1]
        width = 0.8 / len(groups)
        axes[0, 0].hist(gate["entropy"], bins=30, range=(0, np.log(max(stages, 2)) * 1.001), **look)
        axes[0, 1].bar(np.arange(stages) + number * width, np.mean(gate["weights"], axis=0), width, **look)
        axes[1, 0].hist(gate["gain"], bins=30, range=(0, 1.001), **look)
        axes[1, 1].hist(gate["norm"], bins=30, **look)
    fused = results.study["config"]["fused_stages"]
    axes[0, 0].axvline(
        results.study["config"]["entropy_floor"] * np.log(max(len(fused), 2)), color="#5a626b", linewidth=0.8
    )
    axes[0, 0].set(xlabel="entropy H(a); the line is H_min", ylabel="images", title="Entropy of the weights")
    axes[0, 1].set(ylabel="mean weight", title="Mean routing mass", ylim=(0, 1))
    axes[0, 1].set_xticks(
        np.arange(len(fused)) + 0.4 - 0.4 / len(groups), [f"stage {stage}" for stage in fused]
    )
    axes[1, 0].set(xlabel="γ", ylabel="images", title="Gain cap")
    axes[1, 1].set(xlabel="‖M‖ before the cap", ylabel="images", title="Magnitude of the fused map")
    axes[0, 1].legend(fontsize=7)
    return True


def _steps(results: StudyResults, figure: Any) -> bool:
    """Figure 5: SROCC against PGD's steps, mean and standard deviation over seeds."""
    groups = grouped(_full(results, "sweep"), "data", "backbone", "neck", "norm", "eps")
    if not groups:
        return False
    names = list(groups[0][0]["values"]["rows"][0]["attacks"])
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, attack in zip(axes, names, strict=True):
        for number, group in enumerate(groups):
            steps = [row["steps"] for row in group[0]["values"]["rows"]]
            values = np.array(
                [
                    [
                        np.nan if (found := row["attacks"][attack]["srocc"]) is None else found
                        for row in line["values"]["rows"]
                    ]
                    for line in group
                ],
                dtype=float,
            )
            spread = values.std(0, ddof=1) if len(values) > 1 else None
            axis.errorbar(
                steps,
                values.mean(0),
                yerr=spread,
                capsize=2,
                **_look(number),
                label=_name(group[0]["identity"]),
            )
        axis.set_xscale("log")
        axis.set_xticks(steps, list(map(str, steps)))
        axis.minorticks_off()
        axis.set(xlabel="PGD steps", title=attack_text(attack), ylim=(-1.05, 1.05))
    identity = groups[0][0]["identity"]
    axes[0].set_ylabel(f"SROCC at {budget_text((identity['norm'], identity['eps']))}")
    axes[0].legend(fontsize=7)
    return True


def _budgets(results: StudyResults, figure: Any) -> bool:
    """Figure 6: the worst SROCC of the suite against the budget, mean and standard deviation over seeds."""
    lines = [line for line in results.records.of("attack") if len(_budgets_of(results, line)) > 1]
    norms = list(dict.fromkeys(line["identity"]["norm"] for line in lines))
    if not norms:
        return False
    figure.set_size_inches(7.2, 3.6)
    axes = figure.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    for axis, norm in zip(axes, norms, strict=True):
        of_norm = [line for line in lines if line["identity"]["norm"] == norm]
        ticks: set[float] = set()
        for number, group in enumerate(grouped(of_norm, "data", "backbone", "neck", "variant")):
            worst = {
                same[0]["identity"]["eps"]: [
                    math.nan if (found := line["values"]["worst"]["srocc"]) is None else found
                    for line in same
                ]
                for same in grouped(group, "eps")
            }
            budgets = sorted(worst)
            values = [worst[eps] for eps in budgets]
            shown = [eps * 255 if norm == "linf" else eps for eps in budgets]
            ticks |= set(shown)
            axis.errorbar(
                shown,
                [np.mean(v) for v in values],
                yerr=[np.std(v, ddof=1) for v in values] if min(map(len, values)) > 1 else None,
                capsize=2,
                **_look(number),
                label=_variant(group[0]["identity"], of_norm),
            )
        axis.axhline(0, color="#5a626b", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
        axis.minorticks_off()
        axis.set(
            xlabel="ε, in 1/255" if norm == "linf" else "ε, as stated at 512×512",
            title="L∞" if norm == "linf" else "L2",
            ylim=(-1.05, 1.05),
        )
    axes[0].set_ylabel("worst SROCC over the suite")
    axes[0].legend(fontsize=7)
    return True


def _budgets_of(results: StudyResults, line: dict[str, Any]) -> set[float]:
    """The budgets at which this line's model was attacked in its norm."""
    keys = ("data", "backbone", "neck", "variant", "norm")
    return {
        other["identity"]["eps"]
        for other in results.records.of("attack")
        if all(other["identity"][key] == line["identity"][key] for key in keys)
    }


def _variant(identity: dict[str, Any], among: Sequence[dict[str, Any]]) -> str:
    """Neck and variant, and where it stands if the figure has several places."""
    places = {(line["identity"]["data"], line["identity"]["backbone"]) for line in among}
    place = f", {identity['backbone']}, {identity['data']}" if len(places) > 1 else ""
    variant = "" if identity["variant"] == FULL else f", {identity['variant'].removeprefix('baseline, ')}"
    return f"{identity['neck']}{variant}{place}"


_BUILDERS: dict[int, Callable[[StudyResults, Any], bool]] = {3: _scale, 4: _gate, 5: _steps, 6: _budgets}
