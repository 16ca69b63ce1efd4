"""Constants of models, training and attacks in one frozen object, which checkpoints and reports store."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srm_model.norms import NORMS

QK_NORMS = (None, "keys", "both")
STAGES = (1, 2, 3, 4)
STORED = "stored"  # a value for `backend`: use the backend that the checkpoint was trained with


@dataclass(frozen=True)
class SRMConfig:
    """Constants of the neck, the training protocol and the attacks.

    The comment at a field gives the symbol of `docs/METHOD.md` and the unit. `(c)` marks a value that this project
    chose, because the article's value is not known. `SRMConfig.paper()` returns the article's own settings.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range or not among the accepted names.
    """

    # Neck (docs/METHOD.md §1)
    channels: int = 256  # C (c), channels of every aligned map
    heads: int = 8  # H (c); d = C / H
    links: tuple[tuple[int, int], ...] = ((4, 3), (4, 2), (4, 1))  # (source, target); stage 1 is shallowest
    beta_init: float = 1.0  # β_t (c) at the start
    qk_norm: str | None = "keys"  # (c) what is normalised, per head and token: None, "keys" or "both"
    kv_pool_prob: float = 0.0  # p, probability that a source map is 2×2 mean-pooled; in training only
    kv_pool_eval: bool = False  # also pool at evaluation; the model is then stochastic, and attacks need EOT

    # Nyström attention (§2)
    rank: int = 64  # r (c), number of landmarks; clamped to the number of keys
    landmarks: str = "uniform"  # a key of srm_kernels.landmarks.LANDMARK_METHODS; the article's is "leverage"
    gamma: float = 1e-3  # γ, ridge of the leverage scores

    # Landmark system (§2.1)
    solver: str = "cholesky"  # one of srm_kernels.conditioning.SOLVERS; the article's is "auto"
    ridge: float = 1e-3  # λ₀, relative to tr(W)/r
    equilibrate: bool = False  # diagonal scaling before the ridge (ablation)
    kappa_max: float = 1e6  # κ_max (c); "auto" uses LU for a smaller κ
    neumann_order: int = 3  # m
    neumann_gate: bool = True  # use the series only if an estimate shows that it converges
    solve_dtype: str = "fp32"  # "model" forms the blocks in the model's dtype (ablation)

    # Scale (§3)
    dyt: bool = True  # DyT on the tokens of both sides of every link
    dyt_alpha: float = 0.5  # α at the start
    tau: bool = True  # rescaler τ per link and head (ablation: False)
    tau_range: float = 16.0  # (c) τ stays in [1/16, 16]
    ema: float = 0.99  # (c) decay of σ̄ and M₀
    calibration_range: float = 16.0  # (c) each calibration factor stays in [1/16, 16]

    # Gate (§4)
    fused_stages: tuple[int, ...] = (1, 2, 3)
    pool_size: int = 8  # P (c)
    gate_temperature: float = 1.0  # T
    gate_dyt: bool = False  # DyT before each gate convolution
    gain_cap: float | None = 1.2  # (c) the cap is c = gain_cap · M₀ · √(C·P·P); None switches it off
    entropy_floor: float = 0.7  # (c) H_min as a share of ln S

    # Loss weights (§4)
    weight_tau: float = 0.01  # (c)
    weight_entropy: float = 0.1  # (c)
    weight_balance: float = 0.1  # (c)

    # Training (§5)
    image_size: int = 512  # side in pixels
    crop_size: int | None = None  # side in pixels of the crops in training; None is image_size
    batch_size: int = 8  # (c) images per optimiser step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches per batch; more of them need less memory and give the same result
    epochs: int = 120
    warmup_epochs: int = 5
    lr_backbone: float = 2e-5  # (c)
    lr_neck: float = 2e-4  # (c) neck and head
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05  # (c) none on norms, biases and scalars
    clip_norm: float = 1.0
    weights_ema: float = 0.0  # decay of an average of the weights, which is evaluated and saved; 0 is off
    precision: str = "auto"  # "auto", "fp32", "bf16", "fp16"
    deterministic: bool = True
    seed: int = 0

    # Other published defences, for any neck; all are off by default
    weight_gradient: float = 0.0  # w, weight of the gradient-norm penalty; the published value is 1e-3
    gradient_step: float = 0.01  # h, step of the penalty's finite difference
    gradient_norm: str = "l1"  # norm of ∇f; the step is along sign(∇f) for "l1", along ∇f for "l2"
    adversarial_eps: float = 0.0  # ε of PGD adversarial training; 0 is off; for "l2" as in eps_l2
    adversarial_norm: str = "linf"  # one of NORMS
    adversarial_steps: int = 3  # (c) steps of 2.5 ε/steps ("linf") or 4 ε/steps ("l2")
    adversarial_warmup: int = 0  # epochs in which ε rises linearly to `adversarial_eps`
    weight_consistency: float = 0.0  # w, weight of (f(x') − f(x))²; above 0, other losses use clean images

    # Attacks (§6)
    attack_steps: int = 40
    attack_restarts: int = 5
    attack_sweep_steps: tuple[int, ...] = (1, 2, 5, 10, 20, 40, 80)  # steps of the sweep in figure 5
    attack_restart_batch: int = 1  # restarts that run at once; more of them need more memory
    attack_batch_size: int = 8
    attack_step_linf: float = 2.5  # the step size is this factor · ε / steps
    attack_step_l2: float = 4.0  # (c)
    attack_queries: int = 1000  # (c) queries per image of the black-box square attack
    attack_square_area: float = 0.3  # (c) area of the first squares, as a share of the image
    eot_samples: int = 20  # passes per gradient of a stochastic model
    pair_margin: float = 0.05  # (c) pair inversion uses pairs with a larger difference of normalised MOS
    pair_temperature: float = 0.1  # T of pair inversion (c)
    eps_linf: tuple[float, ...] = (0.25 / 255, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255)  # (c)
    eps_l2: tuple[float, ...] = (0.6, 1.25, 2.5, 5.0, 10.0, 20.0)  # (c) for 512×512, scaled by √(HW)/512
    eps_linf_tables: tuple[float, ...] = (1 / 255, 4 / 255)  # (c)
    eps_l2_tables: tuple[float, ...] = (2.5, 10.0)  # (c)

    # Median smoothing (not part of the article): bounds that `srm-iqa audit --certify` computes
    smoothing_sigma: float = 0.25  # (c) σ of the Gaussian noise, per pixel value
    smoothing_samples: int = 1000  # (c) noisy copies of each image
    smoothing_confidence: float = 0.999  # (c) confidence of each image's interval
    eps_smoothing: tuple[float, ...] = (0.15, 0.3, 0.6)  # (c) L2 budgets at 512², scaled by √(HW)/512

    backend: str | None = None  # None selects the fastest on this device; a named backend is always used

    @classmethod
    def paper(cls, **changes: Any) -> SRMConfig:
        """Return the article's own settings: leverage landmarks, the solver "auto", and keys without normalisation.

        With leverage landmarks, the score is discontinuous (docs/METHOD.md §2.0). Without normalised keys, the
        condition number of the landmark system and the output of the attention have no useful upper bound
        (docs/METHOD.md §2.1).

        Args:
            changes: Values of other fields, by field name. They override the settings above.
        """
        return cls(**{"landmarks": "leverage", "solver": "auto", "qk_norm": None, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SRMConfig:
        """Create a config from the result of `to_dict`. Lists become tuples.

        Args:
            values: Fields by name. A missing field gets its default.

        Raises:
            ValueError: A key is unknown, or a value is not accepted.
            TypeError: A value has the wrong type.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"unknown config key {', '.join(unknown)}; known keys are {', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dictionary that can be stored as JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def attack_settings(self) -> dict[str, Any]:
        """Return the fields that influence attacks on a trained model, except the budgets and `attack_sweep_steps`."""
        return {
            key: value
            for key, value in self.to_dict().items()
            if key.startswith(("attack_", "eot_", "pair_")) and key != "attack_sweep_steps"
        }

    def replace(self, **changes: Any) -> SRMConfig:
        """Return a checked copy with changed fields.

        Args:
            changes: New values by field name.

        Raises:
            ValueError: A name is unknown, or a value is not accepted.
            TypeError: A value has the wrong type.
        """
        return self.from_dict({**self.to_dict(), **changes})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        _check_types(self)
        if self.backend is not None:
            from srm_kernels.checks import current_name

            object.__setattr__(self, "backend", current_name(self.backend))
        _check_values(self)

    @property
    def head_dim(self) -> int:
        """Dimension of a head, d = C / H."""
        return self.channels // self.heads


def _plain(value: Any) -> Any:
    """Convert lists to tuples; convert NumPy scalars and other numbers to Python's int and float."""
    numpy = sys.modules.get("numpy")  # not imported here, so that `srm-iqa --help` stays fast
    if numpy is not None and isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


_OPTIONAL = {"qk_norm": str, "gain_cap": float, "backend": str, "crop_size": int}
_INT_TUPLES = {"fused_stages", "attack_sweep_steps"}


def _check_types(config: SRMConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and field.name in _OPTIONAL:
            continue
        expected: type = _OPTIONAL.get(field.name) or type(field.default)
        accepted = (float, int) if expected is float else (expected,)
        typed = isinstance(value, accepted) and (expected is bool or not isinstance(value, bool))
        if not typed:
            raise TypeError(f"config {field.name}={value!r}: expected {expected.__name__}")
        if expected is tuple:
            _check_items(field.name, value)
        if expected is float and not math.isfinite(value):
            raise ValueError(f"config {field.name}={value!r}: expected a finite number")


def _check_items(name: str, items: tuple[Any, ...]) -> None:
    def number(item: Any, integral: bool) -> bool:
        kinds = int if integral else (int, float)
        return isinstance(item, kinds) and not isinstance(item, bool)

    if name == "links":
        good = all(isinstance(p, tuple) and len(p) == 2 and all(number(i, True) for i in p) for p in items)
        shape = "pairs of integers"
    else:
        good = all(number(item, name in _INT_TUPLES) for item in items)
        shape = "integers" if name in _INT_TUPLES else "numbers"
    if not good:
        raise TypeError(f"config {name}={items!r}: expected {shape}")


# Fields whose accepted values are registered in srm_kernels, with their defaults.
REGISTERED = {"landmarks": "uniform", "solver": "cholesky", "backend": None}


def registered(name: str) -> tuple[str | None, ...]:
    """Return the accepted values of a field of `REGISTERED`. This function imports torch."""
    from srm_kernels.conditioning import SOLVERS
    from srm_kernels.dispatch import BACKENDS
    from srm_kernels.landmarks import LANDMARK_METHODS

    return {"landmarks": (*LANDMARK_METHODS,), "solver": (*SOLVERS,), "backend": (None, *BACKENDS)}[name]


def _check_values(config: SRMConfig) -> None:
    def require(condition: bool, name: str, accepted: str) -> None:
        if not condition:
            raise ValueError(f"config {name}={getattr(config, name)!r}: expected {accepted}")

    def one_of(name: str, choices: tuple[str | None, ...]) -> None:
        require(getattr(config, name) in choices, name, "one of " + ", ".join(map(repr, choices)))

    for name, default in REGISTERED.items():
        if getattr(config, name) != default:  # the default needs no check, which would import torch
            one_of(name, registered(name))
    one_of("qk_norm", QK_NORMS)
    one_of("solve_dtype", ("fp32", "model"))
    one_of("gradient_norm", ("l1", "l2"))
    one_of("adversarial_norm", tuple(NORMS))
    one_of("precision", ("auto", "fp32", "bf16", "fp16"))
    for name in (
        "channels heads rank neumann_order pool_size image_size batch_size accumulate epochs attack_steps "
        "attack_restarts attack_restart_batch attack_batch_size attack_queries eot_samples smoothing_samples "
        "adversarial_steps tau_range calibration_range"
    ).split():
        require(getattr(config, name) >= 1, name, "at least 1")
    for name in (
        "warmup_epochs weight_tau weight_entropy weight_balance weight_gradient weight_consistency weight_decay "
        "pair_margin ridge adversarial_warmup seed"
    ).split():
        require(getattr(config, name) >= 0, name, "zero or more")
    for name in (
        "gamma kappa_max gate_temperature lr_backbone lr_neck clip_norm pair_temperature attack_step_linf "
        "attack_step_l2 smoothing_sigma"
    ).split():
        require(getattr(config, name) > 0, name, "a positive number")
    require(config.channels % config.heads == 0, "channels", f"a multiple of heads={config.heads}")
    require(config.ridge > 0 or config.solver != "cholesky", "ridge", "above 0 with solver='cholesky'")
    require(0 <= config.kv_pool_prob <= 1, "kv_pool_prob", "a probability")
    require(0 < config.gradient_step <= 0.01, "gradient_step", "above 0 and at most 0.01")
    reach = NORMS[config.adversarial_norm].largest
    accepted = f"zero or more, at most {reach:g} for norm {config.adversarial_norm!r}"
    require(0 <= config.adversarial_eps <= reach, "adversarial_eps", accepted)
    require(
        config.weight_consistency == 0 or config.adversarial_eps > 0,
        "weight_consistency",
        "0 with adversarial_eps=0, because without a budget no image is attacked",
    )
    crop = config.crop_size
    require(
        crop is None or 1 <= crop <= config.image_size,
        "crop_size",
        f"1 to image_size={config.image_size}, or None",
    )
    require(0 < config.smoothing_confidence < 1, "smoothing_confidence", "a probability below 1")
    require(0 < config.attack_square_area <= 1, "attack_square_area", "a share of the image in (0, 1]")
    for name in ("ema", "weights_ema"):
        require(0 <= getattr(config, name) < 1, name, "a decay in [0, 1)")
    require(0 <= config.entropy_floor <= 1, "entropy_floor", "a share of ln S in [0, 1]")
    require(config.gain_cap is None or config.gain_cap > 0, "gain_cap", "a positive number or None")
    require(
        len(config.betas) == 2 and all(0 <= b < 1 for b in config.betas), "betas", "two numbers in [0, 1)"
    )
    for name in "eps_linf eps_l2 eps_linf_tables eps_l2_tables eps_smoothing".split():
        require(all(eps >= 0 for eps in getattr(config, name)), name, "budgets of zero or more")
    require(
        all(steps >= 1 for steps in config.attack_sweep_steps), "attack_sweep_steps", "steps of at least 1"
    )
    stages = config.fused_stages
    require(
        len(stages) > 0 and len(set(stages)) == len(stages) and set(stages) <= set(STAGES),
        "fused_stages",
        f"distinct stages out of {STAGES}",
    )
    require(len(set(config.links)) == len(config.links), "links", "each link once")
    for source, target in config.links:
        require(source in STAGES and target in STAGES, "links", f"stages out of {STAGES}")
        require(source > target, "links", "links from a deeper stage to a shallower one")
