"""The declarative file of `srm-iqa ablate`: which models are trained, attacked and compared."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from srm_model.config import NECKS, SRMConfig

FULL = "full"  # the variant without overrides
# One-out ablations of table 11 by name; a function where the override depends on the config.
ABLATIONS: dict[str, Any] = {
    "uniform landmarks": {"landmarks": "uniform"},
    "k-means++ landmarks": {"landmarks": "kmeans++"},
    "pivoted Cholesky landmarks": {"landmarks": "pivoted_cholesky"},
    "no τ": {"tau": False},
    "no DyT": {"dyt": False},
    "no gate regulariser": {"weight_entropy": 0.0, "weight_balance": 0.0},
    "no gain cap": {"gain_cap": None},
    "equilibration": {"equilibrate": True},
    "half the landmarks": lambda config: {"rank": max(1, config.rank // 2)},
    "a quarter of the landmarks": lambda config: {"rank": max(1, config.rank // 4)},
    "Neumann m = 3": {"solver": "neumann", "neumann_order": 3},
    "solver cholesky": {"solver": "cholesky"},
    "solver lu": {"solver": "lu"},
    "solver svd": {"solver": "svd"},
    "solver auto": {"solver": "auto"},
}
# To be named one by one: they are no part of "all".
DEFENCES: dict[str, Any] = {
    "gradient-norm training": {"weight_gradient": 1e-3},
    "adversarial training": {"adversarial_eps": 1 / 255},
    "baseline, gradient-norm training": {"neck": "none", "weight_gradient": 1e-3},
    "baseline, adversarial training": {"neck": "none", "adversarial_eps": 1 / 255},
}


@dataclass(frozen=True)
class Model:
    """One training of the study."""

    data: str
    backbone: str
    neck: str
    variant: str
    seed: int
    config: SRMConfig

    @property
    def folder(self) -> Path:
        """Where it lies in the study's folder: necks of one kind side by side, so that each finds its surrogate."""
        place = Path("runs", self.data, self.backbone, f"seed{self.seed}")
        if self.variant != FULL:
            place = place / slug(self.variant)
        return place / self.neck

    @property
    def identity(self) -> dict[str, Any]:
        return {**vars(self), "config": self.config.to_dict()}


@dataclass(frozen=True)
class Study:
    """The checked contents of a study file."""

    title: str
    data: dict[str, str]  # name and root
    backbones: tuple[str, ...]
    necks: tuple[str, ...]
    seeds: tuple[int, ...]
    config: SRMConfig
    pretrained: bool = False
    freeze_backbone: bool = False
    budgets: tuple[tuple[str, float], ...] = ()  # norm and ε
    images: int | None = None  # attacked per model; None: all
    suite: str = "paper"
    ablations: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # overrides by variant, on the first of each
    transfer: tuple[tuple[str, str], ...] = ()  # pairs of backbones, beside the necks of one
    sweep: bool = False
    efficiency: bool = False

    def models(self) -> Iterator[Model]:
        """Every training: the grid, then the ablations on the first data set and backbone."""
        for data in self.data:
            for backbone in self.backbones:
                for seed in self.seeds:
                    for neck in self.necks:
                        yield Model(data, backbone, neck, FULL, seed, self.config.replace(seed=seed))
        for seed in self.seeds:
            for variant, overrides in self.ablations.items():
                changes = {key: value for key, value in overrides.items() if key != "neck"}
                yield Model(
                    next(iter(self.data)),
                    self.backbones[0],
                    overrides.get("neck", "srm"),
                    variant,
                    seed,
                    self.config.replace(seed=seed, **changes),
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "config": self.config.to_dict()}


_KEYS = {
    "title": str,
    "data": dict,
    "backbones": list,
    "necks": list,
    "seeds": list,
    "config": dict,
    "pretrained": bool,
    "freeze_backbone": bool,
    "attacks": dict,
    "ablations": dict,
    "transfer": list,
    "sweep": bool,
    "efficiency": bool,
}
_ATTACK_KEYS = {"linf", "l2", "images", "suite"}


def read_study(path: str | Path) -> Study:
    """A study from a TOML or JSON file; whatever does not fit is a ValueError or TypeError of one sentence."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(
            f"{path}: not readable as {'JSON' if path.suffix == '.json' else 'TOML'} ({error})"
        ) from None
    try:
        return _study(values, path.parent)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None


def slug(name: str) -> str:
    """A folder name for a variant."""
    plain = name.lower().replace("τ", "tau").replace("++", "pp")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _study(values: Any, here: Path) -> Study:
    if not isinstance(values, dict):
        raise ValueError("expected an object of keys")
    _known(values, set(_KEYS), "key")
    for key, value in values.items():
        if not isinstance(value, _KEYS[key]):
            raise TypeError(f"{key} is {value!r}: expected {_KEYS[key].__name__}")
    for key in ("data", "backbones"):
        if not values.get(key):
            raise ValueError(f"{key} is missing or empty: a study needs it")
    config = SRMConfig().replace(**values.get("config", {}))
    necks = tuple(values.get("necks", ("none", "srm")))
    if not necks or not set(necks) <= set(NECKS):
        raise ValueError(f"necks is {list(necks)}: expected some of {', '.join(NECKS)}")
    seeds = tuple(values.get("seeds", (0, 1, 2)))
    if not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds is {list(seeds)}: expected whole numbers of zero or more")
    attacks = values.get("attacks", {})
    _known(attacks, _ATTACK_KEYS, "key of attacks")
    if attacks.get("suite", "paper") not in ("paper", "extended"):
        raise ValueError(f"suite is {attacks['suite']!r}: expected 'paper' or 'extended'")
    backbones = tuple(values["backbones"])
    pairs = tuple(tuple(pair) for pair in values.get("transfer", ()))
    for pair in pairs:
        if len(pair) != 2 or not set(pair) <= set(backbones):
            raise ValueError(f"transfer has {list(pair)}: expected two of the study's backbones")
    return Study(
        title=values.get("title", "Study"),
        data={name: str(here / Path(root).expanduser()) for name, root in values["data"].items()},
        backbones=backbones,
        necks=necks,
        seeds=seeds,
        config=config,
        pretrained=values.get("pretrained", False),
        freeze_backbone=values.get("freeze_backbone", False),
        budgets=tuple(
            (norm, _budget(eps))
            for norm, default in (("linf", config.eps_linf_tables), ("l2", config.eps_l2_tables))
            for eps in attacks.get(norm, default if not attacks.keys() & {"linf", "l2"} else ())
        ),
        images=attacks.get("images"),
        suite=attacks.get("suite", "paper"),
        ablations=_ablations(values.get("ablations", {}), config),
        transfer=pairs,
        sweep=values.get("sweep", False),
        efficiency=values.get("efficiency", False),
    )


def _ablations(values: Mapping[str, Any], config: SRMConfig) -> dict[str, dict[str, Any]]:
    """`rows`, a list of names or "all", and `overrides`, a table of one's own rows."""
    _known(values, {"rows", "overrides"}, "key of ablations")
    rows = values.get("rows", [])
    named = {**ABLATIONS, **DEFENCES}
    found = {}
    for name in ABLATIONS if rows == "all" else rows:
        if name not in named:
            raise ValueError(f"ablation {name!r}: expected 'all' or some of {', '.join(map(repr, named))}")
        overrides = named[name]
        found[name] = overrides(config) if callable(overrides) else overrides
    found |= values.get("overrides", {})
    for name, overrides in found.items():
        if name == FULL or not isinstance(overrides, dict) or not slug(name):
            raise ValueError(
                f"ablation {name!r}: expected a name other than {FULL!r} and a table of config fields"
            )
        if overrides.get("neck", "srm") not in NECKS:
            raise ValueError(
                f"ablation {name!r}: neck {overrides['neck']!r} is not one of {', '.join(NECKS)}"
            )
        config.replace(**{key: value for key, value in overrides.items() if key != "neck"})
    return found


def _known(values: Mapping[str, Any], keys: set[str], what: str) -> None:
    unknown = sorted(set(values) - keys)
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; known are {', '.join(sorted(keys))}")


def _budget(value: Any) -> float:
    try:
        return float(Fraction(str(value)))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"budget {value!r}: expected a number or a fraction such as 4/255") from None
