"""A fixed set of attacks on a whole data set, and the correlations that are left (docs/METHOD.md §6)."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from srm_model import ranks
from srm_model.attacks.auto import apgd_trace
from srm_model.attacks.gradient import PGDTrace, default_step_size, pgd_trace
from srm_model.attacks.guard import check_images, check_model, predict
from srm_model.attacks.objectives import OBJECTIVES, Objective
from srm_model.attacks.problem import check_budget, check_count
from srm_model.attacks.records import Batch, Records
from srm_model.attacks.square import square_trace
from srm_model.config import SRMConfig
from srm_model.metrics import LogisticMap, doubts, plcc, srocc
from srm_model.modules import is_stochastic, unwrapped
from srm_model.norms import norm_of
from srm_model.suites import SUITES

_DEFAULTS = SRMConfig()
METHODS = ("pgd", "apgd", "square")


class Dataset(Protocol):
    """`dataset[i]` is (image (3, H, W) float in [0, 1], normalised MOS); `.names` is used where it exists."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Tensor, float]: ...


@dataclass(frozen=True)
class Attack:
    """An attack of the suite; with `transfer` it is crafted on the surrogate and scored on the target.

    method: "pgd", "apgd" (step sizes by progress) or "square" (queries only).
    """

    name: str
    objective: Objective
    transfer: bool = False
    method: str = "pgd"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: expected one of {', '.join(map(repr, METHODS))}")


class Example(NamedTuple):
    """One attacked image, to be looked at."""

    position: int  # in `SuiteResult.names`
    clean: Tensor  # (3, H, W) in [0, 1], on the CPU
    attacked: Tensor
    clean_score: float
    attacked_score: float
    attack: str


@dataclass(frozen=True)
class SuiteResult:
    """Scores and correlations of one model, clean and under each attack, at one norm and budget."""

    norm: str
    eps: float  # as asked for; "l2" budgets are stated at 512×512
    radius: float  # what each image got: eps, scaled by √(HW)/512 for "l2"
    steps: int
    step_size: float
    restarts: int
    eot: int  # passes averaged per step and per score; above 1 for a stochastic model
    batch_size: int
    seed: int
    names: list[str]
    mos: list[float]
    logistic: dict[str, Any] | None  # the frozen map PLCC is taken after; None: plain Pearson
    clean: dict[str, Any]  # srocc, plcc, scores
    attacks: dict[str, dict[str, Any]]  # the same and diagnostics, by attack
    # srocc, plcc, which attacks they come from, the drops from clean, and `doubts`: a sentence on each attack whose
    # gradients were zero (more than 1 %) or not finite.
    worst: dict[str, Any]
    incomplete: list[str]  # attacks of the suite that were left out for want of a surrogate
    examples: list[Example] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, as plain JSON values (undefined correlations are NaN)."""
        values = {name: value for name, value in vars(self).items() if name != "examples"}
        return {**values, "plcc": "plain Pearson" if self.logistic is None else "after the frozen logistic"}


class Suite:
    """A fixed list of attacks with the settings of one `SRMConfig`; `Suite.paper()` is the article's."""

    def __init__(self, attacks: Sequence[Attack], config: SRMConfig | None = None) -> None:
        self.attacks = tuple(attacks)
        self.config = SRMConfig() if config is None else config
        names = [attack.name for attack in self.attacks]
        if not names or len(set(names)) < len(names) or "clean" in names:
            raise ValueError(
                f"attacks named {', '.join(names) or 'nothing'}: expected one or more distinct names"
            )

    @classmethod
    def named(cls, name: str, config: SRMConfig | None = None) -> Suite:
        """A suite of `suites.SUITES`."""
        config = SRMConfig() if config is None else config
        planned = SUITES[name]
        return cls(
            [Attack(p.name, OBJECTIVES[p.objective](config), p.transfer, p.method) for p in planned], config
        )

    @classmethod
    def paper(cls, config: SRMConfig | None = None) -> Suite:
        """PGD with MSE, drift and pair inversion, and PGD-MSE transferred from a surrogate."""
        return cls.named("paper", config)

    @classmethod
    def extended(cls, config: SRMConfig | None = None) -> Suite:
        """The article's suite, and beyond it what it leaves open.

        PGD that raises every score, that lowers every score, and on a list-wise objective; PGD that sets its own
        step sizes, per image and per batch; and a search that only asks for scores.
        """
        return cls.named("extended", config)

    @classmethod
    def queries(cls, config: SRMConfig | None = None) -> Suite:
        """Searches that only ask for scores: for models without a gradient, and to compare any models alike."""
        return cls.named("queries", config)

    def run(
        self,
        model: nn.Module,
        dataset: Dataset,
        *,
        norm: str,
        eps: float,
        surrogate: nn.Module | None = None,
        logistic: LogisticMap | None = None,
        batch_size: int = _DEFAULTS.attack_batch_size,
        seed: int = 0,
        progress: bool = False,
        keep: int = 0,
        limit: int | None = None,
        resume: str | Path | None = None,
    ) -> SuiteResult:
        """Attack every image of `dataset` with every attack of the suite and correlate what is left with MOS.

        model, surrogate: any modules that `pgd` accepts. Without a surrogate the transfer attacks are left out,
            `incomplete` names them, and the worst case is over those that ran.
        eps: for "l2" the budget at 512×512, scaled by √(HW)/512 to the images at hand.
        logistic: map fitted on clean validation scores (`LogisticMap`), applied as it is to clean and attacked
            scores before PLCC; None gives plain Pearson.
        batch_size: images attacked together, in the data set's order; it matters to the pair-inversion
            objective. The last batch may be smaller.
        seed: of the random starts and of a stochastic model's draws, by batch and attack; the starts are the
            same for every model.
        progress: a bar on stderr, one tick a step or query. keep: how many `examples` to return, evenly spaced over
            the set, each under the attack that moved its score most.
        limit: attack only so many images, evenly spaced over the set.
        resume: a folder that holds what is finished, a file for each batch, rewritten after each attack; a later
            call with the same arguments, on however many ranks, goes on from it and repeats nothing. A file made
            by other settings, weights or images is a ValueError.

        In a torch.distributed process group (`torchrun`) the batches are dealt to the ranks, each writes its own to
        `resume`, which they share, and every rank returns the whole result, the same to the bit as one process's.
        Rank 0 shows its own progress.

        A model with a true `stochastic` attribute is attacked with EOT over `config.eot_samples` passes, and its
        scores, clean and attacked alike, are means of as many. Scores are taken on the float images, not on
        images rounded to 8 bits.

        A clean score that is not finite is a ValueError. A correlation is NaN where a model's scores are constant, or
        no longer finite under attack, and NaN is worse than any number in the worst case: what cannot be measured
        is not counted as robust. Drops are clean minus worst. Attacks whose gradients were zero or not finite are
        named in `worst["doubts"]`, and in a warning each: their figures may overstate robustness.
        """
        config = self.config
        if logistic is not None and not isinstance(logistic, LogisticMap):
            raise TypeError(f"logistic of type {type(logistic).__name__}: expected a LogisticMap or None")
        job = Job(
            config=config,
            model=model,
            surrogate=surrogate,
            attacks=tuple(attack for attack in self.attacks if surrogate is not None or not attack.transfer),
            numbers={attack.name: number for number, attack in enumerate(self.attacks, start=1)},
            dataset=dataset,
            norm=norm,
            eps=eps,
            batch_size=batch_size,
            seed=seed,
            limit=limit,
            keep=keep,
        )
        records = Records(resume, {} if resume is None else settings_of(job), len(job.batches))
        own = records.share(attack.name for attack in job.attacks)
        left = [attack for number in own for attack in job.waiting(records.batches[number])]
        total = len(own) * sum(map(job.work, job.attacks))
        with _bar(progress and ranks.place()[0] == 0, total, total - sum(map(job.work, left))) as tick:
            for number in own:
                _attack_batch(job, number, records, tick)
        records.exchange(own)
        return _result(job, records, logistic, self.attacks)


@dataclass
class Job:
    """The checked arguments of one run, and how a batch of it is loaded, scored and attacked."""

    config: SRMConfig
    model: nn.Module
    surrogate: nn.Module | None
    attacks: tuple[Attack, ...]  # those that can run
    numbers: dict[str, int]  # place of each attack in the suite, for its seed
    dataset: Dataset
    norm: str
    eps: float
    batch_size: int
    seed: int
    limit: int | None
    keep: int = 0

    def __post_init__(self) -> None:
        self.eps = check_budget(self.norm, self.eps)
        check_model(self.model)
        if self.surrogate is not None:
            check_model(self.surrogate)
        if not self.attacks:
            raise ValueError("every attack of the suite is a transfer attack: expected a surrogate, got None")
        self.batch_size = check_count("batch_size", self.batch_size, 1)
        self.seed = check_count("seed", self.seed, 0)
        self.keep = check_count("keep", self.keep, 0)
        check_dataset(self.dataset)
        count = len(self.dataset)
        if self.limit is not None:
            self.limit = check_count("limit", self.limit, 2)
        if count < 2:
            raise ValueError(f"a data set of {count} images: a correlation needs at least 2")
        self.indices = spread(count, count if self.limit is None else self.limit)
        self.batches = [
            self.indices[start : start + self.batch_size]
            for start in range(0, len(self.indices), self.batch_size)
        ]
        names = _names(self.dataset)
        self.names = [names[index] for index in self.indices]
        self.first = self.item(self.indices[0])[0]
        check_images(self.first[None])
        self.radius = norm_of(self.norm).radius(self.eps, self.first)
        self.step_size = default_step_size(self.norm, self.radius, self.config.attack_steps, self.config)

    def work(self, attack: Attack) -> int:
        """How many steps or rounds of queries an attack on a batch takes."""
        if attack.method == "square":
            asked = self.config.attack_queries // self.samples(self.model)
            return asked - bool(getattr(attack.objective, "uses_clean_scores", True))
        return self.config.attack_restarts * self.config.attack_steps

    def samples(self, model: nn.Module) -> int:
        return self.config.eot_samples if is_stochastic(model) else 1

    def waiting(self, batch: Batch) -> list[Attack]:
        """The attacks that a batch still lacks."""
        return [attack for attack in self.attacks if attack.name not in batch.attacks]

    def shown(self, number: int) -> list[int]:
        """The rows of a batch that are among the `keep` evenly spaced examples."""
        places = (divmod(place, self.batch_size) for place in spread(len(self.indices), self.keep))
        return [row for batch, row in places if batch == number]

    def load(self, number: int) -> tuple[Tensor, Tensor]:
        items = [self.item(index) for index in self.batches[number]]
        images = [image for image, _ in items]
        for name, image in zip(self.names[number * self.batch_size :], images, strict=False):
            if image.shape != self.first.shape:
                raise ValueError(
                    f"{name} has shape {tuple(image.shape)} and {self.names[0]} {tuple(self.first.shape)}: "
                    "a suite needs images of one size"
                )
        return torch.stack(images), torch.tensor([mos for _, mos in items], dtype=torch.float64)

    def item(self, index: int) -> tuple[Tensor, float]:
        """An image and its MOS; an item of another form is a TypeError."""
        found: Any = self.dataset[index]
        if isinstance(found, tuple | list) and len(found) == 2:
            with suppress(TypeError, ValueError, RuntimeError):
                return torch.as_tensor(found[0]).detach(), float(found[1])
        held = (
            f"({', '.join(type(part).__name__ for part in found)})" if isinstance(found, tuple | list) else ""
        )
        raise TypeError(
            f"dataset[{index}] is a {type(found).__name__} {held}".rstrip()
            + ": expected a pair (image, MOS) of a float tensor (3, H, W) and a number"
        )

    def score(self, number: int, images: Tensor) -> list[float]:
        seed = self._seed(
            number, 0
        )  # one for clean and attacked, so that they share a stochastic model's draws
        return predict(self.model, images, samples=self.samples(self.model), seed=seed).tolist()

    def clean(self, number: int, images: Tensor) -> list[float]:
        """Scores of a batch as it is; one that is not finite is a ValueError."""
        scores = self.score(number, images)
        broken = [
            name
            for name, score in zip(self.names[number * self.batch_size :], scores, strict=False)
            if not math.isfinite(score)
        ]
        if broken:
            raise ValueError(
                f"the clean scores of {len(broken)} of {len(scores)} images of a batch are not finite, that of "
                f"{broken[0]} first: a model that is broken already cannot be attacked"
            )
        return scores

    def craft(
        self,
        number: int,
        attack: Attack,
        images: Tensor,
        mos: Tensor,
        tick: Callable[[], object] | None = None,
    ) -> PGDTrace:
        model = self.model
        if attack.transfer:
            assert self.surrogate is not None
            model = self.surrogate
        common: dict[str, Any] = {
            "norm": self.norm,
            "eps": self.radius,
            "eot": self.samples(model),
            "generator": torch.Generator().manual_seed(self._seed(number, self.numbers[attack.name])),
            "on_step": tick,
        }
        if attack.method == "square":
            queries, area = self.config.attack_queries, self.config.attack_square_area
            return square_trace(model, images, mos, attack.objective, queries=queries, area=area, **common)
        common |= {
            "steps": self.config.attack_steps,
            "restarts": self.config.attack_restarts,
            "restart_batch": self.config.attack_restart_batch,
        }
        if attack.method == "apgd":
            return apgd_trace(model, images, mos, attack.objective, **common)
        return pgd_trace(model, images, mos, attack.objective, step_size=self.step_size or None, **common)

    def _seed(self, number: int, purpose: int) -> int:
        sequence = np.random.SeedSequence([self.seed, number, purpose])
        return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def _attack_batch(job: Job, number: int, records: Records, tick: Callable[[], object] | None) -> None:
    batch = records.batches[number]
    images, mos = job.load(number)
    if batch.clean is None:
        batch.mos, batch.clean = mos.tolist(), job.clean(number, images)
    for attack in job.waiting(batch):
        trace = job.craft(number, attack, images, mos, tick)
        batch.attacks[attack.name] = {
            "scores": job.score(number, trace.images),
            "loss": float(trace.loss.double().mean()),
            "zero_gradients": trace.zero_gradients,
            "nonfinite_gradients": trace.nonfinite_gradients,
        }
        for row in job.shown(number):
            if _furthest(batch, row) == attack.name:
                batch.examples[row] = trace.images[row].cpu().clone()
        records.save(number)


def _furthest(batch: Batch, row: int) -> str:
    """The attack, of those that are finished, that moved an image's score most."""
    return max(batch.attacks, key=lambda name: _move(batch.attacks[name]["scores"][row], batch.clean[row]))


def _examples(job: Job, records: Records) -> list[Example]:
    found = []
    for number, batch in enumerate(records.batches):
        for row in job.shown(number):
            attack, position = _furthest(batch, row), number * job.batch_size + row
            image = job.item(job.indices[position])[0].cpu()
            score = batch.attacks[attack]["scores"][row]
            found.append(Example(position, image, batch.examples[row], batch.clean[row], score, attack))
    return found


def _move(score: float, clean: float) -> float:
    move = abs(score - clean)
    return math.inf if math.isnan(move) else move


def _result(
    job: Job, records: Records, logistic: LogisticMap | None, attacks: tuple[Attack, ...]
) -> SuiteResult:
    batches = records.batches
    mos = [value for batch in batches for value in batch.mos]

    def correlations(scores: list[float]) -> dict[str, Any]:
        mapped = scores if logistic is None else logistic(scores)
        return {"srocc": srocc(scores, mos), "plcc": plcc(mapped, mos), "scores": scores}

    clean = correlations([score for batch in batches for score in batch.clean])
    attacked: dict[str, dict[str, Any]] = {}
    for attack in job.attacks:
        parts = [batch.attacks[attack.name] for batch in batches]
        weights = [len(part["scores"]) for part in parts]
        attacked[attack.name] = {
            **correlations([score for part in parts for score in part["scores"]]),
            "crafted_on": "surrogate" if attack.transfer else "model",
            "method": attack.method,
            # Of the kept iterates, on the model they were crafted on; of no gradients the shares are NaN.
            **{
                mean: float(np.average([part[mean] for part in parts], weights=weights))
                for mean in ("loss", "zero_gradients", "nonfinite_gradients")
            },
        }
    worst: dict[str, Any] = {}
    for metric in ("srocc", "plcc"):
        name = min(attacked, key=lambda name: _nan_first(attacked[name][metric]))
        worst |= {metric: attacked[name][metric], f"{metric}_attack": name}
        worst[f"{metric}_drop"] = clean[metric] - attacked[name][metric]
    worst["doubts"] = doubts(attacked)
    for doubt in worst["doubts"]:
        warnings.warn(doubt, stacklevel=3)
    return SuiteResult(
        norm=job.norm,
        eps=job.eps,
        radius=job.radius,
        steps=job.config.attack_steps,
        step_size=job.step_size,
        restarts=job.config.attack_restarts,
        eot=job.samples(job.model),
        batch_size=job.batch_size,
        seed=job.seed,
        names=job.names,
        mos=mos,
        logistic=None if logistic is None else logistic.to_dict(),
        clean=clean,
        attacks=attacked,
        worst=worst,
        incomplete=[attack.name for attack in attacks if attack not in job.attacks],
        examples=_examples(job, records),
    )


def check_dataset(dataset: Any) -> None:
    """Something with a length and items by number; TypeError."""
    given = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise TypeError(
            "dataset is a DataLoader: expected the data set itself (loader.dataset); batches are made here"
        )
    if isinstance(dataset, Mapping) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"dataset of type {given}: expected len(dataset) and dataset[i], a pair (image, MOS), for i from 0"
        )


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _names(dataset: Any) -> list[str]:
    """The data set's own names, through a `Subset` too; else the indices."""
    if isinstance(dataset, Subset):
        names = _names(dataset.dataset)
        return [names[index] for index in dataset.indices]
    return [str(name) for name in getattr(dataset, "names", range(len(dataset)))]


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` positions, evenly spaced and in order."""
    wanted = min(wanted, count)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


@contextmanager
def _bar(shown: bool, total: int, done: int) -> Iterator[Callable[[], object] | None]:
    if not shown:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="step", desc="attacks") as bar:
        yield bar.update


def settings_of(job: Job) -> dict[str, Any]:
    """What a finished batch depends on, as JSON values."""
    images = hashlib.sha256(json.dumps(job.names).encode())
    images.update(str(getattr(job.dataset, "fingerprint", "")).encode())
    images.update(repr(tuple(job.first.shape)).encode() + _bytes(job.first))
    return {
        "norm": job.norm,
        "eps": job.eps,
        "steps": job.config.attack_steps,
        "step_size": job.step_size,
        "restarts": job.config.attack_restarts,
        "restart_batch": job.config.attack_restart_batch,
        "queries": job.config.attack_queries,
        "square_area": job.config.attack_square_area,
        "eot_samples": job.config.eot_samples,
        "batch_size": job.batch_size,
        "seed": job.seed,
        "keep": job.keep,
        "attacks": {attack.name: _describe(attack) for attack in job.attacks},
        "images": images.hexdigest(),
        "model": fingerprint(job.model),
        "surrogate": None if job.surrogate is None else fingerprint(job.surrogate),
    }


def _describe(attack: Attack) -> str:
    objective = attack.objective
    if is_dataclass(objective):
        described = repr(objective)
    else:
        described = getattr(objective, "__qualname__", type(objective).__qualname__)
    return described if attack.method == "pgd" else f"{attack.method} {described}"


def fingerprint(model: nn.Module) -> str:
    """A hash of the class, the config where there is one, and the weights and buffers."""
    model = unwrapped(model)
    digest = hashlib.sha256(type(model).__qualname__.encode())
    config = getattr(model, "config", None)
    if isinstance(config, SRMConfig):
        digest.update(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
