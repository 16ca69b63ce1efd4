"""Tables of the article, but for 3 and 4, and four of our own, from a study's results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from srm_model.config import SRMConfig
from srm_model.metrics import doubts
from srm_model.norms import NORMS, place_of
from srm_model.reports.blocks import caption, missing, row, table
from srm_model.reports.markup import Markup, element, join
from srm_model.reports.records import StudyResults, grouped, mean_of, over_seeds
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

FULL = "full"


class Table(NamedTuple):
    """One table, its cells as text; the first `words` columns are words, the others numbers."""

    number: int
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str
    words: int = 1


def tables(results: StudyResults, numbers: Sequence[int] | None = None) -> list[Table]:
    """The tables asked for, by default all; one whose results are missing has no rows and says so in its note."""
    for number in numbers or ():
        if number not in _BUILDERS:
            raise ValueError(f"table {number}: the tables are {', '.join(map(str, _BUILDERS))}")
    return [_BUILDERS[number](results) for number in numbers or _BUILDERS]


def markdown(found: Table) -> str:
    """The table as a heading, a Markdown table and its note."""
    lines = [f"### Table {found.number}. {found.title}", ""]
    if found.rows:
        rules = [":---" if i < found.words else "---:" for i in range(len(found.columns))]
        lines += ["| " + " | ".join(cells) + " |" for cells in (found.columns, rules, *found.rows)]
        lines.append("")
    lines += [found.note, ""]
    return "\n".join(line.replace("\n", " ") for line in lines)


def html(found: Table) -> Markup:
    """The table as a page's block."""
    title = f"Table {found.number}. {found.title}"
    if not found.rows:
        return join(element("h3", title), missing(found.note))
    words = range(found.words)
    rows = [row(*map(_strong, cells), words=words) for cells in found.rows]
    return join(
        table(found.columns, rows, words=words, title=title),
        caption(found.note),
    )


def _strong(cell: str) -> str:
    plain = cell.removeprefix("**").removesuffix("**")
    return cell if plain == cell else element("strong", plain)


def _made(
    number: int,
    title: str,
    columns: list[str],
    rows: list[list[str]],
    note: str,
    *,
    needs: str,
    words: int = 1,
) -> Table:
    if not rows:
        note = f"No results yet: this table needs {needs}."
    return Table(number, title, columns, rows, note, words)


def _where(identity: dict[str, Any]) -> list[str]:
    return [identity["data"], identity["backbone"], model_text(identity["neck"], identity["variant"])]


def _seeds(lines: Sequence[dict[str, Any]]) -> str:
    counts = sorted(
        {len(group) for group in grouped(lines, "data", "backbone", "neck", "variant", "norm", "eps")}
    )
    if not counts or counts[-1] == 1:
        return "One seed."
    return f"Mean ± standard deviation over {' or '.join(map(str, counts))} seeds."


def _conditioning(results: StudyResults) -> Table:
    def link(name: str, which: str) -> Callable[[dict[str, Any]], Any]:
        return lambda values: values["links"].get(name, {}).get(which)

    rows = []
    lines = [line for line in results.records.of("diagnostics") if "kappa" in line["values"]["links"]]
    for group in grouped(lines, "data", "backbone", "neck", "variant"):
        cells = [
            significant(mean_of(group, link(name, which)))
            for name in ("kappa", "residual", "gain")
            for which in ("median", "p90")
        ]
        rows.append([*_where(group[0]["identity"]), *cells])
    return _made(
        1,
        "Conditioning of the landmark systems",
        ["Data", "backbone", "neck", "κ median", "κ p90", "ρ median", "ρ p90", "gain median", "gain p90"],
        rows,
        "Over all links, heads and test images, in fp32: medians over links and batches of each batch's median and "
        "90th percentile; mean over seeds. κ = σ_max/σ_min of W_λ, ρ the residual of the solve, gain ‖X‖/‖RV‖.",
        needs="a neck with Nyström attention",
        words=3,
    )


def _scale(results: StudyResults) -> Table:
    rows = []
    for group in grouped(results.records.of("diagnostics"), "data", "backbone", "neck", "variant"):
        cells = []
        for name in ("sigma_before_tau", "sigma_after_tau", "tau"):
            for which in ("median", "p90"):
                cells.append(fixed(mean_of(group, lambda values, n=name, w=which: values["links"][n][w])))  # type: ignore[misc]
        rows.append([*_where(group[0]["identity"]), *cells])
    return _made(
        2,
        "Scale of the attention output before and after τ",
        ["Data", "backbone", "neck", "σ̄/√d median", "p90", "τσ̄/√d median", "p90", "τ median", "p90"],
        rows,
        "Over links and heads, at the best epoch; mean over seeds.",
        needs="a neck with attention",
        words=3,
    )


def _hyperparameters(results: StudyResults) -> Table:
    config, defaults = results.study["config"], SRMConfig().to_dict()
    rows = [
        [key, setting(config[key]), setting(default)]
        for key, default in defaults.items()
        if key in config and not key.startswith(("attack_", "eps_", "eot_", "pair_", "smoothing_"))
    ]
    return _made(
        5,
        "Fixed hyperparameters",
        ["Field of SRMConfig", "in this study", "default"],
        rows,
        "Unless ablated; the seed is each run's own.",
        needs="a study",
        words=3,
    )


def _clean(results: StudyResults) -> Table:
    lines = [line for line in results.records.of("clean") if line["identity"]["variant"] == FULL]
    rows = [
        [
            *_where(group[0]["identity"]),
            over_seeds(group, lambda values: values["srocc"]),
            over_seeds(group, lambda values: values["plcc"]),
            str(len(group)),
        ]
        for group in grouped(lines, "data", "backbone", "neck")
    ]
    return _made(
        6,
        "Clean test set",
        ["Data", "backbone", "neck", "SROCC", "PLCC", "seeds"],
        rows,
        f"{_seeds(lines)} SROCC of raw scores; PLCC after the logistic fitted on validation. {_labels(lines)}",
        needs="trained models",
        words=3,
    )


def _labels(lines: Sequence[dict[str, Any]]) -> str:
    kinds = sorted({line["values"]["labels"] for line in lines})
    metrics = [kind.removeprefix("metric:").upper() for kind in kinds if kind.startswith("metric:")]
    sources = [kind.removeprefix("opinions:") for kind in kinds if kind.startswith("opinions:")]
    words = []
    if metrics:
        words.append(f"Labels are values of the metric {', '.join(metrics)}, not people's opinion.")
    if sources:
        words.append(
            f"Labels are people's opinions of nearly these images: those that {', '.join(sources)} has for its images "
            "of the same photograph, type and level."
        )
    return " ".join(words)


def _attacks(results: StudyResults) -> list[dict[str, Any]]:
    return [line for line in results.records.of("attack") if line["identity"]["variant"] == FULL]


def _by_attack(results: StudyResults) -> Table:
    lines = _attacks(results)
    rows = []
    for group in grouped(lines, "data", "backbone", "neck", "norm", "eps"):
        identity = group[0]["identity"]
        for name in group[0]["values"]["attacks"]:
            same = [line for line in group if name in line["values"]["attacks"]]
            rows.append(
                [
                    *_where(identity),
                    budget_text((identity["norm"], identity["eps"])),
                    attack_text(name),
                    over_seeds(same, lambda values, n=name: values["attacks"][n]["srocc"]),  # type: ignore[misc]
                    over_seeds(same, lambda values, n=name: values["attacks"][n]["plcc"]),  # type: ignore[misc]
                ]
            )
    return _made(
        7,
        "Robust correlations under each attack",
        ["Data", "backbone", "neck", "budget", "attack", "SROCC", "PLCC"],
        rows,
        f"{_seeds(lines)} {_attacked(lines)}",
        needs="attacks",
        words=5,
    )


def _worst(results: StudyResults) -> Table:
    lines = _attacks(results)
    rows = []
    for group in grouped(lines, "data", "backbone", "neck", "norm", "eps"):
        identity = group[0]["identity"]
        rows.append(
            [
                *_where(identity),
                budget_text((identity["norm"], identity["eps"])),
                over_seeds(group, lambda values: values["clean"]["srocc"]),
                over_seeds(group, lambda values: values["worst"]["srocc"]),
                over_seeds(group, lambda values: values["worst"]["srocc_drop"]),
                over_seeds(group, lambda values: values["worst"]["plcc"]),
            ]
        )
    return _made(
        8,
        "Worst case over the suite",
        ["Data", "backbone", "neck", "budget", "clean SROCC", "worst SROCC", "drop", "worst PLCC"],
        rows,
        f"{_seeds(lines)} The lowest correlation over the attacks of the suite, each run by itself. {_attacked(lines)}",
        needs="attacks",
        words=4,
    )


def _attacked(lines: Sequence[dict[str, Any]]) -> str:
    counts = sorted({line["values"]["images"] for line in lines})
    without = sorted({name for line in lines for name in line["values"]["incomplete"]})
    said = f"On {' or '.join(map(str, counts))} test images, clean figures included." if counts else ""
    if without:
        said += f" Some without {', '.join(map(attack_text, without))}, for want of a surrogate."
    found = [doubt for line in lines for doubt in doubts(line["values"].get("attacks", {}))]
    if found:
        weak = sorted({attack_text(doubt.partition(":")[0]) for doubt in found})
        said += (
            f" In some runs the gradients of {', '.join(weak)} were zero or not finite: these results may "
            "overstate robustness."
        )
    return said


def _settings(results: StudyResults) -> Table:
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
    return _made(
        9, "Attack configuration", ["Setting", "value"], rows, "The same for every model.", needs="", words=2
    )


def _transfers(results: StudyResults) -> Table:
    rows = []
    for group in grouped(results.records.of("transfer"), "data", "models", "norm", "eps"):
        identity = group[0]["identity"]
        for number, pair in enumerate(group[0]["values"]["pairs"]):
            if pair["source"] == pair["target"]:
                continue
            rows.append(
                [
                    identity["data"],
                    pair["source"],
                    pair["target"],
                    budget_text((identity["norm"], identity["eps"])),
                    over_seeds(group, lambda values, t=pair["target"]: values["clean"][t]["srocc"]),  # type: ignore[misc]
                    over_seeds(group, lambda values, n=number: values["pairs"][n]["srocc"]),  # type: ignore[misc]
                    over_seeds(group, lambda values, n=number: values["pairs"][n]["plcc"]),  # type: ignore[misc]
                ]
            )
    return _made(
        10,
        "Transfer: crafted on one model, scored by another",
        ["Data", "crafted on", "scored by", "budget", "its clean SROCC", "SROCC", "PLCC"],
        rows,
        f"PGD on the squared error.{_without_gradients(results)}",
        needs="two models or more, and budgets",
        words=4,
    )


def _without_gradients(results: StudyResults) -> str:
    """A sentence on the models whose gradients were zero or not finite when they were crafted on."""
    pairs = [pair for line in results.records.of("transfer") for pair in line["values"]["pairs"]]
    weak = sorted({pair["source"] for pair in pairs if doubts({pair["source"]: pair})})
    if not weak:
        return ""
    return (
        f" In some runs the gradients of {', '.join(weak)} were zero or not finite: what was crafted on them may "
        "overstate robustness."
    )


def _ablations(results: StudyResults) -> Table:
    study = results.study
    if not study.get("ablations"):
        return _made(11, "One-out ablations", [], [], "", needs="ablations in the study")
    place = {"data": next(iter(study["data"])), "backbone": study["backbones"][0]}

    def lines(kind: str, variant: str, neck: str, **more: Any) -> list[dict[str, Any]]:
        wanted = {**place, "variant": variant, "neck": neck, **more}
        return [
            line
            for line in results.records.of(kind)
            if all(line["identity"].get(key) == value for key, value in wanted.items())
        ]

    declared = {(norm, eps) for found in study["ablation_budgets"].values() for norm, eps in found}
    budgets = sorted(declared, key=lambda budget: (place_of(budget[0]), budget[1]))
    columns = ["Variant", "seeds", "clean SROCC", "Δ"]
    measured: list[tuple[str, str, dict[str, Any]]] = [("clean", "srocc", {})]
    for norm, eps in budgets:
        columns += [f"worst SROCC, {budget_text((norm, eps))}", "Δ"]
        measured.append(("attack", "worst", {"norm": norm, "eps": eps}))
    rows, means = [], []
    for variant, overrides in {FULL: {}, **study["ablations"]}.items():
        neck = overrides.get("neck", "srm")
        if not (trained := lines("clean", variant, neck)):
            continue
        rows.append([variant if variant != FULL else "full SRM", str(len(trained))])
        means.append([math.nan, math.nan])
        for kind, key, more in measured:

            def value(values: dict[str, Any], key: str = key) -> Any:
                return values[key]["srocc"] if key == "worst" else values[key]

            found = lines(kind, variant, neck, **more)
            delta = math.nan if variant == FULL else _delta(lines(kind, FULL, "srm", **more), found, value)
            rows[-1] += [over_seeds(found, value), signed(delta)]
            means[-1] += [mean_of(found, value), delta]
    best = np.nanmax(np.vstack([means, np.full(len(columns), -math.inf)]), axis=0)
    for cells, row_means in zip(rows, means, strict=True):
        whole = cells[0] == "full SRM"
        cells[:] = [
            bold(cell) if cell != DASH and (whole or mean == top) else cell
            for cell, mean, top in zip(cells, row_means, best, strict=True)
        ]
    return _made(
        11,
        f"One-out ablations on {place['data']}, {place['backbone']}",
        columns,
        rows,
        "Worst over the suite, at every budget of an ablation; Δ is against full SRM over the same seeds. Mean ± "
        "standard deviation over seeds where there are several. Bold: full SRM, and the best of each column, "
        "of however many seeds.",
        needs="trained ablations",
    )


def _delta(
    full: list[dict[str, Any]], lines: list[dict[str, Any]], value: Callable[[dict[str, Any]], Any]
) -> float:
    """How much higher a variant's mean is than the full neck's over the same seeds; NaN where there are none."""
    by_seed = [{line["identity"]["seed"]: line for line in found} for found in (full, lines)]
    seeds = by_seed[0].keys() & by_seed[1].keys()
    before, after = (mean_of([found[seed] for seed in seeds], value) for found in by_seed)
    return after - before


def _mechanism(results: StudyResults) -> Table:
    def capped(values: dict[str, Any]) -> float:
        gains = values["gate"]["gain"]
        return 100 * sum(gain < 1 for gain in gains) / len(gains)

    rows = []
    for group in grouped(results.records.of("diagnostics"), "data", "backbone", "neck", "variant"):
        cells = [
            fixed(mean_of(group, lambda values: values["links"]["logit_std"]["median"]), 2),
            fixed(mean_of(group, lambda values: values["links"]["attention_entropy"]["median"])),
            fixed(100 * mean_of(group, lambda values: values["update_ratio"]["median"]), 0),
            fixed(100 * mean_of(group, lambda values: values["update_ratio"]["p90"]), 0),
            fixed(mean_of(group, capped), 0),
            ", ".join(
                fixed(float(weight), 2)
                for weight in np.mean(
                    [w for line in group for w in line["values"]["gate"]["weights"]], axis=0
                )
            ),
        ]
        rows.append([*_where(group[0]["identity"]), *cells])
    return _made(
        12,
        "Whether the mechanism acts",
        [
            "Data",
            "backbone",
            "neck",
            "logits' standard deviation",
            "entropy / ln r",
            "update, % of the map: median",
            "p90",
            "images capped, %",
            "mean weight of each stage",
        ],
        rows,
        "On test images, mean over seeds. Entropy of the attention, 1 where it is uniform; the update is ‖βU‖ of a "
        "link pooled, against the pooled map it is added to.",
        needs="a neck with attention",
        words=3,
    )


def _swaps(results: StudyResults) -> Table:
    rows = []
    for group in grouped(results.records.of("swap"), "data", "backbone", "swap"):
        identity = group[0]["identity"]
        rows.append(
            [
                identity["data"],
                identity["backbone"],
                identity["swap"],
                over_seeds(group, lambda values: values["trained_srocc"]),
                over_seeds(group, lambda values: values["srocc"]),
                fixed(mean_of(group, lambda values: values["moved"]["median"] / values["moved"]["spread"])),
                fixed(mean_of(group, lambda values: values["moved"]["maximum"] / values["moved"]["spread"])),
            ]
        )
    return _made(
        13,
        "What else trained SRM weights do, with no training",
        [
            "Data",
            "backbone",
            "in place of what was trained",
            "SROCC as trained",
            "SROCC",
            "moved: median",
            "maximum",
        ],
        rows,
        "Clean test images. Moved is how far a score goes, in standard deviations of the scores; mean over seeds.",
        needs="`swaps` in the study",
        words=3,
    )


def _audits(results: StudyResults) -> Table:
    rows = []
    for line in results.records.of("audit"):
        values = line["values"]
        checks = values["checks"]
        titles = {check["name"]: check["title"] for check in checks}
        failed = [f"{titles[name]} ({_figure(checks, name)})" for name in values["failed"]]
        rows.append(
            [
                *_where(line["identity"]),
                str(line["identity"]["seed"]),
                line["identity"].get("swap", "as trained"),
                budget_text((line["identity"]["norm"], line["identity"]["eps"])),
                f"{sum(check['passed'] is True for check in checks)} of {len(checks)}",
                "; ".join(failed) or "none",
            ]
        )
    return _made(
        14,
        "What the audit says of each model",
        ["Data", "backbone", "neck", "seed", "weights", "budget", "checks passed", "failed"],
        rows,
        f"On {' or '.join(sorted({str(line['identity']['images']) for line in results.records.of('audit')}))} images. "
        "A check that could not be asked is neither passed nor failed.",
        needs="`audit` in the study",
        words=6,
    )


def _figure(checks: Sequence[dict[str, Any]], name: str) -> str:
    return next(str(check["figure"]) for check in checks if check["name"] == name)


def _stronger(results: StudyResults) -> Table:
    rows = []
    usual = results.study.get("suite", "paper")
    for group in grouped(
        results.records.of("stronger"),
        "data",
        "backbone",
        "neck",
        "variant",
        "norm",
        "eps",
        "suite",
        "attack",
    ):
        identity = group[0]["identity"]
        config = {**identity["config"], **identity["attack"]}
        said = [identity["suite"], f"{config['attack_steps']} steps", f"{config['attack_restarts']} restarts"]
        said += [
            f"{name} = {value}"
            for name, value in identity["attack"].items()
            if name not in ("attack_steps", "attack_restarts")
        ]
        before = [
            line
            for line in results.records.of("attack")
            if any(
                {**line["identity"], "suite": other["suite"], "attack": other["attack"]} == other
                for other in (found["identity"] for found in group)
            )
        ]
        by = sorted({attack_text(line["values"]["worst"]["srocc_attack"]) for line in group})
        rows.append(
            [
                *_where(identity),
                budget_text((identity["norm"], identity["eps"])),
                ", ".join(said),
                " or ".join(by),
                str(len(group)),
                over_seeds(group, lambda values: values["clean"]["srocc"]),
                over_seeds(before, lambda values: values["worst"]["srocc"]),
                over_seeds(group, lambda values: values["worst"]["srocc"]),
            ]
        )
    steps = results.study["config"]["attack_steps"], results.study["config"]["attack_restarts"]
    return _made(
        15,
        "Whether a stronger attack finds more",
        [
            "Data",
            "backbone",
            "neck",
            "budget",
            "attack",
            "worst",
            "seeds",
            "clean SROCC",
            "worst SROCC before",
            "now",
        ],
        rows,
        f"Worst over the suite; before: as in tables 8 and 11, suite {usual}, {steps[0]} steps and {steps[1]} "
        f"restart{'s' if steps[1] != 1 else ''}, over the same seeds. {_attacked(results.records.of('stronger'))}",
        needs="`[[stronger]]` in the study",
        words=6,
    )


_BUILDERS: dict[int, Callable[[StudyResults], Table]] = {
    1: _conditioning,
    2: _scale,
    5: _hyperparameters,
    6: _clean,
    7: _by_attack,
    8: _worst,
    9: _settings,
    10: _transfers,
    11: _ablations,
    12: _mechanism,
    13: _swaps,
    14: _audits,
    15: _stronger,
}
