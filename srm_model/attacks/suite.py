"""Run a set of attacks on a dataset and compute the correlations under attack (docs/METHOD.md §6)."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from srm_model import ranks
from srm_model.attack_suites import SUITES
from srm_model.attacks.gradient import PGDTrace, default_step_size
from srm_model.attacks.guard import check_images, check_model, derived_seed, predict
from srm_model.attacks.methods import ATTACK_METHODS
from srm_model.attacks.objectives import OBJECTIVES, Objective
from srm_model.attacks.problem import check_budget, check_count
from srm_model.attacks.records import Batch, Records
from srm_model.config import SRMConfig
from srm_model.metrics import LogisticMap, doubts, plcc, srocc
from srm_model.modules import is_stochastic, unwrapped
from srm_model.norms import norm_of

_DEFAULTS = SRMConfig()


class Dataset(Protocol):
    """A dataset of pairs: an image (3, H, W), float in [0, 1], and its normalised MOS.

    The attribute `names`, with a name for each image, is optional.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Tensor, float]: ...


@dataclass(frozen=True)
class Attack:
    """An attack of a suite."""

    name: str
    objective: Objective
    transfer: bool = False  # whether examples are crafted on the surrogate and scored on the target
    method: str = "pgd"  # a key of `ATTACK_METHODS`

    def __post_init__(self) -> None:
        if self.method not in ATTACK_METHODS:
            raise ValueError(
                f"method={self.method!r}: expected one of {', '.join(map(repr, ATTACK_METHODS))}"
            )


class Example(NamedTuple):
    """An attacked image."""

    position: int  # index in `SuiteResult.names`
    clean: Tensor  # clean image (3, H, W) in [0, 1], on the CPU
    attacked: Tensor  # as `clean`
    clean_score: float
    attacked_score: float
    attack: str


@dataclass(frozen=True)
class SuiteResult:
    """Scores and correlations of one model without attack and under each attack, at one norm and budget."""

    norm: str
    eps: float  # the given budget; "l2" budgets are stated at 512×512
    radius: float  # radius for each image: eps, scaled by √(HW)/512 for "l2"
    steps: int  # steps of PGD and APGD
    step_size: float  # step size of PGD
    restarts: int  # restarts of PGD and APGD
    eot: int  # passes that are averaged per step and per score; more than 1 for stochastic models
    batch_size: int  # images that are attacked together
    seed: int
    names: list[str]
    mos: list[float]  # normalised
    logistic: dict[str, Any] | None  # the logistic map before PLCC; None for plain Pearson correlation
    clean: dict[str, Any]  # entries srocc, plcc and scores of the clean images
    # By attack: srocc, plcc, scores, crafted_on, method, and the means loss, zero_gradients, nonfinite_gradients.
    attacks: dict[str, dict[str, Any]]
    # The lowest srocc and plcc of all attacks, the attacks that gave them, the drops from clean, and `doubts`, a
    # warning for each attack whose gradients were zero or not finite.
    worst: dict[str, Any]
    incomplete: list[str]  # attacks of the suite that did not run because they need a surrogate
    examples: list[Example] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the images as JSON values. Undefined correlations are NaN."""
        values = {name: value for name, value in vars(self).items() if name != "examples"}
        return {**values, "plcc": "plain Pearson" if self.logistic is None else "after the frozen logistic"}


class Suite:
    """A fixed list of attacks with the settings of one config.

    Args:
        attacks: Attacks with distinct names.
        config: Settings of the attacks. Default: `SRMConfig()`.

    Raises:
        ValueError: There is no attack, two attacks have the same name, or an attack has the name "clean".
    """

    def __init__(self, attacks: Sequence[Attack], config: SRMConfig | None = None) -> None:
        self.attacks = tuple(attacks)
        self.config = SRMConfig() if config is None else config
        names = [attack.name for attack in self.attacks]
        if not names or len(set(names)) < len(names) or "clean" in names:
            raise ValueError(f"attacks have the names {names}; expected one or more distinct names")

    @classmethod
    def named(cls, name: str, config: SRMConfig | None = None) -> Suite:
        """Return a suite of `srm_model.attack_suites.SUITES` by its name."""
        config = SRMConfig() if config is None else config
        planned = SUITES[name]
        return cls(
            [Attack(p.name, OBJECTIVES[p.objective](config), p.transfer, p.method) for p in planned], config
        )

    @classmethod
    def paper(cls, config: SRMConfig | None = None) -> Suite:
        """Return the article's suite: PGD with three objectives, and a transfer attack."""
        return cls.named("paper", config)

    @classmethod
    def extended(cls, config: SRMConfig | None = None) -> Suite:
        """Return the article's suite with further objectives, APGD and square attack."""
        return cls.named("extended", config)

    @classmethod
    def queries(cls, config: SRMConfig | None = None) -> Suite:
        """Return square attacks only, which need no gradient."""
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
        """Attack every image of a dataset with every attack of the suite.

        Scores are computed on the float images, not on images rounded to 8 bits. If the attribute `stochastic` of a
        model is true, attacks that are crafted on the model use EOT over `config.eot_samples` passes, and the model's
        scores are averaged over the same number of passes. A correlation is NaN if the scores are constant or not
        finite, and NaN counts as the worst result. If more than 1 % of the gradients of an attack are zero, or if any
        gradient is not finite, the result of the attack may overstate the robustness of the model. In this case, a
        warning and `worst["doubts"]` name the attack.

        In a torch.distributed process group, the batches are distributed over the ranks, and all ranks use
        the same folder `resume`. Every rank returns the whole result, bitwise equal to the result of a single
        process. The progress bar is shown by rank 0 and counts only the batches of rank 0.

        Args:
            model: Any module that `pgd` accepts.
            dataset: Dataset of pairs (image, normalised MOS), which are read by index. All images have the same size.
            norm: A key of `norms.NORMS`, such as "linf".
            eps: Budget. An "l2" budget is stated for 512×512 pixels and scaled by √(HW)/512.
            surrogate: Model on which transfer attacks are crafted. Without a surrogate, transfer attacks are skipped
                and `incomplete` names them.
            logistic: Logistic map, fitted on clean validation scores, that is applied to the scores before PLCC is
                computed. Default: no map (plain Pearson correlation).
            batch_size: Number of images that are attacked together, in the order of the dataset. It changes the results
                of objectives that return one loss for the whole batch.
            seed: Seed of the random starts and of the randomness of stochastic models. Every batch and attack gets its
                own seed, which is derived from this seed.
            progress: Whether to show a progress bar on stderr.
            keep: Largest number of `examples` to return. Their images are evenly spaced over the attacked images. An
                example shows the attack that changed the score of the image most.
            limit: Number of images to attack, evenly spaced over the dataset. Default: all.
            resume: Folder for the results of finished attacks. A later call with the same arguments, on any number of
                ranks, uses these results and computes the missing ones.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of range, a clean score is not finite, the images differ in size, or `resume`
                has results for other settings, weights or images.
        """
        if logistic is not None and not isinstance(logistic, LogisticMap):
            raise TypeError(f"logistic is a {type(logistic).__name__}; expected a LogisticMap or None")
        job = Job(
            config=self.config,
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
    """One run of a suite with checked arguments. It loads, scores and attacks batches."""

    config: SRMConfig
    model: nn.Module  # the target
    surrogate: nn.Module | None  # model on which transfer attacks are crafted
    attacks: tuple[Attack, ...]  # the attacks that can run
    numbers: dict[str, int]  # number of each attack in the suite, for its seed
    dataset: Dataset  # pairs of image and normalised MOS
    norm: str
    eps: float  # budget, as in `Suite.run`
    batch_size: int  # images that are attacked together
    seed: int
    limit: int | None  # number of images; None takes all
    keep: int = 0  # number of examples to keep

    def __post_init__(self) -> None:
        self.eps = check_budget(self.norm, self.eps)
        check_model(self.model)
        if self.surrogate is not None:
            check_model(self.surrogate)
        if not self.attacks:
            raise ValueError("surrogate is None; expected a model, because every attack is a transfer attack")
        self.batch_size = check_count("batch_size", self.batch_size, 1)
        self.seed = check_count("seed", self.seed, 0)
        self.keep = check_count("keep", self.keep, 0)
        check_dataset(self.dataset)
        count = len(self.dataset)
        if self.limit is not None:
            self.limit = check_count("limit", self.limit, 2)
        if count < 2:
            raise ValueError(f"the dataset has {count} images; a correlation needs at least 2")
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
        """Return the number of steps or query rounds of an attack on a batch."""
        return ATTACK_METHODS[attack.method].work(self.config, self.samples(self.model), attack.objective)

    def samples(self, model: nn.Module) -> int:
        """Return the number of passes over which each gradient and each score of a model is averaged."""
        return self.config.eot_samples if is_stochastic(model) else 1

    def waiting(self, batch: Batch) -> list[Attack]:
        """Return the attacks whose results a batch does not have yet."""
        return [attack for attack in self.attacks if attack.name not in batch.attacks]

    def shown(self, number: int) -> list[int]:
        """Return the rows of a batch that are kept as examples."""
        places = (divmod(place, self.batch_size) for place in spread(len(self.indices), self.keep))
        return [row for batch, row in places if batch == number]

    def load(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the images (B, 3, H, W) and MOS (B,) of a batch; raise ValueError if the images differ in size."""
        items = [self.item(index) for index in self.batches[number]]
        images = [image for image, _ in items]
        for name, image in zip(self.names[number * self.batch_size :], images, strict=False):
            if image.shape != self.first.shape:
                raise ValueError(
                    f"{name} has shape {tuple(image.shape)} and {self.names[0]} has shape {tuple(self.first.shape)}; "
                    "expected images of the same size"
                )
        return torch.stack(images), torch.tensor([mos for _, mos in items], dtype=torch.float64)

    def item(self, index: int) -> tuple[Tensor, float]:
        """Return an image and its MOS; raise TypeError if `dataset[index]` is not a pair (image, MOS)."""
        found: Any = self.dataset[index]
        if isinstance(found, tuple | list) and len(found) == 2:
            with suppress(TypeError, ValueError, RuntimeError):
                return torch.as_tensor(found[0]).detach(), float(found[1])
        given = type(found).__name__
        if isinstance(found, tuple | list):
            given += f" ({', '.join(type(part).__name__ for part in found)})"
        raise TypeError(
            f"dataset[{index}] is a {given}; expected a pair (image, MOS) of a float tensor (3, H, W) and a number"
        )

    def score(self, number: int, images: Tensor) -> list[float]:
        """Score a batch, with a seed that is the same for its clean and its attacked images."""
        seed = derived_seed(self.seed, number, 0)
        return predict(self.model, images, samples=self.samples(self.model), seed=seed).tolist()

    def clean(self, number: int, images: Tensor) -> list[float]:
        """Score a clean batch; raise ValueError for a score that is not finite."""
        scores = self.score(number, images)
        broken = [
            name
            for name, score in zip(self.names[number * self.batch_size :], scores, strict=False)
            if not math.isfinite(score)
        ]
        if broken:
            raise ValueError(
                f"the clean scores of {len(broken)} of {len(scores)} images of a batch are not finite, for example "
                f"that of {broken[0]}; expected a model with finite scores"
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
        """Run an attack on a batch; `tick` is called after each step."""
        model = self.model
        if attack.transfer:
            assert self.surrogate is not None
            model = self.surrogate
        seed = derived_seed(self.seed, number, self.numbers[attack.name])
        method = ATTACK_METHODS[attack.method]
        arguments = method.arguments(self.config)
        if method.step_size:
            arguments["step_size"] = self.step_size or None
        return method.trace(
            model,
            images,
            mos,
            attack.objective,
            norm=self.norm,
            eps=self.radius,
            eot=self.samples(model),
            generator=torch.Generator().manual_seed(seed),
            on_step=tick,
            **arguments,
        )


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
    """Return the finished attack that changed an image's score most. NaN counts as the largest change."""

    def move(name: str) -> float:
        moved = abs(batch.attacks[name]["scores"][row] - batch.clean[row])
        return math.inf if math.isnan(moved) else moved

    return max(batch.attacks, key=move)


def _examples(job: Job, records: Records) -> list[Example]:
    found = []
    for number, batch in enumerate(records.batches):
        for row in job.shown(number):
            attack, position = _furthest(batch, row), number * job.batch_size + row
            image = job.item(job.indices[position])[0].cpu()
            score = batch.attacks[attack]["scores"][row]
            found.append(Example(position, image, batch.examples[row], batch.clean[row], score, attack))
    return found


def correlations(
    parts: Iterable[list[float]], mos: list[float], logistic: LogisticMap | None
) -> dict[str, Any]:
    """Concatenate a model's scores of all batches; return a dict with srocc, plcc and these scores."""
    scores = [score for part in parts for score in part]
    mapped = scores if logistic is None else logistic(scores)
    return {"srocc": srocc(scores, mos), "plcc": plcc(mapped, mos), "scores": scores}


def means(batches: Sequence[Batch], attack: str, keys: Iterable[str]) -> dict[str, float]:
    """Return the mean over all images of values that are stored per batch."""
    weights = [len(batch.mos) for batch in batches]
    return {
        key: float(np.average([batch.attacks[attack][key] for batch in batches], weights=weights))
        for key in keys
    }


def _result(
    job: Job, records: Records, logistic: LogisticMap | None, attacks: tuple[Attack, ...]
) -> SuiteResult:
    batches = records.batches
    mos = [value for batch in batches for value in batch.mos]
    clean = correlations([batch.clean for batch in batches], mos, logistic)
    attacked: dict[str, dict[str, Any]] = {
        attack.name: {
            **correlations([batch.attacks[attack.name]["scores"] for batch in batches], mos, logistic),
            "crafted_on": "surrogate" if attack.transfer else "model",
            "method": attack.method,
            **means(batches, attack.name, ("loss", "zero_gradients", "nonfinite_gradients")),
        }
        for attack in job.attacks
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
    """Raise TypeError unless the dataset has a length and items by index."""
    if isinstance(dataset, DataLoader):
        raise TypeError("dataset is a DataLoader; expected the dataset itself (loader.dataset)")
    if isinstance(dataset, Mapping) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; expected len(dataset) and dataset[i], a pair (image, MOS)"
        )


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _names(dataset: Any) -> list[str]:
    """Return the names of a dataset or of a `Subset`; return indices if it has no names."""
    if isinstance(dataset, Subset):
        names = _names(dataset.dataset)
        return [names[index] for index in dataset.indices]
    return [str(name) for name in getattr(dataset, "names", range(len(dataset)))]


def spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` positions below `count`, evenly spaced and in ascending order."""
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
    """Return, as JSON values, the settings that determine the results of a batch."""
    images = hashlib.sha256(json.dumps(job.names).encode())
    images.update(str(getattr(job.dataset, "fingerprint", "")).encode())
    images.update(repr(tuple(job.first.shape)).encode() + _bytes(job.first))
    methods = [ATTACK_METHODS[attack.method] for attack in job.attacks]
    fields = {field for method in methods for field in method.settings.values()}
    return {
        "norm": job.norm,
        "eps": job.eps,
        **{field.removeprefix("attack_"): getattr(job.config, field) for field in sorted(fields)},
        **({"step_size": job.step_size} if any(method.step_size for method in methods) else {}),
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
    """Return a hash of a model's class, config (if it has one), weights and buffers."""
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
