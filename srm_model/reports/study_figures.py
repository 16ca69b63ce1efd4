"""Draw figures 3 to 5 of the article and an additional figure 6 from the results of a study; save SVG and PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srm_model.files import atomic_path
from srm_model.norms import norm_of
from srm_model.reports.drawing import STYLE, UNDATED, look
from srm_model.reports.records import StudyResults, grouped, numbers_of
from srm_model.reports.text import attack_text, budget_text, model_text

_SERIES = ("data", "backbone", "neck", "variant")
_ROW = 0.17  # height of a legend's row in inches


def figures(results: StudyResults, folder: str | Path, numbers: Sequence[int] | None = None) -> list[Path]:
    """Write figures as figure-N.svg and figure-N.png. A figure whose results are missing is omitted.

    Args:
        results: Results of the study.
        folder: Folder to write the files to.
        numbers: Numbers of the figures to write. Default: all figures.

    Returns:
        The paths that were written.

    Raises:
        ValueError: A given number belongs to no figure.
    """
    for number in numbers or ():
        if number not in _BUILDERS:
            raise ValueError(f"figure {number}: expected one of {', '.join(map(str, _BUILDERS))}")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = []
    with rc_context(STYLE):
        for number in numbers or _BUILDERS:
            figure = Figure(figsize=(7.2, 2.9))
            if not _BUILDERS[number](results, figure):
                continue
            for suffix, settings in (("svg", UNDATED), ("png", {"dpi": 200})):
                path = Path(folder) / f"figure-{number}.{suffix}"
                with atomic_path(path) as temporary:
                    figure.savefig(temporary, format=suffix, **settings)
                written.append(path)
    return written


def _legend(figure: Any) -> None:
    """Add one legend below all axes, and enlarge the figure by the height of the legend."""
    known: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    columns = 3 if max(map(len, known)) < 30 else 2
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _ROW * math.ceil(len(known) / columns))
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": 7, "handlelength": 5}
    figure.legend(known.values(), known.keys(), **place)


def _name(identity: dict[str, Any]) -> str:
    return f"{identity['neck']}, {identity['backbone']}, {identity['data']}"


def _scale(results: StudyResults, figure: Any) -> bool:
    """Draw figure 3: τ by epoch, and the scale of the attention output by epoch, before and after rescaling by τ.

    Values are means over seeds.
    """
    groups = grouped(results.unablated("diagnostics"), "data", "backbone", "neck")
    if not groups:
        return False
    left, right = figure.subplots(1, 2)
    for number, group in enumerate(groups):
        epochs = [row["epoch"] for row in group[0]["values"]["trajectory"]]

        def over(name: str, group: list[dict[str, Any]] = group) -> np.ndarray:
            return np.mean([[row[name] for row in line["values"]["trajectory"]] for line in group], axis=0)

        style = look(number)
        name = _name(group[0]["identity"])
        left.plot(epochs, over("sigma_before_tau"), **style, markerfacecolor="none")
        left.plot(epochs, over("sigma_after_tau"), **style)
        right.plot(epochs, over("tau"), **style, label=name)
    left.axhline(1, color="#5a626b", linewidth=0.8)
    left.set(xlabel="epoch", ylabel="σ̄ / √d, median", title="Scale before τ (hollow) and after")
    right.set(xlabel="epoch", ylabel="τ, median", title="Learned rescaler")
    _legend(figure)
    return True


def _gate(results: StudyResults, figure: Any) -> bool:
    """Draw figure 4: γ, ‖M‖, and the entropy and mean of the gate weights, on the test images.

    In each plot, the values of all seeds of a neck are combined into one curve. Distributions are drawn as cumulative
    curves, because the bars of several histograms would overlap.
    """
    groups = grouped(results.unablated("diagnostics"), "data", "backbone", "neck")
    if not groups:
        return False
    figure.set_size_inches(7.2, 5.4)
    axes = figure.subplots(2, 2)
    for number, group in enumerate(groups):
        gate: dict[str, list[Any]] = {
            key: [value for line in group for value in line["values"]["gate"][key]]
            for key in ("entropy", "weights", "gain", "norm")
        }
        marks = (0.03 * (number % 6), 0.24)
        style = {**look(number), "markevery": marks, "label": _name(group[0]["identity"])}
        mass = np.mean(gate["weights"], axis=0)
        place = np.arange(len(mass)) + 0.7 * ((number + 0.5) / len(groups) - 0.5)
        axes[0, 1].plot(place, mass, **{**style, "linewidth": 0.8, "markevery": 1})
        for axis, name in ((axes[0, 0], "entropy"), (axes[1, 0], "gain"), (axes[1, 1], "norm")):
            values = np.sort(gate[name])
            axis.plot(values, np.arange(1, len(values) + 1) / len(values), **style)
    fused = results.study["config"]["fused_stages"]
    floor = results.study["config"]["entropy_floor"] * np.log(max(len(fused), 2))
    axes[0, 0].axvline(floor, color="#5a626b", linewidth=0.8)
    share = "share of images up to x"
    axes[0, 0].set(xlabel="entropy H(a); the line is H_min", ylabel=share, title="Entropy of the weights")
    axes[0, 1].set(ylabel="mean weight", title="Mean routing mass", ylim=(0, 1))
    axes[0, 1].set_xticks(np.arange(len(fused)), [f"stage {stage}" for stage in fused])
    axes[1, 0].set(xlabel="γ", ylabel=share, title="Gain cap")
    axes[1, 1].set(xlabel="‖M‖ before the cap", ylabel=share, title="Magnitude of the fused map")
    _legend(figure)
    return True


def _steps(results: StudyResults, figure: Any) -> bool:
    """Draw figure 5: mean and standard deviation of SROCC over seeds, for each number of PGD steps."""
    groups = grouped(results.unablated("sweep"), "data", "backbone", "neck", "norm", "eps")
    if not groups:
        return False
    names = list(groups[0][0]["values"]["rows"][0]["attacks"])
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, attack in zip(axes, names, strict=True):
        for number, group in enumerate(groups):
            steps = [row["steps"] for row in group[0]["values"]["rows"]]
            values = np.stack(
                [numbers_of(group, "rows", i, "attacks", attack, "srocc") for i in range(len(steps))]
            )
            spread = values.std(1, ddof=1) if len(group) > 1 else None
            name = _name(group[0]["identity"])
            axis.errorbar(steps, values.mean(1), yerr=spread, capsize=2, **look(number), label=name)
        axis.set_xscale("log")
        axis.set_xticks(steps, list(map(str, steps)))
        axis.minorticks_off()
        axis.set(xlabel="PGD steps", title=attack_text(attack), ylim=(-1.05, 1.05))
    identity = groups[0][0]["identity"]
    axes[0].set_ylabel(f"SROCC at {budget_text((identity['norm'], identity['eps']))}")
    _legend(figure)
    return True


def _budgets(results: StudyResults, figure: Any) -> bool:
    """Draw figure 6: the worst SROCC over the attacks of the suite, by budget.

    Each point is a mean over seeds, and its error bar is the standard deviation over seeds. The figure shows models
    that were attacked at several budgets in the same norm. If some of these models have fewer seeds than others, only
    the models with the most seeds are shown. Tables 8 and 11 contain the other models.
    """
    lines = [line for line in results.records.of("attack") if len(_budgets_of(results, line)) > 1]
    groups = [
        (group, len({line["identity"]["seed"] for line in group})) for group in grouped(lines, *_SERIES)
    ]
    most = max((seeds for _, seeds in groups), default=0)
    lines = [line for group, seeds in groups if seeds == most for line in group]
    norms = list(dict.fromkeys(line["identity"]["norm"] for line in lines))
    if not norms:
        return False
    figure.set_size_inches(7.2, 3.6)
    axes = figure.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    series = [_variant(group[0]["identity"], lines) for group in grouped(lines, *_SERIES)]
    for axis, norm in zip(axes, norms, strict=True):
        of_norm = [line for line in lines if line["identity"]["norm"] == norm]
        ticks: set[float] = set()
        for group in grouped(of_norm, *_SERIES):
            label = _variant(group[0]["identity"], lines)
            by_budget = sorted(grouped(group, "eps"), key=lambda same: same[0]["identity"]["eps"])
            values = [numbers_of(same, "worst", "srocc") for same in by_budget]
            shown = [norm_of(norm).shown(same[0]["identity"]["eps"]) for same in by_budget]
            ticks |= set(shown)
            spread = [v.std(ddof=1) for v in values] if min(map(len, values)) > 1 else None
            means, style = [v.mean() for v in values], look(series.index(label))
            axis.errorbar(shown, means, yerr=spread, capsize=2, **style, label=label)
        axis.axhline(0, color="#5a626b", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
        axis.minorticks_off()
        axis.set(xlabel=norm_of(norm).axis, title=norm_of(norm).symbol, ylim=(-1.05, 1.05))
    axes[0].set_ylabel("worst SROCC over the suite" + (f", {most} seeds" if most > 1 else ""))
    _legend(figure)
    return True


def _budgets_of(results: StudyResults, line: dict[str, Any]) -> set[float]:
    """Return the budgets at which the study attacked the model of `line` with the norm of `line`.

    Args:
        results: Results of the study.
        line: Results of one attack: a line of `results.jsonl` of the kind "attack".
    """
    keys = (*_SERIES, "norm")
    return {
        other["identity"]["eps"]
        for other in results.records.of("attack")
        if all(other["identity"][key] == line["identity"][key] for key in keys)
    }


def _variant(identity: dict[str, Any], among: Sequence[dict[str, Any]]) -> str:
    """Return the label of a model in a legend: its neck and variant, and if needed its backbone and dataset.

    Backbone and dataset are added if the models in the figure differ in at least one of them.

    Args:
        identity: The field "identity" of the model's results.
        among: Lines of `results.jsonl` for all models in the figure.
    """
    places = {(line["identity"]["data"], line["identity"]["backbone"]) for line in among}
    place = f", {identity['backbone']}, {identity['data']}" if len(places) > 1 else ""
    return f"{model_text(identity['neck'], identity['variant'])}{place}"


_BUILDERS: dict[int, Callable[[StudyResults, Any], bool]] = {3: _scale, 4: _gate, 5: _steps, 6: _budgets}
