"""Attacks between models, and over steps and budgets, as plain data for tables and figures (SPEC section 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from srm_model import ranks
from srm_model.attacks.objectives import MSE
from srm_model.attacks.suite import Attack, Dataset, Job, Suite
from srm_model.config import SRMConfig
from srm_model.metrics import LogisticMap, plcc, srocc

_DEFAULTS = SRMConfig()


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
) -> dict[str, Any]:
    """PGD-MSE crafted on each model and scored on every model: all directions, each attack crafted once.

    models: two or more, by name, any modules that `pgd` accepts; necks, backbones and strangers alike.
    logistics: the map of each model that its PLCC is taken after; none is plain Pearson.
    Other arguments, the budget's meaning, seeds and the dealing to ranks are those of `Suite.run`.

    Returns `clean`, srocc, plcc and scores by model, and `pairs`, a list of source, target, srocc, plcc and scores,
    white-box pairs (source = target) included; beside them norm, eps, names and mos.
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
    rank, world = ranks.place()
    own: dict[int, dict[Any, list[float]]] = {}
    for number in range(rank, len(first.batches), world):
        images, mos = first.load(number)
        scores: dict[Any, list[float]] = {("mos",): mos.tolist()} | {
            (name,): job.clean(number, images) for name, job in jobs.items()
        }
        for source, job in jobs.items():
            attacked = job.craft(number, attack, images, mos).images
            scores |= {(source, name): target.score(number, attacked) for name, target in jobs.items()}
        own[number] = scores
    batches = {number: scores for part in ranks.gather(own) for number, scores in part.items()}

    def joined(key: tuple[str, ...]) -> list[float]:
        return [value for number in sorted(batches) for value in batches[number][key]]

    labels = joined(("mos",))

    def correlations(target: str, key: tuple[str, ...]) -> dict[str, Any]:
        scores = joined(key)
        logistic = (logistics or {}).get(target)
        mapped = scores if logistic is None else logistic(scores)
        return {"srocc": srocc(scores, labels), "plcc": plcc(mapped, labels), "scores": scores}

    return {
        "norm": norm,
        "eps": eps,
        "names": first.names,
        "mos": labels,
        "clean": {name: correlations(name, (name,)) for name in models},
        "pairs": [
            {"source": source, "target": target, **correlations(target, (source, target))}
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

    steps: None is the config's `attack_sweep_steps`. `arguments` are further ones of `Suite.run`. A row has steps,
    eps, clean, attacks (srocc, plcc, loss by attack) and worst.
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
        eps = suite.config.eps_linf if norm == "linf" else suite.config.eps_l2
    return [_row(suite, model, dataset, norm, budget, arguments) for budget in eps]


def _row(
    suite: Suite, model: nn.Module, dataset: Dataset, norm: str, eps: float, arguments: dict[str, Any]
) -> dict[str, Any]:
    result = suite.run(model, dataset, norm=norm, eps=eps, **arguments)
    return {
        "steps": suite.config.attack_steps,
        "eps": eps,
        "clean": {key: result.clean[key] for key in ("srocc", "plcc")},
        "attacks": {
            name: {key: entry[key] for key in ("srocc", "plcc", "loss")}
            for name, entry in result.attacks.items()
        },
        "worst": result.worst,
    }
