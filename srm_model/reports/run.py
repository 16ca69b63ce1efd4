"""Read and check the files of a run folder. Missing parts are None or empty."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from srm_model.checkpoint import CONFIG, read_card
from srm_model.files import read_json
from srm_model.metrics import LogisticMap, doubts
from srm_model.necks import NECKS
from srm_model.norms import place_of

T = TypeVar("T")
Budget: TypeAlias = tuple[str, float]  # norm and ε


@dataclass(frozen=True)
class Correlations:
    """SROCC and PLCC, NaN if undefined."""

    srocc: float
    plcc: float


@dataclass(frozen=True)
class Scores(Correlations):
    """One model's scores of a set of images, in the order of the images."""

    values: np.ndarray  # (n,)


@dataclass(frozen=True)
class Evaluation:
    """Contents of `evaluation.json`: results on the clean test set."""

    scores: Scores
    mos: np.ndarray  # (n,)
    names: tuple[str, ...]
    labels: str
    logistic: LogisticMap | None
    kernels: str | None  # which backends ran, and which verdict or setting chose them


@dataclass(frozen=True)
class Example:
    """Pictures of one attacked image; a path is None if the file is missing."""

    name: str
    mos: float
    clean_score: float
    adversarial_score: float
    attack: str
    magnification: float
    clean: Path | None
    attacked: Path | None
    difference: Path | None


@dataclass(frozen=True)
class Attacked:
    """Contents of `attacks/<norm>-<eps>.json`: results of one suite at one budget."""

    norm: str
    eps: float
    steps: int
    restarts: int
    seed: int
    mos: np.ndarray  # (n,)
    names: tuple[str, ...]
    clean: Scores
    attacks: dict[str, Scores]
    zero_gradients: dict[str, float]  # share of zero gradients by attack, if it was recorded
    doubts: tuple[str, ...]  # `metrics.doubts` of the attacks
    worst: Correlations  # lowest SROCC and lowest PLCC over all attacks
    worst_attack: str  # the attack with the lowest SROCC
    incomplete: tuple[str, ...]  # attacks that were not run without a surrogate
    examples: tuple[Example, ...]
    kernels: str | None = None  # which backends ran, and which verdict or setting chose them
    queries: int | None = None  # queries per image if all attacks use only scores, otherwise None

    @property
    def budget(self) -> Budget:
        return self.norm, self.eps


@dataclass(frozen=True)
class Photograph:
    """An original photograph of a synthesised dataset."""

    file: str
    source: str
    licence: str


@dataclass(frozen=True)
class Neck:
    """The folder of one trained neck, or of the attacks on a model from another package."""

    name: str
    backbone: str | None
    config: dict[str, Any]
    card: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    evaluation: Evaluation | None
    attacks: tuple[Attacked, ...]


@dataclass(frozen=True)
class Run:
    """A run folder: `run.json` and one folder per trained neck.

    The folder of `srm-iqa attack --model` has the attacks on one model from another package. `necks` then has one entry
    with the name of this model.
    """

    folder: Path
    title: str | None
    command: tuple[str, ...]  # one or more command lines
    dataset: dict[str, Any]
    created: str | None
    seconds: float | None
    versions: dict[str, str]
    photographs: tuple[Photograph, ...]
    necks: tuple[Neck, ...]
    model: str | None = None  # name of the model from another package; None for a run of necks

    @property
    def budgets(self) -> list[Budget]:
        """All budgets of the attacks, sorted by norm (Linf first) and then by ε."""
        return sorted({item.budget for neck in self.necks for item in neck.attacks}, key=_budget_order)

    def attacked(self, budget: Budget) -> list[tuple[Neck, Attacked]]:
        """Return the necks that were attacked at a budget, each with the result of its attack."""
        return [(neck, item) for neck in self.necks for item in neck.attacks if item.budget == budget]

    @property
    def labels(self) -> str | None:
        """The kind of labels: "mos", "metric:<name>", "opinions:<dataset>", or None if unknown."""
        said = [self.dataset.get("labels")]
        for neck in self.necks:
            said.append(neck.evaluation.labels if neck.evaluation else None)
            said.append(_mapping(neck.card.get("dataset")).get("labels"))
        stated = [label for label in said if isinstance(label, str)]
        made = [label for label in stated if label != "mos"]
        return next(iter(made + stated), None)


def read_run(folder: str | Path) -> Run:
    """Read the parts of a run folder that a report shows.

    Raises:
        ValueError: The folder is missing or is not a run folder, or a file in it is malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected the folder of a run")
    found = [name for name in NECKS if (folder / name).is_dir()]
    model = None if found else attacked_model(folder)
    if not found and model is None and not (folder / "run.json").is_file():
        raise ValueError(
            f"{folder}: not a run folder; expected run.json, a folder of a trained neck ({', '.join(NECKS)}), or "
            "results of srm-iqa attack --model"
        )
    about = _optional(folder / "run.json", _object) or {}
    command = about.get("command")
    commands = command if isinstance(command, list) else [command]
    return Run(
        folder=folder,
        title=_text(about.get("title")),
        command=tuple(text for text in map(_text, commands) if text),
        dataset=_mapping(about.get("dataset")),
        created=_text(about.get("created")),
        seconds=_number_or_none(about.get("seconds")),
        versions={str(key): str(value) for key, value in _mapping(about.get("versions")).items()},
        photographs=_photographs(_mapping(about.get("dataset")).get("root")),
        necks=tuple(
            [_read_neck(folder / name, name) for name in found]
            if model is None
            else [_read_neck(folder, model)]
        ),
        model=model,
    )


def attacked_model(folder: Path) -> str | None:
    """Return the name of the model whose attacks `srm-iqa attack --model` wrote to a folder; None without attacks."""
    for path in sorted(folder.glob("attacks/*.json")):
        if name := _text(_mapping(_mapping(read_json(path)).get("settings")).get("model")):
            return name
    return None


def numbers(value: Any) -> list[float]:
    """Return all finite numbers in a nested JSON value, in order."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [float(value)] if np.isfinite(value) else []
    if isinstance(value, dict):
        value = list(value.values())
    return [number for item in value for number in numbers(item)] if isinstance(value, list) else []


def _read_neck(folder: Path, name: str) -> Neck:
    model = read_card(folder) if (folder / CONFIG).is_file() else {}
    attacks = [_read_attacked(path) for path in folder.glob("attacks/*.json")]
    return Neck(
        name=name,
        backbone=model.get("backbone"),
        config=model.get("config", {}),
        card=model.get("card", {}),
        history=_read_history(folder / "history.jsonl"),
        evaluation=_optional(folder / "evaluation.json", _evaluation),
        attacks=tuple(sorted(attacks, key=lambda item: _budget_order(item.budget))),
    )


def _photographs(root: Any) -> tuple[Photograph, ...]:
    """Read `references.json` of a synthesised dataset, if the file still exists."""
    rows = _optional(Path(root) / "references.json", _list) if isinstance(root, str) else None
    return tuple(
        Photograph(*(str(row.get(key) or "unknown") for key in ("file", "source", "licence")))
        for row in map(_mapping, rows or ())
    )


def _budget_order(budget: Budget) -> tuple[int, str, float]:
    return place_of(budget[0]), *budget


def _read_attacked(path: Path) -> Attacked:
    folder = path.parent / path.stem
    examples = _optional(folder / "examples.json", partial(_examples, folder))
    return replace(_read(path, _attacked), examples=examples or ())


def _read_history(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.is_file():
        return ()
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_object(json.loads(line)))
        except ValueError:
            raise ValueError(f"{path}: line {number} is not a JSON object") from None
    return tuple(rows)


def _optional(path: Path, parse: Callable[[Any], T]) -> T | None:
    return _read(path, parse) if path.is_file() else None


def _read(path: Path, parse: Callable[[Any], T]) -> T:
    value = read_json(path)
    try:
        return parse(value)
    except KeyError as error:
        raise ValueError(f"{path}: has no key {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _evaluation(value: Any) -> Evaluation:
    value = _object(value)
    mos, logistic = _array(value["mos"]), value.get("logistic")
    return Evaluation(
        scores=_scores(value, len(mos)),
        mos=mos,
        names=_names(value["names"], len(mos)),
        labels=str(value.get("labels", "mos")),
        logistic=LogisticMap.from_dict(_object(logistic)) if logistic is not None else None,
        kernels=_text(value.get("kernels")),
    )


def _attacked(value: Any) -> Attacked:
    value = _object(value)
    mos, worst, attacks = _array(value["mos"]), _object(value["worst"]), _object(value["attacks"])
    if not attacks:
        raise ValueError("expected at least one attack")
    return Attacked(
        norm=str(value["norm"]),
        eps=float(value["eps"]),
        steps=int(value["steps"]),
        restarts=int(value["restarts"]),
        seed=int(value["seed"]),
        mos=mos,
        names=_names(value["names"], len(mos)),
        clean=_scores(_object(value["clean"]), len(mos)),
        attacks={name: _scores(_object(scores), len(mos)) for name, scores in attacks.items()},
        zero_gradients={
            name: float(scores["zero_gradients"])
            for name, scores in attacks.items()
            if scores.get("zero_gradients") is not None
        },
        doubts=tuple(doubts({name: _shares(scores) for name, scores in attacks.items()})),
        worst=Correlations(_number(worst["srocc"]), _number(worst["plcc"])),
        worst_attack=str(worst["srocc_attack"]),
        incomplete=tuple(map(str, value.get("incomplete", ()))),
        examples=(),
        kernels=_text(value.get("kernels")),
        queries=_queries(value, attacks),
    )


def _queries(value: dict[str, Any], attacks: dict[str, Any]) -> int | None:
    methods = {scores.get("method") for scores in attacks.values()}
    found = _mapping(_mapping(value.get("settings")).get("attack")).get("attack_queries")
    return found if methods == {"square"} and isinstance(found, int) else None


def _shares(scores: dict[str, Any]) -> dict[str, float]:
    keys = ("zero_gradients", "nonfinite_gradients")
    return {key: float(scores[key]) for key in keys if scores.get(key) is not None}


def _examples(folder: Path, rows: Any) -> tuple[Example, ...]:
    def image(row: dict[str, Any], key: str) -> Path | None:
        name = row.get(key)
        # Use the file's name only, so that no file outside of the run is embedded.
        path = folder / Path(name).name if isinstance(name, str) else None
        return path if path is not None and path.is_file() else None

    return tuple(
        Example(
            name=str(row["name"]),
            mos=_number(row["mos"]),
            clean_score=_number(row["clean_score"]),
            adversarial_score=_number(row["adversarial_score"]),
            attack=str(row["attack"]),
            magnification=_number(row.get("magnification", 1)),
            clean=image(row, "clean"),
            attacked=image(row, "attacked"),
            difference=image(row, "difference"),
        )
        for row in map(_object, _list(rows))
    )


def _scores(value: dict[str, Any], count: int) -> Scores:
    values = _array(value["scores"])
    if len(values) != count:
        raise ValueError(f"{len(values)} scores for {count} labels")
    return Scores(_number(value["srocc"]), _number(value["plcc"]), values)


def _names(value: Any, count: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"expected {count} names, one per label")
    return tuple(map(str, value))


def _array(value: Any) -> np.ndarray:
    return np.array([_number(item) for item in _list(value)], dtype=np.float64)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {type(value).__name__}")
    return value


def _number(value: Any) -> float:
    """Read a number; null, which represents NaN or an infinity, becomes NaN."""
    return float("nan") if value is None else float(value)


def _number_or_none(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
