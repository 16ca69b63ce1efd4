"""Attacks between models, and over steps and budgets, as plain data for tables and figures (docs/METHOD.md §6)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from srm_model.attacks.objectives import MSE
from srm_model.attacks.records import Records
from srm_model.attacks.suite import Attack, Dataset, Job, Suite, fingerprint, settings_of
from srm_model.config import SRMConfig
from srm_model.metrics import LogisticMap, doubts, plcc, srocc
from srm_model.norms import norm_of

_DEFAULTS = SRMConfig()
_KEPT = ("srocc", "plcc", "loss", "zero_gradients", "nonfinite_gradients")


def transfer(
    models: Mapping[str, nn.Module],
    dataset: Dataset,
    *,
    norm: str,
    eps: float,
    config: SRMConfig | None = None,
    logistics: Mapping[str, LogisticMap | None] | None = None,
    batch_size: int = _DEFAULTS.attack_batch_size,
    seed: int = 0,
    limit: int | None = None,
    resume: str | Path | None = None,
) -> dict[str, Any]:
    """PGD-MSE crafted on each model and scored on every model: all directions, each attack crafted once.

    models: two or more, by name, any modules that `pgd` accepts; necks, backbones and strangers alike.
    logistics: the map of each model that its PLCC is taken after; none is plain Pearson.
    Other arguments, the budget's meaning, seeds, the dealing to ranks and the going on from `resume` are those of
    `Suite.run`.

    Returns `clean`, srocc, plcc and scores by model, and `pairs`, a list of source, target, srocc, plcc, scores and the
    shares zero_gradients and nonfinite_gradients of the source's attack, white-box pairs (source = target) included;
    beside them norm, eps, names, mos and `doubts`, a sentence (and a warning) for each source whose gradients were zero
    or not finite: its figures may overstate robustness.
    """
    if len(models) < 2:
        raise ValueError(f"{len(models)} model: a transfer needs at least two")
    attack = Attack("pgd_mse", MSE())
    jobs = {
        name: Job(
            config=config or SRMConfig(),
            model=model,
            surrogate=None,
            attacks=(attack,),
            numbers={attack.name: 1},
            dataset=dataset,
            norm=norm,
            eps=eps,
            batch_size=batch_size,
            seed=seed,
            limit=limit,
        )
        for name, model in models.items()
    }
    first = next(iter(jobs.values()))
    settings = {} if resume is None else settings_of(first) | {"model": [*map(fingerprint, models.values())]}
    records = Records(resume, settings, len(first.batches))
    own = records.share(jobs)
    for number in own:
        batch = records.batches[number]
        images, mos = first.load(number)
        if batch.clean is None:
            batch.mos, batch.clean = mos.tolist(), {n: job.clean(number, images) for n, job in jobs.items()}
        for source in [name for name in jobs if name not in batch.attacks]:
            trace = jobs[source].craft(number, attack, images, mos)
            batch.attacks[source] = {
                "scores": {n: target.score(number, trace.images) for n, target in jobs.items()},
                "zero_gradients": trace.zero_gradients,
                "nonfinite_gradients": trace.nonfinite_gradients,
            }
            records.save(number)
    records.exchange(own)

    batches = records.batches
    labels = [value for batch in batches for value in batch.mos]

    def correlations(target: str, parts: list[list[float]]) -> dict[str, Any]:
        scores = [value for part in parts for value in part]
        logistic = (logistics or {}).get(target)
        mapped = scores if logistic is None else logistic(scores)
        return {"srocc": srocc(scores, labels), "plcc": plcc(mapped, labels), "scores": scores}

    weights = [len(batch.mos) for batch in batches]
    shares = {
        source: {
            kind: float(np.average([batch.attacks[source][kind] for batch in batches], weights=weights))
            for kind in ("zero_gradients", "nonfinite_gradients")
        }
        for source in models
    }
    found = doubts(shares)
    for doubt in found:
        warnings.warn(doubt, stacklevel=2)
    return {
        "norm": norm,
        "eps": first.eps,
        "names": first.names,
        "mos": labels,
        "doubts": found,
        "clean": {name: correlations(name, [batch.clean[name] for batch in batches]) for name in models},
        "pairs": [
            {
                "source": source,
                "target": target,
                **correlations(target, [batch.attacks[source]["scores"][target] for batch in batches]),
                **shares[source],
            }
            for source in models
            for target in models
        ],
    }


def sweep_steps(
    suite: Suite,
    model: nn.Module,
    dataset: Dataset,
    *,
    norm: str,
    eps: float,
    steps: Sequence[int] | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """`suite.run` at each number of steps, the step size following by its rule; a row for each.

    steps: None is the config's `attack_sweep_steps`. `arguments` are further ones of `Suite.run`; under `resume` each
    row has a folder of its own. A row has steps, eps, clean, attacks (srocc, plcc,
    loss, zero_gradients and nonfinite_gradients by attack) and worst.
    """
    return [
        _row(
            Suite(suite.attacks, suite.config.replace(attack_steps=count)),
            model,
            dataset,
            norm,
            eps,
            arguments,
        )
        for count in (suite.config.attack_sweep_steps if steps is None else steps)
    ]


def sweep_eps(
    suite: Suite,
    model: nn.Module,
    dataset: Dataset,
    *,
    norm: str,
    eps: Sequence[float] | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """`suite.run` at each budget, by default all of the config's for that norm; rows as in `sweep_steps`."""
    if eps is None:
        eps = norm_of(norm).sweep_of(suite.config)
    return [_row(suite, model, dataset, norm, budget, arguments) for budget in eps]


def _row(
    suite: Suite, model: nn.Module, dataset: Dataset, norm: str, eps: float, arguments: dict[str, Any]
) -> dict[str, Any]:
    if arguments.get("resume") is not None:
        place = Path(arguments["resume"], f"{suite.config.attack_steps}-{eps:.6g}")
        arguments = {**arguments, "resume": place}
    result = suite.run(model, dataset, norm=norm, eps=eps, **arguments)
    return {
        "steps": suite.config.attack_steps,
        "eps": result.eps,
        "clean": {key: result.clean[key] for key in ("srocc", "plcc")},
        "attacks": {name: {key: entry[key] for key in _KEPT} for name, entry in result.attacks.items()},
        "worst": result.worst,
    }
