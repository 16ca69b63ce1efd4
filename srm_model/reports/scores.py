"""Draw scatter charts of labels against predicted scores, and show pictures of attacked images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from srm_model.reports.blocks import caption, look, missing, neck_heading
from srm_model.reports.charts import padded, scatter
from srm_model.reports.markup import Child, Markup, element
from srm_model.reports.pictures import data_uri
from srm_model.reports.run import Budget, Example, Neck, Run
from srm_model.reports.text import attack_text, budget_text, fixed

EXAMPLES_PER_BUDGET = 3


def label_words(labels: str) -> str:
    """Return what an axis title calls the labels, for example "mean opinion" if `labels` is "mos"."""
    kind, _, name = labels.partition(":")
    known = {"metric": name.upper(), "mos": "mean opinion", "opinions": "mean opinion of a similar image"}
    return known.get(kind, labels)


@dataclass(frozen=True)
class _View:
    title: str
    srocc: float
    mos: np.ndarray
    scores: np.ndarray

    @property
    def subtitle(self) -> str:
        return f"SROCC {fixed(self.srocc)} on {len(self.mos)} images"


def scatters(run: Run) -> Child:
    """Draw scatter charts for each neck: a chart for the clean scores, and a chart for the worst attack at each budget.

    All charts have the same axis limits.
    """
    views = {neck.name: _views(neck) for neck in run.necks}
    everything = [view for panels in views.values() for view in panels]
    if not everything:
        return missing("No scores were found.")
    x_limits = _score_limits([panels[0].scores for panels in views.values() if panels], everything)
    y_limits = padded(*_range([view.mos for view in everything]))
    source = run.labels or "source unknown"
    y_label = f"label ({label_words(source)})"
    line = "The dashed line is the logistic map from score to label, fitted on clean validation images. "
    parts: list[Child] = [
        element(
            "p",
            f"A dot is an image. {line if run.model is None else ''}All panels have the same axes; an arrow head on an "
            "edge is a score outside of the axes.",
        )
    ]
    for neck in run.necks:
        logistic = neck.evaluation.logistic if neck.evaluation else None
        panels = [
            scatter(
                view.scores,
                view.mos,
                look=look(neck.name),
                title=view.title,
                note=view.subtitle,
                alt=f"{neck.name}, {view.title}: {y_label} against predicted score, {view.subtitle}.",
                x_limits=x_limits,
                y_limits=y_limits,
                x_label="predicted score",
                y_label=y_label,
                curve=logistic,
            )
            for view in views[neck.name]
        ]
        parts.append(neck_heading(neck.name))
        parts.append(element("div", panels, class_="panels") if panels else missing("No scores were found."))
        if panels and logistic is None and run.model is None:
            parts.append(missing("No logistic map was found for this neck."))
        elif logistic is not None and not logistic.converged:
            parts.append(caption(f"The map of this neck is a straight line: {logistic.reason}."))
        elif logistic is not None and panels and _turns(logistic(np.linspace(*x_limits, 200))):
            parts.append(
                caption("The map of this neck is not monotonic, so its PLCC can contradict its SROCC.")
            )
    return parts


def pictures(run: Run) -> Child:
    """Show pictures of attacked images, with their scores.

    For each image, the first picture is the clean image. Then come two pictures for each neck: the attacked image, and
    the magnified change.
    """
    if not run.budgets:
        return missing("No attack was run.")
    strips = []
    for budget in run.budgets:
        kept = {neck.name: {e.name: e for e in item.examples} for neck, item in run.attacked(budget)}
        names = dict.fromkeys(name for examples in kept.values() for name in examples)
        for name in list(names)[:EXAMPLES_PER_BUDGET]:
            found = {neck: examples[name] for neck, examples in kept.items() if name in examples}
            strips.append(_strip(budget, name, found))
    if not strips:
        return missing("The attacks kept no pictures.")
    intro = (
        "Each image is shown clean and attacked, with its change around mid-grey, magnified as stated. The arrow leads "
        "from the model's score of the clean image to its score of the attacked image. The scores are for images in "
        "floating point; the pictures are rounded to 8 bits."
    )
    return [element("p", intro), strips, _credits(run)]


def _credits(run: Run) -> Markup | None:
    if not run.photographs:
        return None
    said = "; ".join(f"{p.file} of {p.source} ({p.licence})" for p in run.photographs)
    return caption(f"Photographs of the dataset: {said}.")


def _views(neck: Neck) -> list[_View]:
    views = []
    if neck.attacks:
        first = neck.attacks[0]
        views.append(_View("Clean", first.clean.srocc, first.mos, first.clean.values))
    elif neck.evaluation:
        scores = neck.evaluation.scores
        views.append(_View("Clean", scores.srocc, neck.evaluation.mos, scores.values))
    for item in neck.attacks:
        if (worst := item.attacks.get(item.worst_attack)) is not None:
            title = f"{budget_text(item.budget)}, {attack_text(item.worst_attack)}"
            views.append(_View(title, worst.srocc, item.mos, worst.values))
    return views


def _score_limits(clean: list[np.ndarray], everything: list[_View]) -> tuple[float, float]:
    """Return axis limits that include all clean scores, and attacked scores near the clean scores.

    Let the span be the difference between the highest and the lowest clean score. The limits include attacked scores
    that are at most one span above the highest clean score, or at most one span below the lowest clean score.
    """
    low, high = _range(clean)
    least, most = _range([view.scores for view in everything])
    span = (high - low) or 1.0
    return padded(max(least, low - span), min(most, high + span))


def _range(parts: list[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate(parts)
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)


def _turns(values: np.ndarray) -> bool:
    steps = np.diff(values)
    return bool((steps > 0).any() and (steps < 0).any())


def _strip(budget: Budget, name: str, examples: dict[str, Example]) -> Markup:
    some = next(iter(examples.values()))
    shown = [_picture(some.clean, f"{name}, clean", [element("b", "clean"), f", label {fixed(some.mos, 2)}"])]
    for neck, example in examples.items():
        attack, times = attack_text(example.attack), f"change × {example.magnification:g}"
        arrow = f"{fixed(example.clean_score, 2)} → {fixed(example.adversarial_score, 2)}"
        text = [f"{neck}: ", element("b", arrow), element("br"), attack]
        shown.append(_picture(example.attacked, f"{name}, attacked against {neck} by {attack}", text))
        shown.append(
            _picture(example.difference, f"{name}, {times}, attacked against {neck}", [neck, ": ", times])
        )
    return element(
        "div",
        element("h3", f"{name}, {budget_text(budget)}"),
        element("div", shown, class_="strip", style=f"--columns:{len(shown)}"),
        class_="example",
    )


def _picture(path: Path | None, alt: str, text: Child) -> Markup:
    shown = element("img", src=data_uri(path), alt=alt) if path else missing("picture not found")
    return element("figure", shown, element("figcaption", text))
