"""Read the study file of `srm-iqa ablate`, which declares the models to train, attack and compare."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Any

from srm_kernels.conditioning import SOLVERS
from srm_kernels.landmarks import LANDMARK_METHODS
from srm_model.attack_suites import SUITES
from srm_model.attacks.problem import check_budget, parse_budget
from srm_model.config import SRMConfig
from srm_model.necks import NECKS
from srm_model.norms import NORMS

FULL = "full"  # the variant without overrides
# The ablations of table 11: from name to overrides of the config, or to a function from config to overrides.
ABLATIONS: dict[str, Any] = {
    **{
        f"{method.title} landmarks": {"landmarks": name}
        for name, method in LANDMARK_METHODS.items()
        if method.evaluated is None
    },
    "no τ": {"tau": False},
    "no DyT": {"dyt": False},
    "no gate regulariser": {"weight_entropy": 0.0, "weight_balance": 0.0},
    "no gain cap": {"gain_cap": None},
    "equilibration": {"equilibrate": True},
    "half the landmarks": lambda config: {"rank": max(1, config.rank // 2)},
    "a quarter of the landmarks": lambda config: {"rank": max(1, config.rank // 4)},
    "keys not normalised": {"qk_norm": None},
    "Neumann m = 3": {"solver": "neumann", "neumann_order": 3},
    **{f"solver {name}": {"solver": name} for name in SOLVERS if name != "neumann"},
}
# Variants that are not part of "all" and must be named.
DEFENCES: dict[str, Any] = {
    "gradient-norm training": {"weight_gradient": 1e-3},
    "adversarial training": {"adversarial_eps": 1 / 255},
    "baseline, gradient-norm training": {"neck": "none", "weight_gradient": 1e-3},
    "baseline, adversarial training": {"neck": "none", "adversarial_eps": 1 / 255},
}


@dataclass(frozen=True)
class Model:
    """A model that the study trains."""

    data: str
    backbone: str
    neck: str
    variant: str
    seed: int
    config: SRMConfig

    @property
    def folder(self) -> Path:
        """The folder, relative to the study's folder."""
        variant = () if self.variant == FULL else (slug(self.variant),)
        return Path("runs", self.data, self.backbone, f"seed{self.seed}", *variant, self.neck)

    @property
    def surrogate(self) -> Model:
        """The surrogate: the model on which the transfer attacks against this model are crafted.

        The surrogate has another neck, and is a model without overrides even if this model has overrides.
        """
        other = NECKS[self.neck].surrogate
        return Model(self.data, self.backbone, other, FULL, self.seed, self.config)

    @property
    def label(self) -> str:
        """A description for readers."""
        variant = "" if self.variant == FULL else f", {self.variant}"
        return f"{self.neck} on {self.backbone}, {self.data}{variant}, seed {self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        return {**vars(self), "config": self.config.to_dict()}


@dataclass(frozen=True)
class Stronger:
    """Further attacks on trained models, with settings that differ from those of the study."""

    models: tuple[str, ...]  # names of necks (without overrides) or of variants
    seeds: tuple[int, ...]
    budgets: tuple[tuple[str, float], ...]
    suite: str
    config: dict[str, Any]  # settings of the attack

    @property
    def name(self) -> str:
        """A folder name that is made from the settings."""
        return slug(" ".join([self.suite, *(f"{key} {value}" for key, value in self.config.items())]))


@dataclass(frozen=True)
class Study:
    """The checked contents of a study file."""

    title: str
    data: dict[str, str]  # folders of datasets by name
    backbones: tuple[str, ...]
    necks: tuple[str, ...]
    seeds: tuple[int, ...]
    config: SRMConfig
    pretrained: bool = False
    freeze_backbone: bool = False
    budgets: tuple[tuple[str, float], ...] = ()  # norm and ε
    images: int | None = None  # number of attacked images per model; None: all
    suite: str = "paper"
    ablations: dict[str, dict[str, Any]] = field(default_factory=dict)  # overrides by variant
    ablation_seeds: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by variant
    ablation_budgets: dict[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)  # by variant
    swaps: dict[str, dict[str, Any]] = field(default_factory=dict)  # changes of trained models by name
    audit: int = 0  # number of images of each audit; 0: no audits
    audit_seeds: tuple[int, ...] = ()
    audit_swaps: tuple[str, ...] = ()  # names of `swaps` that are audited too
    audit_ablations: tuple[str, ...] = ()  # variants that are audited too
    stronger: tuple[Stronger, ...] = ()
    transfer: tuple[tuple[str, str], ...] = ()  # pairs of backbones, in addition to pairs of necks
    sweep: bool = False

    def models(self) -> Iterator[Model]:
        """Yield every model to train.

        The models of all combinations of dataset, backbone, seed and neck come first. The models of the ablations
        follow. Ablations use only the first dataset and the first backbone.
        """
        for data, backbone, seed, neck in product(self.data, self.backbones, self.seeds, self.necks):
            yield Model(data, backbone, neck, FULL, seed, self.config.replace(seed=seed))
        for variant, overrides in self.ablations.items():
            for seed in self.ablation_seeds[variant]:
                config = self.config.replace(seed=seed, **_without(overrides, "neck"))
                neck = overrides.get("neck", "srm")
                yield Model(next(iter(self.data)), self.backbones[0], neck, variant, seed, config)

    def budgets_of(self, model: Model) -> tuple[tuple[str, float], ...]:
        """Return the budgets of a model.

        The baseline of the ablations is the model with the first dataset, the first backbone, the neck `srm` and no
        overrides. To be comparable with the ablations, the baseline also has the budgets of all ablations.
        """
        if model.variant != FULL:
            return self.ablation_budgets[model.variant]
        if (model.data, model.backbone, model.neck) != (next(iter(self.data)), self.backbones[0], "srm"):
            return self.budgets
        return tuple(dict.fromkeys(chain(self.budgets, *self.ablation_budgets.values())))

    def audited(self, model: Model) -> bool:
        """Return whether a model is audited."""
        chosen = model.variant == FULL or model.variant in self.audit_ablations
        return self.audit > 0 and model.seed in self.audit_seeds and chosen

    def to_dict(self) -> dict[str, Any]:
        """Return the study in plain JSON values."""
        stronger = [vars(group) for group in self.stronger]
        return {**vars(self), "config": self.config.to_dict(), "stronger": stronger}


_KEYS: dict[str, Any] = {
    "title": str,
    "data": dict,
    "backbones": list,
    "necks": list,
    "seeds": list,
    "config": dict,
    "pretrained": bool,
    "freeze_backbone": bool,
    "attacks": dict,
    "ablations": (dict, list),
    "swaps": dict,
    "audit": int,
    "audit_seeds": list,
    "audit_swaps": list,
    "stronger": list,
    "transfer": list,
    "sweep": bool,
    "protocols": dict,
}
_ATTACK_KEYS = {*NORMS, "images", "suite"}


def read_study(path: str | Path, roots: Mapping[str, str] | None = None) -> Study:
    """Read a study from a TOML or JSON file.

    Args:
        path: The file.
        roots: A mapping from names of datasets to folders, which replaces `data` of the file. If a protocol in the file
            lists the datasets of `roots` under `for`, the protocol's other keys override the keys of the file
            (docs/RECIPES.md).

    Raises:
        ValueError, TypeError: The file cannot be read, or a key or value is not accepted.
    """
    path = Path(path)
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a {kind} file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: not readable as {kind} ({error})") from None
    try:
        return _study(values, path.parent, roots or {})
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None


def slug(name: str) -> str:
    """Make a folder name from a variant's name."""
    plain = name.lower().replace("τ", "tau").replace("++", "pp")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _checked(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object at the top level")
    _known(values, set(_KEYS), "key")
    for key, value in values.items():
        if not isinstance(value, _KEYS[key]) or (_KEYS[key] is int and isinstance(value, bool)):
            kinds = _KEYS[key] if isinstance(_KEYS[key], tuple) else (_KEYS[key],)
            raise TypeError(f"{key} is {value!r}: expected {' or '.join(kind.__name__ for kind in kinds)}")
    for name, protocol in values.get("protocols", {}).items():
        if not isinstance(protocol, dict) or not isinstance(protocol.get("for"), list):
            raise ValueError(
                f"protocol {name!r}: expected a table with the key `for`, a list of names of datasets"
            )
        _checked(_without(protocol, "for"))
    return values


def _under_protocol(values: dict[str, Any], roots: Mapping[str, str]) -> dict[str, Any]:
    """Return the contents of the file, with `roots` as the value of the key `data`.

    `roots` maps names of datasets to folders. If a protocol in the file lists the datasets of `roots` under `for`,
    the protocol's other keys override the keys of the file.
    """
    chosen = set()
    for root in roots:
        named = [name for name, protocol in values.get("protocols", {}).items() if root in protocol["for"]]
        chosen.add(named[0] if named else None)
    if len(chosen) > 1:
        raise ValueError(
            f"the datasets {', '.join(roots)} are under different protocols: run them one after another, each with "
            "its own --out"
        )
    changes = _without(values["protocols"][name], "for") if (name := next(iter(chosen))) else {}
    return {**values, **changes, "data": dict(roots)}


def _study(values: Any, here: Path, roots: Mapping[str, str]) -> Study:
    values = _checked(values)
    if roots:
        values = _under_protocol(values, roots)
        here = Path()
    for key in ("data", "backbones"):
        if not values.get(key):
            raise ValueError(f"{key} is missing or empty: a study needs it")
    config = SRMConfig().replace(**values.get("config", {}))
    _texts(values, "backbones", "necks")
    necks = tuple(values.get("necks", ("none", "srm")))
    if not necks or not set(necks) <= set(NECKS):
        raise ValueError(f"necks is {list(necks)}: expected some of {', '.join(NECKS)}")
    seeds = _seeds(values.get("seeds", (0, 1, 2)))
    attacks = values.get("attacks", {})
    _known(attacks, _ATTACK_KEYS, "key of attacks")
    suite = _suite(attacks, "paper")
    images = attacks.get("images")
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 2):
        raise ValueError(f"images is {images!r}: expected a whole number of 2 or more")
    if values.get("audit", 0) < 0 or values.get("audit") == 1:
        raise ValueError(f"audit is {values['audit']}: expected a whole number of 2 or more, or 0 for none")
    _texts(values, "audit_swaps")
    unknown = [name for name in values.get("audit_swaps", ()) if name not in values.get("swaps", {})]
    if unknown:
        raise ValueError(f"audit_swaps has {', '.join(unknown)}: expected names of swaps")
    audit_seeds = _seeds(values.get("audit_seeds", seeds[:1]), "audit_seeds")
    if not set(audit_seeds) <= set(seeds):
        raise ValueError(f"audit_seeds is {list(audit_seeds)}: expected some of the seeds, {list(seeds)}")
    for name, root in values["data"].items():
        if not isinstance(root, str) or not slug(name):
            raise ValueError(f"data has {name} = {root!r}: expected a name and a folder")
    backbones = tuple(values["backbones"])
    budgets = _budgets(attacks, config)
    ablations = _ablation_fields(values.get("ablations", []), config, seeds, budgets)
    return Study(
        title=values.get("title", "Study"),
        data={name: str(here / Path(root).expanduser()) for name, root in values["data"].items()},
        backbones=backbones,
        necks=necks,
        seeds=seeds,
        config=config,
        pretrained=values.get("pretrained", False),
        freeze_backbone=values.get("freeze_backbone", False),
        budgets=budgets,
        images=images,
        suite=suite,
        **ablations,
        swaps=_swaps(values.get("swaps", {}), config),
        audit=values.get("audit", 0),
        audit_seeds=audit_seeds,
        audit_swaps=tuple(values.get("audit_swaps", ())),
        stronger=tuple(
            _stronger(group, config, suite, dict.fromkeys(necks, seeds) | ablations["ablation_seeds"])
            for group in values.get("stronger", ())
        ),
        transfer=_pairs(values.get("transfer", ()), backbones),
        sweep=values.get("sweep", False),
    )


def _pairs(values: Any, backbones: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    pairs = tuple(tuple(pair) for pair in values)
    for pair in pairs:
        if len(pair) != 2 or not set(pair) <= set(backbones):
            raise ValueError(f"transfer has {list(pair)}: expected two of the study's backbones")
    return pairs


def _ablation_fields(
    groups: Any, config: SRMConfig, seeds: tuple[int, ...], budgets: tuple[tuple[str, float], ...]
) -> dict[str, Any]:
    """Read one group or several groups of ablations; return the fields of `Study` that describe them."""
    ablations: dict[str, dict[str, Any]] = {}
    ablation_seeds: dict[str, tuple[int, ...]] = {}
    ablation_budgets: dict[str, tuple[tuple[str, float], ...]] = {}
    audited: list[str] = []
    for group in groups if isinstance(groups, list) else [groups]:
        found = _ablations(group, config)
        ablations |= found
        ablation_seeds |= dict.fromkeys(found, _seeds(group.get("seeds", seeds)))
        own = _budgets(group, config) if group.keys() & NORMS.keys() else budgets
        ablation_budgets |= dict.fromkeys(found, own)
        audited += found if group.get("audit", False) else ()
    folders: dict[str, str] = {}
    for name in ablations:
        other = folders.setdefault(slug(name), name)
        if other != name:
            raise ValueError(
                f"ablations {other!r} and {name!r} have the same folder {slug(name)}; rename one"
            )
    return {
        "ablations": ablations,
        "ablation_seeds": ablation_seeds,
        "ablation_budgets": ablation_budgets,
        "audit_ablations": tuple(audited),
    }


def _ablations(values: Mapping[str, Any], config: SRMConfig) -> dict[str, dict[str, Any]]:
    """Read ablations.

    `rows` is a list of names from `ABLATIONS` and `DEFENCES`, or "all" for the names in `ABLATIONS`. If an ablation
    only sets the landmark method, and the study already uses this method, "all" omits the ablation. `overrides` is a
    table of further ablations.
    """
    if not isinstance(values, dict):
        raise TypeError(f"ablations has {values!r}: expected a table")
    _known(values, {"rows", "overrides", "seeds", *NORMS, "audit"}, "key of ablations")
    if not isinstance(values.get("audit", False), bool):
        raise TypeError(f"audit of ablations is {values['audit']!r}: expected true or false")
    rows = values.get("rows", [])
    named = {**ABLATIONS, **DEFENCES}
    found = {}
    every = [name for name, changes in ABLATIONS.items() if changes != {"landmarks": config.landmarks}]
    for name in every if rows == "all" else rows:
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
        config.replace(**_without(overrides, "neck"))
    return found


def _stronger(values: Any, config: SRMConfig, suite: str, trained: Mapping[str, tuple[int, ...]]) -> Stronger:
    """Read one group of stronger attacks.

    `trained` maps the name of each neck and each ablation to its seeds. Each name in the group's list `models` must be
    a key of `trained`.
    """
    if not isinstance(values, dict):
        raise TypeError(f"stronger has {values!r}: expected a table")
    _known(values, {"models", "seeds", *NORMS, "suite", "config"}, "key of stronger")
    _texts(values, "models")
    models = tuple(values.get("models", ()))
    if not models or not set(models) <= trained.keys():
        raise ValueError(f"models of stronger is {list(models)}: expected some of {', '.join(trained)}")
    common = sorted(set.intersection(*(set(trained[name]) for name in models)))
    seeds = _seeds(values.get("seeds", common), "seeds of stronger")
    if not set(seeds) <= set(common):
        raise ValueError(
            f"seeds of stronger is {list(seeds)}: expected some of the seeds that all its models have, {common}"
        )
    if not values.keys() & NORMS.keys():
        raise ValueError(f"stronger has no budget: expected {' or '.join(NORMS)}")
    changes = values.get("config", {})
    if not isinstance(changes, dict):
        raise TypeError(f"config of stronger is {changes!r}: expected a table")
    _known(changes, set(config.attack_settings()), "attack setting")
    config.replace(**changes)
    own = _suite(values, suite)
    if not changes and own == suite:
        raise ValueError(
            "stronger changes nothing: expected another suite, or settings of the attack in config"
        )
    return Stronger(models, seeds, _budgets(values, config), own, changes)


def _suite(values: Mapping[str, Any], default: str) -> str:
    if (found := values.get("suite", default)) not in SUITES:
        raise ValueError(f"suite is {found!r}: expected {' or '.join(map(repr, SUITES))}")
    return str(found)


def _swaps(values: Mapping[str, Any], config: SRMConfig) -> dict[str, dict[str, Any]]:
    """Check and return the swaps, which are changes to trained `srm` models.

    Each swap is a table of config fields. It can also have the keys `neck`, the name of another neck, and `beta`, a
    number that replaces β of every link.
    """
    for name, overrides in values.items():
        if not isinstance(overrides, dict):
            raise ValueError(f"swap {name!r}: expected a table of config fields, neck or beta")
        mixing = [neck for neck, kind in NECKS.items() if kind.attention is not None]
        if overrides.get("neck", "srm") not in mixing:
            raise ValueError(f"swap {name!r}: neck {overrides['neck']!r} is not one of {', '.join(mixing)}")
        if not isinstance(overrides.get("beta", 0.0), int | float):
            raise ValueError(f"swap {name!r}: beta {overrides['beta']!r}: expected a number")
        config.replace(**_without(overrides, "neck", "beta"))
    return dict(values)


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _seeds(values: Any, key: str = "seeds") -> tuple[int, ...]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"{key} is {values!r}: expected list")
    seeds = tuple(values)
    valid = all(type(seed) is int and seed >= 0 for seed in seeds)
    if not seeds or not valid or len(set(seeds)) < len(seeds):
        raise ValueError(f"{key} is {list(seeds)}: expected distinct integers of zero or more")
    return seeds


def _budgets(values: Mapping[str, Any], config: SRMConfig) -> tuple[tuple[str, float], ...]:
    """Read the budgets of an attack as pairs (norm, ε).

    Each key of `values` that is the name of a norm has a list of budgets ε. If no key is the name of a norm, the
    default is used: `NORMS[norm].tables_of(config)` for every norm.
    """
    for norm in NORMS:
        if not isinstance(values.get(norm, []), list):
            raise TypeError(f"{norm} is {values[norm]!r}: expected list")
    return tuple(
        (norm, _budget(norm, eps))
        for norm, found in NORMS.items()
        for eps in values.get(norm, () if values.keys() & NORMS.keys() else found.tables_of(config))
    )


def _known(values: Mapping[str, Any], keys: set[str], what: str) -> None:
    unknown = sorted(set(values) - keys)
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; expected some of {', '.join(sorted(keys))}")


def _budget(norm: str, value: Any) -> float:
    try:
        eps = parse_budget(str(value))
    except ValueError:
        raise ValueError(f"budget {value!r}: expected a number or a fraction such as 4/255") from None
    check_budget(norm, eps)
    return eps


def _texts(values: Mapping[str, Any], *keys: str) -> None:
    """Raise ValueError unless the list `values[key]` of each given key contains only strings, and no string twice."""
    for key in keys:
        found = values.get(key, [])
        if not all(isinstance(text, str) for text in found) or len(set(found)) < len(found):
            raise ValueError(f"{key} is {found}: expected distinct strings")
