"""Transfer attacks between models, and sweeps over steps and budgets (docs/METHOD.md §6)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from srm_model.attacks.objectives import MSE
from srm_model.attacks.records import Batch, Records
from srm_model.attacks.suite import (
    Attack,
    Dataset,
    Job,
    Suite,
    correlations,
    fingerprint,
    means,
    settings_of,
)
from srm_model.config import SRMConfig
from srm_model.metrics import LogisticMap, doubts
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
    """Craft PGD-MSE examples on each model, and score all examples with every model.

    Arguments that are not listed are those of `Suite.run`. Errors and the behaviour in a process group are also as in
    `Suite.run`.

    Args:
        models: A mapping from names to modules that `pgd` accepts, with two or more entries.
        config: Settings of the attack. Default: `SRMConfig()`.
        logistics: Logistic map of each model, for PLCC. Default: plain Pearson correlation.

    Returns:
        A dictionary with norm, eps, names, mos and these entries:

        - `clean`: for each model, a dict with srocc, plcc and scores;
        - `pairs`: for each pair of models, a dict with source, target, srocc, plcc, scores, zero_gradients and
          nonfinite_gradients. White-box pairs (source = target) are included;
        - `doubts`: a warning for each source with more than 1 % zero gradients, or with a gradient that is not finite.

    Raises:
        ValueError: As in `Suite.run`, or there are fewer than two models.
    """
    if len(models) < 2:
        raise ValueError(f"models has {len(models)} entries; a transfer needs at least two")
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
    found = _transfer_result(records.batches, list(models), logistics or {})
    for doubt in found["doubts"]:
        warnings.warn(doubt, stacklevel=2)
    return {"norm": norm, "eps": first.eps, "names": first.names, **found}


def _transfer_result(
    batches: Sequence[Batch], models: Sequence[str], logistics: Mapping[str, LogisticMap | None]
) -> dict[str, Any]:
    """Return the entries `mos`, `doubts`, `clean` and `pairs` of the result of `transfer`."""
    labels = [value for batch in batches for value in batch.mos]
    shares = {source: means(batches, source, ("zero_gradients", "nonfinite_gradients")) for source in models}
    return {
        "mos": labels,
        "doubts": doubts(shares),
        "clean": {
            name: correlations([batch.clean[name] for batch in batches], labels, logistics.get(name))
            for name in models
        },
        "pairs": [
            {
                "source": source,
                "target": target,
                **correlations(
                    [batch.attacks[source]["scores"][target] for batch in batches],
                    labels,
                    logistics.get(target),
                ),
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
    """Run a suite with different numbers of steps.

    The step size of PGD is inversely proportional to the number of steps (docs/METHOD.md §6).

    Arguments that are not listed are those of `Suite.run`. The suite runs once for each number of steps. If `resume` is
    given, each of these runs stores its results in its own subfolder of `resume`.

    Args:
        suite: The suite to run.
        steps: Numbers of steps. Default: `attack_sweep_steps` of the suite's config.

    Returns:
        A row for each number of steps. Each row has the entries steps, eps, clean, attacks and worst. `attacks` has,
        for each attack, a dict with srocc, plcc, loss, zero_gradients and nonfinite_gradients. `clean` has the
        correlations on clean images. `worst` has the lowest correlations over all attacks.
    """
    counts = suite.config.attack_sweep_steps if steps is None else steps
    suites = [Suite(suite.attacks, suite.config.replace(attack_steps=count)) for count in counts]
    return [_row(each, model, dataset, norm, eps, arguments) for each in suites]


def sweep_eps(
    suite: Suite,
    model: nn.Module,
    dataset: Dataset,
    *,
    norm: str,
    eps: Sequence[float] | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Run a suite with different budgets.

    Arguments that are not listed are those of `sweep_steps`, except `steps`.

    Args:
        eps: Budgets. Default: the budgets of the suite's config for the norm.

    Returns:
        A row for each budget, as in `sweep_steps`.
    """
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
