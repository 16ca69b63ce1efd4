"""Show how well scores and labels correlate, on clean and attacked images, with the uncertainty of this correlation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from srm_model.config import SRMConfig
from srm_model.reports import bootstrap
from srm_model.reports.blocks import group, look, missing, neck_row, row, table
from srm_model.reports.charts import Fall, fall_chart
from srm_model.reports.markup import Child, Markup, element
from srm_model.reports.run import Budget, Correlations, Run
from srm_model.reports.text import attack_text, budget_text, count, drop, fixed, listing, signed

UNKNOWN = Correlations(math.nan, math.nan)


@dataclass(frozen=True)
class Estimate:
    """An SROCC, its bootstrap replicates, and the names of the images on which it was measured."""

    srocc: float
    replicates: np.ndarray
    names: tuple[str, ...]

    @property
    def interval(self) -> tuple[float, float] | None:
        return bootstrap.interval(self.replicates)


@dataclass(frozen=True)
class Estimates:
    """SROCC of each neck.

    Attributes:
        test: SROCC on the clean test set, by neck.
        clean: SROCC on the clean versions of the attacked images, by neck and budget.
        worst: SROCC on the attacked images, for the attack with the lowest SROCC, by neck and budget.
    """

    test: dict[str, Estimate]
    clean: dict[tuple[str, Budget], Estimate]
    worst: dict[tuple[str, Budget], Estimate]


def estimates(run: Run) -> Estimates:
    """Estimate all SROCCs of a run. The worst attack is chosen separately for each bootstrap replicate."""
    found = Estimates({}, {}, {})
    for neck in run.necks:
        if (tested := neck.evaluation) is not None:
            replicates = bootstrap.resampled_srocc(tested.mos, [tested.scores.values])[0]
            found.test[neck.name] = Estimate(tested.scores.srocc, replicates, tested.names)
        for item in neck.attacks:
            key = neck.name, item.budget
            scores = [item.clean.values, *(attack.values for attack in item.attacks.values())]
            clean, *attacked = bootstrap.resampled_srocc(item.mos, scores)
            found.clean[key] = Estimate(item.clean.srocc, clean, item.names)
            found.worst[key] = Estimate(item.worst.srocc, np.min(attacked, axis=0), item.names)
    return found


def results(run: Run, found: Estimates) -> Child:
    """Return the summary, the chart of clean and attacked SROCC, and the table of all attacks."""
    if not found.test and not found.worst:
        return missing("No test scores and no attacks were found.")
    mapped = " after a logistic map that was fitted on clean validation images" if run.model is None else ""
    definitions = element(
        "p",
        f"SROCC is the rank correlation of scores and labels. PLCC is the linear correlation{mapped}. 1 is perfect, 0 "
        "is chance, below 0 the order is reversed. “Worst” is the lowest value over all attacks at one budget.",
    )
    summary = element("div", element("div", _summary(run)), _falls(run, found), class_="results")
    if not run.budgets:
        return [definitions, summary, missing("No attack was run, so robustness was not measured.")]
    return [definitions, summary, _doubts(run), element("h3", "Every attack"), _attack_table(run)]


def limits(run: Run, found: Estimates) -> Child:
    """Return notes on the limits of the run, and a table of the differences between its necks."""
    notes = [*_attack_notes(run)]
    if run.necks and run.model is None:
        seeds = sorted({neck.config["seed"] for neck in run.necks if "seed" in neck.config})
        each = "Each neck" if len(run.necks) > 1 else "The neck"
        notes.append(
            f"{each} was trained once{f' (seed {listing(seeds)})' if seeds else ''}. The variation between seeds was "
            "not measured, and no interval on this page includes it."
        )
    differences = _differences(run, found)
    if differences is not None or found.worst:
        notes.append(
            f"Intervals are percentile bootstraps over images: {bootstrap.REPLICATES:,} resamples (seed "
            f"{bootstrap.SEED}), the same for every model and attack. Each resample has its own worst attack. Images "
            "of the same photograph are similar, which the bootstrap ignores, so the true uncertainty is larger."
        )
    return [element("ul", [element("li", note) for note in notes], class_="notes"), differences]


def _summary(run: Run) -> Markup:
    rows = []
    drops = ["SROCC drop", "PLCC drop"] if run.budgets else []
    tested = [(neck, neck.evaluation) for neck in run.necks if neck.evaluation is not None]
    if tested:
        rows.append(
            group(f"Clean, {listing(sorted({len(e.mos) for _, e in tested}))} test images", 3 + len(drops))
        )
        rows += [
            neck_row(n.name, fixed(e.scores.srocc), fixed(e.scores.plcc), *[""] * len(drops))
            for n, e in tested
        ]
    for budget in run.budgets:
        attacked = run.attacked(budget)
        sizes = listing(sorted({len(item.mos) for _, item in attacked}))
        rows.append(group(f"Worst at {budget_text(budget)}, {sizes} images", 3 + len(drops)))
        rows += [
            neck_row(
                neck.name,
                fixed(item.worst.srocc),
                fixed(item.worst.plcc),
                drop(item.clean.srocc, item.worst.srocc),
                drop(item.clean.plcc, item.worst.plcc),
            )
            for neck, item in attacked
        ]
    title = "Drop: clean minus worst, on the same images." if drops else None
    return table(["Neck" if run.model is None else "Model", "SROCC", "PLCC", *drops], rows, title=title)


def _doubts(run: Run) -> Markup | None:
    lines = [
        f"{neck.name}, {budget_text(budget)}, {doubt}"
        for budget in run.budgets
        for neck, item in run.attacked(budget)
        for doubt in item.doubts
    ]
    return element("ul", [element("li", line) for line in lines], class_="notes") if lines else None


def _falls(run: Run, found: Estimates) -> Markup | None:
    groups = []
    for budget in run.budgets:
        rows = []
        for neck, _ in run.attacked(budget):
            clean, worst = found.clean[neck.name, budget], found.worst[neck.name, budget]
            rows.append(
                Fall(neck.name, clean.srocc, worst.srocc, clean.interval, worst.interval, look(neck.name))
            )
        groups.append((budget_text(budget), rows))
    if not groups:
        return None
    note = "filled: clean; hollow: worst attack; bars: 95 % bootstrap intervals"
    return fall_chart(groups, title="SROCC, clean and attacked", note=note, x_label="SROCC")


def _attack_table(run: Run) -> Markup:
    """Return the table of all attacks, with a group of rows per budget and two columns per neck."""
    necks = [neck.name for neck in run.necks if neck.attacks]
    rows, left_out = [], set()
    for budget in run.budgets:
        items = {neck.name: item for neck, item in run.attacked(budget)}
        sizes = listing(sorted({len(item.mos) for item in items.values()}))
        rows.append(group(f"{budget_text(budget)}, {sizes} images", 1 + 2 * len(necks)))
        found = {
            neck: {"clean": item.clean, **item.attacks, "worst": item.worst} for neck, item in items.items()
        }
        for name in [
            *dict.fromkeys(name for item in items.values() for name in ("clean", *item.attacks)),
            "worst",
        ]:
            cells = [found.get(neck, {}).get(name, UNKNOWN) for neck in necks]
            values = [fixed(value) for cell in cells for value in (cell.srocc, cell.plcc)]
            rows.append(row(attack_text(name), *values, class_="total" if name == "worst" else None))
        left_out |= {attack_text(name) for item in items.values() for name in item.incomplete}
    columns = ["Attack", *(f"{name} {what}" for name in necks for what in ("SROCC", "PLCC"))]
    note = f" Not run without a surrogate: {listing(sorted(left_out))}." if left_out else ""
    return table(columns, rows, title=f"Clean: the same images without an attack.{note}")


def _attack_notes(run: Run) -> list[str]:
    items = [item for neck in run.necks for item in neck.attacks]
    if not items:
        return ["No attack was run, so robustness was not measured."]
    sizes, seeds = (
        listing(sorted(set(values))) for values in ([len(i.mos) for i in items], [i.seed for i in items])
    )
    if queries := sorted({item.queries for item in items if item.queries is not None}):
        return [
            f"The attacks used only scores, with {listing(f'{n:,}' for n in queries)} queries per image, on {sizes} "
            f"images (seed {seeds}). Attacks with gradients are stronger where they apply, so the attacked figures may "
            "overstate robustness."
        ]
    strengths = sorted({(item.steps, item.restarts) for item in items})
    said = listing(
        f"{count(steps, 'step')} with {count(restarts, 'random start')}" for steps, restarts in strengths
    )
    note = f"The attacks took {said} on {sizes} images (seed {seeds})."
    protocol = SRMConfig()
    full = protocol.attack_steps, protocol.attack_restarts
    if any(steps < full[0] or restarts < full[1] for steps, restarts in strengths):
        note += (
            f" The protocol has {full[0]} steps with {full[1]} random starts: these attacks are weaker, so the "
            "attacked figures overstate robustness."
        )
    shares = [share for item in items for share in item.zero_gradients.values()]
    if not shares:
        return [note]
    found = (
        f"at most {100 * max(shares):.2g} % of the gradients of an attack were"
        if max(shares) > 0
        else "no gradient was"
    )
    zero = "A model with vanishing gradients can look robust without being robust. In these attacks, "
    return [note, f"{zero}{found} zero."]


def _differences(run: Run, found: Estimates) -> Markup | None:
    """Return a table of differences: the SROCC of the first neck minus the SROCC of each other neck."""
    if len(run.necks) < 2:
        return None
    first = run.necks[0].name
    rows = []
    for other in (neck.name for neck in run.necks[1:]):
        compared = [("clean, whole test set", found.test.get(first), found.test.get(other))]
        for budget in run.budgets:
            a, b = found.worst.get((first, budget)), found.worst.get((other, budget))
            compared.append((f"worst at {budget_text(budget)}", a, b))
        rows += [
            _difference(f"{first} {chr(0x2212)} {other}, {what}", a, b) for what, a, b in compared if a and b
        ]
    if not rows:
        return None
    columns = ["Difference in SROCC", "value", "95 % interval", "reading"]
    return table(columns, rows, words=(0, 3), title="Differences between the necks, on the same images.")


def _difference(what: str, a: Estimate, b: Estimate) -> Markup:
    same = a.names == b.names
    interval = bootstrap.interval(a.replicates - b.replicates) if same else None
    if interval is None:
        between, reading = "—", "no interval: " + ("undefined correlations" if same else "different images")
    else:
        low, high = interval
        between = f"{signed(low)} to {signed(high)}"
        reading = "within noise: contains 0"
        if low > 0 or high < 0:
            reading = "excludes 0, for these images and trainings"
    return row(what, signed(a.srocc - b.srocc), between, reading, words=(3,))
