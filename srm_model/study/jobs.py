"""Derive the jobs of a study, one for each line of its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from srm_model.necks import NECKS
from srm_model.study import measuring
from srm_model.study.context import Context
from srm_model.study.file import FULL, Model, Stronger, slug

CLEAN = "clean"  # kind of a training's line of results; all other jobs of a model need the training


class Job(NamedTuple):
    """One line of results, and the function that measures it."""

    kind: str
    identity: dict[str, Any]
    label: str
    measure: Callable[[], dict[str, Any]]
    needs: tuple[Model, ...] = ()  # models to train first

    @property
    def name(self) -> str:
        """The name for `--list` and `--job`. It depends only on the declaration of this job in the study file."""
        return slug(self.label)


def jobs(c: Context) -> list[Job]:
    """Return all jobs of a study, in the order in which a single process runs them.

    Raises:
        ValueError: Two jobs have the same name.
    """
    grid = list(c.study.models())
    full = [model for model in grid if model.variant == FULL]
    ablated = [model for model in grid if model.variant != FULL]
    found = [
        *model_jobs(c, full),
        *swap_jobs(c, full),
        *audit_jobs(c, full),
        *model_jobs(c, ablated),
        *audit_jobs(c, ablated),
        *stronger_jobs(c, grid),
        *sweep_jobs(c, full),
        *transfer_jobs(c, full),
    ]
    labels: dict[str, str] = {}
    for job in found:
        if (other := labels.setdefault(job.name, job.label)) != job.label:
            raise ValueError(f"jobs {other!r} and {job.label!r} have the same name {job.name}; rename one")
    return found


def model_jobs(c: Context, models: Iterable[Model]) -> Iterator[Job]:
    """Yield the trainings and diagnoses of models, then the attacks on these models."""
    models = list(models)
    for model in models:
        identity = {**model.identity, "fingerprint": c.test(model).fingerprint}
        yield Job(CLEAN, identity, f"train {model.label}", partial(measuring.trained, c, model), (model,))
        if NECKS[model.neck].attention is not None and model.config.links:
            measure = partial(measuring.diagnosed, c, model)
            yield Job("diagnostics", model.identity, f"diagnose {model.label}", measure, (model,))
    for model in models:
        yield from attack_jobs(c, model)


def attack_jobs(c: Context, model: Model, stronger: Stronger | None = None) -> Iterator[Job]:
    """Yield one attack on a model for each budget.

    If `stronger`, a group of stronger attacks, is given, it determines the budgets, the suite and the settings of the
    attacks. Otherwise, the study determines them.
    """
    for norm, eps in c.study.budgets_of(model) if stronger is None else stronger.budgets:
        suite = c.study.suite if stronger is None else stronger.suite
        identity = {**model.identity, "norm": norm, "eps": eps, "images": c.study.images, "suite": suite}
        label = f"attack {model.label}, {norm} {eps:.4g}"
        if stronger is not None:
            identity, label = {**identity, "attack": stronger.config}, f"{label}, {stronger.name}"
        measure = partial(measuring.attacked, c, model, norm, eps, stronger)
        kind = "attack" if stronger is None else "stronger"
        yield Job(kind, identity, label, measure, (model, model.surrogate))


def swap_jobs(c: Context, models: Iterable[Model]) -> Iterator[Job]:
    """Yield an evaluation for each trained `srm` model and each swap of the study.

    A swap changes settings of a trained model without new training (see `measuring.swapped`).
    """
    for model in models:
        for name, changes in c.study.swaps.items() if model.neck == "srm" else ():
            identity = {**model.identity, "swap": name, "changes": changes}
            measure = partial(measuring.swap_evaluated, c, model, changes)
            yield Job("swap", identity, f"swap {name} into {model.label}", measure, (model,))


def audit_jobs(c: Context, models: Iterable[Model]) -> Iterator[Job]:
    """Yield audits at the last budget of the config's `eps_linf_tables`.

    Models are audited as trained. A model with the neck `srm` and without overrides is also audited after each swap in
    `audit_swaps`, which changes settings of the trained model without new training.
    """
    for model in filter(c.study.audited, models):
        eps = model.config.eps_linf_tables[-1]
        swappable = model.neck == "srm" and model.variant == FULL
        for swap in (None, *(c.study.audit_swaps if swappable else ())):
            identity = {**model.identity, "norm": "linf", "eps": eps, "images": c.study.audit}
            label, changes = f"audit {model.label}", {} if swap is None else c.study.swaps[swap]
            if swap is not None:
                identity, label = {**identity, "swap": swap, "changes": changes}, f"{label}, {swap}"
            measure = partial(measuring.audited, c, model, eps, changes)
            yield Job("audit", identity, label, measure, (model, model.surrogate))


def stronger_jobs(c: Context, models: Iterable[Model]) -> Iterator[Job]:
    """Yield the stronger attacks for table 15 of the report.

    The suite or the settings of a stronger attack differ from those of the study's own attacks.
    """
    models = list(models)
    for group in c.study.stronger:
        for model in models:
            name = model.neck if model.variant == FULL else model.variant
            if name in group.models and model.seed in group.seeds:
                yield from attack_jobs(c, model, group)


def sweep_jobs(c: Context, models: Iterable[Model]) -> Iterator[Job]:
    """Yield the sweeps over PGD steps for figure 5 of the report.

    The sweeps use the first dataset, the first backbone and the first budget of the study.
    """
    for norm, eps in c.study.budgets[:1] if c.study.sweep else ():
        for model in models:
            if (model.data, model.backbone) == (next(iter(c.study.data)), c.study.backbones[0]):
                identity = {**model.identity, "norm": norm, "eps": eps, "images": c.study.images}
                label = f"sweep steps of {model.label}"
                measure = partial(measuring.swept, c, model, norm, eps, label)
                yield Job("sweep", identity, label, measure, (model,))


def transfer_jobs(c: Context, models: Iterable[Model]) -> Iterator[Job]:
    """Yield the transfer attacks for table 10 of the report: between all necks of a backbone, and between backbones."""
    study, by_place = c.study, {(m.data, m.seed, m.backbone, m.neck): m for m in models}
    groups = [[(backbone, neck) for neck in study.necks] for backbone in study.backbones]
    groups += [[(backbone, neck) for backbone in pair] for pair in study.transfer for neck in study.necks]
    for data in study.data:
        for seed in study.seeds:
            for group in groups:
                members = tuple(by_place[data, seed, *entry] for entry in group)
                names = [f"{m.backbone}/{m.neck}" for m in members]
                for norm, eps in study.budgets if len(group) > 1 else ():
                    label = f"transfer between {', '.join(names)}, {data}, seed {seed}, {norm} {eps:.4g}"
                    identity = {"data": data, "seed": seed, "models": names, "norm": norm, "eps": eps}
                    identity |= {"config": members[0].config.to_dict(), "images": study.images}
                    measure = partial(measuring.transferred, c, members, norm, eps, label)
                    yield Job("transfer", identity, label, measure, members)
