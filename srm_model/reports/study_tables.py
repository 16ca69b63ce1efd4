"""Make tables from a study's results: the tables of the article except tables 3 and 4, and further tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from srm_model.config import SRMConfig
from srm_model.metrics import doubts
from srm_model.norms import NORMS, place_of
from srm_model.reports.blocks import caption, missing, row, table
from srm_model.reports.markup import Markup, element, join
from srm_model.reports.records import FULL, StudyResults, grouped, mean_of, numbers_of, over_seeds
from srm_model.reports.text import (
    DASH,
    attack_text,
    bold,
    budget_text,
    fixed,
    model_text,
    setting,
    signed,
    significant,
)

_PLACE = ["Data", "backbone", "neck"]
_MODEL = ("data", "backbone", "neck", "variant")
Lines = list[dict[str, Any]]
Content = tuple[list[str], list[list[str]], str]  # columns, rows and note


class Table(NamedTuple):
    """A table of text cells. The first `words` columns contain words, and the other columns contain numbers."""

    number: int
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str
    words: int = 1


_BUILDERS: dict[int, Callable[[StudyResults], Table]] = {}


def tables(results: StudyResults, numbers: Sequence[int] | None = None) -> list[Table]:
    """Return tables of a study. A table without results has no rows, and its note says which results it needs.

    Args:
        results: Results of the study.
        numbers: Numbers of the tables. Default: all.

    Raises:
        ValueError: A given number belongs to no table.
    """
    for number in numbers or ():
        if number not in _BUILDERS:
            raise ValueError(f"table {number}: expected one of {', '.join(map(str, _BUILDERS))}")
    return [_BUILDERS[number](results) for number in numbers or _BUILDERS]


def markdown(found: Table) -> str:
    """Format a table as a heading, a Markdown table and its note."""
    lines = [f"### Table {found.number}. {found.title}", ""]
    if found.rows:
        rules = [":---" if i < found.words else "---:" for i in range(len(found.columns))]
        lines += ["| " + " | ".join(cells) + " |" for cells in (found.columns, rules, *found.rows)]
        lines.append("")
    lines += [found.note, ""]
    return "\n".join(line.replace("\n", " ") for line in lines)


def html(found: Table) -> Markup:
    """Format a table as a block of a page."""
    title = f"Table {found.number}. {found.title}"
    if not found.rows:
        return join(element("h3", title), missing(found.note))
    words = range(found.words)
    rows = [row(*map(_strong, cells), words=words) for cells in found.rows]
    return join(table(found.columns, rows, words=words, title=title), caption(found.note))


def rows_of(found: Table) -> list[dict[str, Any]]:
    """Return one dict for each row of a table, with the text of each cell.

    The key "table" holds the number of the table. The key of each cell is the heading of its column. If several columns
    have the same heading, such as "Δ", each of their keys starts with the heading of the column on the left, as in
    "clean SROCC, Δ".
    """
    columns = found.columns
    names = [
        f"{columns[i - 1]}, {name}" if columns.count(name) > 1 else name for i, name in enumerate(columns)
    ]
    return [
        {"table": found.number, **dict(zip(names, map(_plain, cells), strict=True))} for cells in found.rows
    ]


def _plain(cell: str) -> str:
    return cell.removeprefix("**").removesuffix("**")


def _strong(cell: str) -> str:
    plain = _plain(cell)
    return cell if plain == cell else element("strong", plain)


def _table(
    number: int, title: str, *, needs: str, words: int = 3
) -> Callable[[Callable[[StudyResults], Content]], Callable[[StudyResults], Table]]:
    """Register a function that returns the columns, rows and note of a table.

    `needs` is the text that says which results the table needs. It is shown if the table has no rows.
    """

    def decorated(content: Callable[[StudyResults], Content]) -> Callable[[StudyResults], Table]:
        def build(results: StudyResults) -> Table:
            columns, rows, note = content(results)
            empty = f"No results yet: this table needs {needs}."
            return Table(number, title, columns, rows, note if rows else empty, words)

        _BUILDERS[number] = build
        return build

    return decorated


def _rows(lines: Lines, keys: Sequence[str], cells: Callable[[Lines], Iterable[str]]) -> list[list[str]]:
    """Return one table row for each group of result lines that have the same values of `keys` in their identities.

    The first cells of a row are dataset, backbone and model. The function `cells` returns the other cells.
    """
    return [[*_where(group[0]["identity"]), *cells(group)] for group in grouped(lines, *keys)]


def _where(identity: dict[str, Any]) -> list[str]:
    return [identity["data"], identity["backbone"], model_text(identity["neck"], identity["variant"])]


def _budget(group: Lines) -> str:
    return budget_text((group[0]["identity"]["norm"], group[0]["identity"]["eps"]))


def _seeds(lines: Lines) -> str:
    counts = sorted({len(group) for group in grouped(lines, *_MODEL, "norm", "eps")})
    if not counts or counts[-1] == 1:
        return "One seed."
    return f"Mean ± standard deviation over {' or '.join(map(str, counts))} seeds."


@_table(1, "Conditioning of the landmark systems", needs="a neck with Nyström attention")
def _conditioning(results: StudyResults) -> Content:
    def cells(group: Lines) -> list[str]:
        return [
            significant(mean_of(group, "links", name, which))
            for name in ("kappa", "residual", "gain")
            for which in ("median", "p90")
        ]

    lines = [line for line in results.records.of("diagnostics") if "kappa" in line["values"]["links"]]
    note = (
        "The median and the 90th percentile over all links, heads and test images, in fp32, then the mean over seeds. "
        "Values measured before 2026-11-29 are medians over links and batches of each batch's values. "
        "κ = σ_max/σ_min of W_λ, ρ is the residual of the solve, gain is ‖X‖/‖RV‖."
    )
    return (
        [*_PLACE, "κ median", "κ p90", "ρ median", "ρ p90", "gain median", "gain p90"],
        _rows(lines, _MODEL, cells),
        note,
    )


@_table(2, "Scale of the attention output before and after τ", needs="a neck with attention")
def _scale(results: StudyResults) -> Content:
    def cells(group: Lines) -> list[str]:
        return [
            fixed(mean_of(group, "links", name, which))
            for name in ("sigma_before_tau", "sigma_after_tau", "tau")
            for which in ("median", "p90")
        ]

    return (
        [*_PLACE, "σ̄/√d median", "p90", "τσ̄/√d median", "p90", "τ median", "p90"],
        _rows(results.records.of("diagnostics"), _MODEL, cells),
        "Over links and heads, at the best epoch; mean over seeds.",
    )


@_table(5, "Fixed hyperparameters", needs="a study")
def _hyperparameters(results: StudyResults) -> Content:
    config, defaults = results.study["config"], SRMConfig().to_dict()
    rows = [
        [key, setting(config[key]), setting(default)]
        for key, default in defaults.items()
        if key in config and not key.startswith(("attack_", "eps_", "eot_", "pair_", "smoothing_"))
    ]
    return (
        ["Field of SRMConfig", "in this study", "default"],
        rows,
        "Ablations change some of these fields; each run has its own seed.",
    )


@_table(6, "Clean test set", needs="trained models")
def _clean(results: StudyResults) -> Content:
    def cells(group: Lines) -> list[str]:
        return [over_seeds(group, "srocc"), over_seeds(group, "plcc"), str(len(group))]

    lines = results.unablated("clean")
    return (
        [*_PLACE, "SROCC", "PLCC", "seeds"],
        _rows(lines, _MODEL, cells),
        f"{_seeds(lines)} SROCC of raw scores; PLCC after the logistic map fitted on validation. {_labels(lines)}",
    )


def _labels(lines: Lines) -> str:
    kinds = sorted({line["values"]["labels"] for line in lines})
    metrics = [kind.removeprefix("metric:").upper() for kind in kinds if kind.startswith("metric:")]
    sources = [kind.removeprefix("opinions:") for kind in kinds if kind.startswith("opinions:")]
    words = []
    if metrics:
        words.append(f"Labels are values of the metric {', '.join(metrics)}, not people's opinions.")
    if sources:
        words.append(
            f"Labels are people's opinions of similar images: those of {', '.join(sources)} with the same photograph, "
            "distortion type and level."
        )
    return " ".join(words)


@_table(7, "Robust correlations under each attack", needs="attacks", words=5)
def _by_attack(results: StudyResults) -> Content:
    lines = results.unablated("attack")
    rows = []
    for group in grouped(lines, *_MODEL, "norm", "eps"):
        for name in group[0]["values"]["attacks"]:
            same = [line for line in group if name in line["values"]["attacks"]]
            figures = [over_seeds(same, "attacks", name, key) for key in ("srocc", "plcc")]
            rows.append([*_where(group[0]["identity"]), _budget(group), attack_text(name), *figures])
    return [*_PLACE, "budget", "attack", "SROCC", "PLCC"], rows, f"{_seeds(lines)} {_attacked(lines)}"


@_table(8, "Worst case over the suite", needs="attacks", words=4)
def _worst(results: StudyResults) -> Content:
    def cells(group: Lines) -> list[str]:
        worst = [over_seeds(group, "worst", key) for key in ("srocc", "srocc_drop", "plcc")]
        return [_budget(group), over_seeds(group, "clean", "srocc"), *worst]

    lines = results.unablated("attack")
    note = (
        f"{_seeds(lines)} Worst is the lowest correlation over the attacks of the suite, which are run separately. "
        f"{_attacked(lines)}"
    )
    return (
        [*_PLACE, "budget", "clean SROCC", "worst SROCC", "drop", "worst PLCC"],
        _rows(lines, (*_MODEL, "norm", "eps"), cells),
        note,
    )


def _attacked(lines: Lines) -> str:
    counts = sorted({line["values"]["images"] for line in lines})
    without = sorted({name for line in lines for name in line["values"]["incomplete"]})
    said = f"Clean and attacked figures are on {' or '.join(map(str, counts))} test images." if counts else ""
    if without:
        said += f" Without a surrogate, some runs lack {', '.join(map(attack_text, without))}."
    found = [doubt for line in lines for doubt in doubts(line["values"].get("attacks", {}))]
    weak = sorted({attack_text(doubt.partition(":")[0]) for doubt in found})
    return said + (_overstated(weak) if weak else "")


def _overstated(names: list[str]) -> str:
    return (
        f" In some runs the gradients of {', '.join(names)} were zero or not finite: these results may overstate "
        "robustness."
    )


@_table(9, "Attack configuration", needs="", words=2)
def _settings(results: StudyResults) -> Content:
    config = SRMConfig.from_dict(results.study["config"])
    budgets = [budget_text((norm, eps)) for norm, eps in results.study.get("budgets", [])]
    rows = [
        ["Budgets", ", ".join(budgets) or DASH],
        ["Suite", str(results.study.get("suite", "paper"))],
        ["PGD steps", str(config.attack_steps)],
        ["PGD restarts, all from random starts", str(config.attack_restarts)],
        *(
            [f"Step, {norm.symbol}", f"{norm.step_of(config):g} ε / steps, {norm.step_words}"]
            for norm in NORMS.values()
        ),
        ["Images attacked together", str(config.attack_batch_size)],
        ["Pair inversion", f"margin {config.pair_margin:g}, temperature {config.pair_temperature:g}"],
        ["EOT samples, stochastic models only", str(config.eot_samples)],
        ["Queries of the square search", f"{config.attack_queries:,}"],
        ["Kept", "the best iterate over all steps and restarts, per image or per batch"],
    ]
    return ["Setting", "value"], rows, "The same for every model."


@_table(
    10, "Transfer: crafted on one model, scored by another", needs="two models or more, and budgets", words=4
)
def _transfers(results: StudyResults) -> Content:
    lines = results.records.of("transfer")
    rows = []
    for group in grouped(lines, "data", "models", "norm", "eps"):
        for number, pair in enumerate(group[0]["values"]["pairs"]):
            source, target = pair["source"], pair["target"]
            if source == target:
                continue
            figures = [over_seeds(group, "pairs", number, key) for key in ("srocc", "plcc")]
            clean = over_seeds(group, "clean", target, "srocc")
            rows.append([group[0]["identity"]["data"], source, target, _budget(group), clean, *figures])
    pairs = [pair for line in lines for pair in line["values"]["pairs"]]
    weak = sorted({pair["source"] for pair in pairs if doubts({pair["source"]: pair})})
    return (
        ["Data", "crafted on", "scored by", "budget", "clean SROCC", "SROCC", "PLCC"],
        rows,
        f"PGD on the squared error.{_overstated(weak) if weak else ''}",
    )


@_table(11, "One-out ablations", needs="trained ablations", words=1)
def _ablations(results: StudyResults) -> Content:
    study = results.study
    if not study.get("ablations"):
        return [], [], ""
    place = {"data": next(iter(study["data"])), "backbone": study["backbones"][0]}

    def lines(kind: str, variant: str, neck: str, **more: Any) -> Lines:
        wanted = {**place, "variant": variant, "neck": neck, **more}
        return [
            line
            for line in results.records.of(kind)
            if all(line["identity"].get(key) == value for key, value in wanted.items())
        ]

    declared = {(norm, eps) for found in study["ablation_budgets"].values() for norm, eps in found}
    columns = ["Variant", "seeds", "clean SROCC", "Δ"]
    measured: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [("clean", ("srocc",), {})]
    for norm, eps in sorted(declared, key=lambda budget: (place_of(budget[0]), budget[1])):
        columns += [f"worst SROCC, {budget_text((norm, eps))}", "Δ"]
        measured.append(("attack", ("worst", "srocc"), {"norm": norm, "eps": eps}))
    rows, means = [], []
    for variant, overrides in {FULL: {}, **study["ablations"]}.items():
        neck = overrides.get("neck", "srm")
        if not (trained := lines("clean", variant, neck)):
            continue
        rows.append([variant if variant != FULL else "full SRM", str(len(trained))])
        means.append([math.nan, math.nan])
        for kind, keys, more in measured:
            found = lines(kind, variant, neck, **more)
            delta = math.nan if variant == FULL else _delta(lines(kind, FULL, "srm", **more), found, keys)
            rows[-1] += [over_seeds(found, *keys), signed(delta)]
            means[-1] += [mean_of(found, *keys), delta]
    best = np.nanmax(np.vstack([means, np.full(len(columns), -math.inf)]), axis=0)
    for cells, row_means in zip(rows, means, strict=True):
        whole = cells[0] == "full SRM"
        cells[:] = [
            bold(cell) if cell != DASH and (whole or mean == top) else cell
            for cell, mean, top in zip(cells, row_means, best, strict=True)
        ]
    note = (
        f"On {place['data']}, {place['backbone']}. Worst over the suite, at every budget of an ablation. Δ is the "
        "difference from full SRM over the same seeds. Mean ± standard deviation where there are several seeds. Bold: "
        "full SRM, and the best of each column, regardless of the number of seeds."
    )
    return columns, rows, note


def _delta(full: Lines, lines: Lines, keys: Sequence[str]) -> float:
    """Return the mean over `lines` (a variant) minus the mean over `full` (the full neck).

    `lines` and `full` are averaged over the seeds that they have in common. Without common seeds, the result is NaN.
    """
    by_seed = [{line["identity"]["seed"]: line for line in found} for found in (full, lines)]
    seeds = by_seed[0].keys() & by_seed[1].keys()
    before, after = (mean_of([found[seed] for seed in seeds], *keys) for found in by_seed)
    return after - before


@_table(12, "Activity of the neck's mechanism", needs="a neck with attention")
def _mechanism(results: StudyResults) -> Content:
    def cells(group: Lines) -> list[str]:
        gates = [line["values"]["gate"] for line in group]
        capped = [np.mean(np.array(gate["gain"]) < 1) for gate in gates]
        weights = np.mean([weight for gate in gates for weight in gate["weights"]], axis=0)
        return [
            fixed(mean_of(group, "links", "logit_std", "median"), 2),
            fixed(mean_of(group, "links", "attention_entropy", "median")),
            fixed(100 * mean_of(group, "update_ratio", "median"), 0),
            fixed(100 * mean_of(group, "update_ratio", "p90"), 0),
            fixed(100 * float(np.mean(capped)), 0),
            ", ".join(fixed(float(weight), 2) for weight in weights),
        ]

    ratio = "update, % of the map: median"
    stages = "mean weight of each stage"
    note = (
        "On test images, mean over seeds. The entropy of the attention is 1 where it is uniform. The update is ‖βU‖ of "
        "a pooled link, relative to the pooled map that it is added to."
    )
    return (
        [*_PLACE, "std of logits", "entropy / ln r", ratio, "p90", "images capped, %", stages],
        _rows(results.records.of("diagnostics"), _MODEL, cells),
        note,
    )


@_table(13, "Trained SRM weights with other settings, without training", needs="`swaps` in the study")
def _swaps(results: StudyResults) -> Content:
    rows = []
    for group in grouped(results.records.of("swap"), "data", "backbone", "swap"):
        names = [group[0]["identity"][key] for key in ("data", "backbone", "swap")]
        spreads = numbers_of(group, "moved", "spread")
        moved = [numbers_of(group, "moved", which) / spreads for which in ("median", "maximum")]
        figures = [over_seeds(group, key) for key in ("trained_srocc", "srocc")]
        rows.append([*names, *figures, *(fixed(float(values.mean())) for values in moved)])
    return (
        ["Data", "backbone", "changed setting", "SROCC as trained", "SROCC", "moved: median", "maximum"],
        rows,
        "Clean test images. Moved is the change of a score, in standard deviations of the scores; mean over seeds.",
    )


@_table(14, "Audit of each model", needs="`audit` in the study", words=6)
def _audits(results: StudyResults) -> Content:
    lines = results.records.of("audit")
    rows = []
    for line in lines:
        identity, checks = line["identity"], line["values"]["checks"]
        by_name = {check["name"]: check for check in checks}
        failed = [by_name[name] for name in line["values"]["failed"]]
        rows.append(
            [
                *_where(identity),
                str(identity["seed"]),
                identity.get("swap", "as trained"),
                _budget([line]),
                f"{sum(check['passed'] is True for check in checks)} of {len(checks)}",
                "; ".join(f"{check['title']} ({check['figure']})" for check in failed) or "none",
            ]
        )
    images = sorted({str(line["identity"]["images"]) for line in lines})
    return (
        [*_PLACE, "seed", "weights", "budget", "checks passed", "failed"],
        rows,
        f"On {' or '.join(images)} images. A check that could not be run is neither passed nor failed.",
    )


@_table(15, "Stronger attacks", needs="`[[stronger]]` in the study", words=6)
def _stronger(results: StudyResults) -> Content:
    def cells(group: Lines) -> list[str]:
        identity = group[0]["identity"]
        config = {**identity["config"], **identity["attack"]}
        said = [identity["suite"], f"{config['attack_steps']} steps", f"{config['attack_restarts']} restarts"]
        said += [
            f"{name} = {value}"
            for name, value in identity["attack"].items()
            if name not in ("attack_steps", "attack_restarts")
        ]
        # Find the results of the same models under the study's own attack.
        before = [
            line
            for line in results.records.of("attack")
            if any(
                {**line["identity"], "suite": other["suite"], "attack": other["attack"]} == other
                for other in (found["identity"] for found in group)
            )
        ]
        by = sorted({attack_text(line["values"]["worst"]["srocc_attack"]) for line in group})
        figures = [over_seeds(group, "clean", "srocc")]
        figures += [over_seeds(found, "worst", "srocc") for found in (before, group)]
        return [_budget(group), ", ".join(said), " or ".join(by), str(len(group)), *figures]

    lines = results.records.of("stronger")
    steps, restarts = (results.study["config"][f"attack_{key}"] for key in ("steps", "restarts"))
    usual, stronger = (f"worst SROCC, {kind} attack" for kind in ("usual", "stronger"))
    note = (
        "Worst over the suite. The usual attack is that of tables 8 and 11: suite "
        f"{results.study.get('suite', 'paper')}, {steps} steps and {restarts} restart{'s' if restarts != 1 else ''}, "
        f"over the same seeds. {_attacked(lines)}"
    )
    return (
        [*_PLACE, "budget", "attack", "worst attack", "seeds", "clean SROCC", usual, stronger],
        _rows(lines, (*_MODEL, "norm", "eps", "suite", "attack"), cells),
        note,
    )
