"""Test that links in the pooled form give the same results as links called one by one.

With `return_pyramid=True`, the neck calls its links one by one. The tolerance is the rule of `srm_kernels.numerics`. In
this rule, the exact result and the result of plain PyTorch both come from links called one by one: the exact result in
fp64, the other result in fp32. In every case, the landmarks are all keys or evenly spaced keys, so rounding cannot
change them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from srm_kernels.numerics import DRAWS, FEW, error_ratio
from srm_model import SRMConfig, SRMNeck
from srm_model.neck import link_name

CHANNELS = (3, 4, 5, 6)
SMALL = SRMConfig(channels=16, heads=2, rank=12, pool_size=3, image_size=32, entropy_floor=1.0)
ODD = [(11, 7), (6, 5), (5, 4), (3, 4)]
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform landmarks, fewer than keys": {"landmarks": "uniform", "rank": 5},
    "no DyT, no τ": {"dyt": False, "tau": False},
    "normalised queries": {"qk_norm": "both"},
    "no normalisation, LU": {"qk_norm": None, "solver": "lu"},
    "chains and two links into a stage, pooled keys": {
        "links": ((4, 3), (3, 2), (4, 1), (2, 1)),
        "kv_pool_prob": 1.0,
        "rank": 40,
    },
    "a link into a stage that is not fused": {"fused_stages": (3, 1)},
    "a grid beyond the maps": {"pool_size": 9},
}
Step = dict[str, Tensor]


def make_pyramid(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, *grid, generator=draw).to(dtype) for c, grid in zip(CHANNELS, ODD, strict=True)]


def make_neck(config: SRMConfig) -> SRMNeck:
    """Return a calibrated neck whose gate is not uniform and whose β and τ are not 1."""
    torch.manual_seed(0)
    neck = SRMNeck(CHANNELS, config)
    neck.calibrate(make_pyramid(seed=9))
    with torch.no_grad():
        for name, parameter in neck.named_parameters():
            if name.startswith(("beta", "gate.readouts")) or name.endswith(("theta", "bias", "alpha")):
                parameter += 0.3 * torch.rand_like(parameter)
    return neck.train()


def step(neck: SRMNeck, pyramid: list[Tensor], *, called: bool, draw: int = 0) -> tuple[Step, Step]:
    """Run a forward and a backward pass on a copy of the neck, and return (values, gradients).

    The loss is the sum of the elements of `fused` with random signs (seed `draw`), plus the losses of the neck. The
    values are the outputs, the losses, and the buffers after the forward pass. With `called`, links are called one by
    one.
    """
    neck = copy.deepcopy(neck)
    maps = [m.clone().requires_grad_() for m in pyramid]
    out = neck(maps, return_pyramid=called)
    signs = torch.randint(2, out.fused.shape, generator=torch.Generator().manual_seed(draw)) * 2 - 1
    ((out.fused * signs).sum() + sum(out.losses.values())).backward()
    values = {"fused": out.fused, "weights": out.weights, "gain": out.gain, "norm": out.norm}
    acting = tuple(
        f"links.{link_name(*pair)}." for pair in neck.acting
    )  # the buffers of the other links change only with `return_pyramid`
    values |= out.losses | {
        name: b for name, b in neck.named_buffers() if name.startswith(("median", *acting))
    }
    gradients = {name: p.grad for name, p in neck.named_parameters() if p.grad is not None}
    return values, gradients | {f"map {i}": m.grad for i, m in enumerate(maps) if m.grad is not None}


def _balance_terms(weights: Tensor) -> Tensor:
    """Return Σ |∂(balance)/∂ā · ā|, where ā is the mean of the gate weights over the batch.

    If ā is rounded, the error of the balance loss is of the order of this sum times the unit of rounding.
    """
    mean = weights.mean(0)
    return 2 * ((mean - 1 / mean.numel()).abs() * mean).sum()


def ratios(neck: SRMNeck, other: SRMNeck) -> dict[str, float]:
    """Return the error ratio of every result of `step`.

    The tested results are those of `other` in the pooled form. The exact and the plain results are those of `neck`,
    whose links are called one by one.
    """
    pyramid, wide = make_pyramid(), copy.deepcopy(neck).double()
    draws = range(DRAWS)
    exact = [step(wide, [m.double() for m in pyramid], called=True, draw=draw) for draw in draws]
    plain = [step(neck, pyramid, called=True, draw=draw) for draw in draws]
    found = step(other, pyramid, called=False)
    judged = {}
    for kind in (0, 1):
        assert found[kind].keys() == plain[0][kind].keys() == exact[0][kind].keys()
        together = list(exact[0][1].values()) if kind else None
        for name, value in found[kind].items():
            few = kind == 1 and value.numel() <= FEW
            others = (
                [(p[kind][name], e[kind][name]) for p, e in zip(plain, exact, strict=True)] if few else ()
            )
            scale = [_balance_terms(exact[0][0]["weights"])] if name == "balance" else together
            judged[name] = error_ratio(value, plain[0][kind][name], exact[0][kind][name], scale, others)
    return judged


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("case", CASES)
def test_the_pooled_form_is_the_called_one(case: str, backend: str | None):
    neck = make_neck(SMALL.replace(**CASES[case]))
    other = SRMNeck(CHANNELS, neck.config.replace(backend=backend)).train()
    other.load_state_dict(neck.state_dict())
    assert other.pools(make_pyramid())
    assert {name: ratio for name, ratio in ratios(neck, other).items() if not ratio <= 1} == {}


def test_the_rule_tells_another_weight():
    neck = make_neck(SMALL)
    other = copy.deepcopy(neck)
    with torch.no_grad():
        other.links["4to2"].theta.mul_(1.0001)
    judged = ratios(neck, other)
    assert judged["fused"] > 1
    assert judged["links.4to2.output.weight"] > 1


@pytest.mark.parametrize(
    ("attention", "changes"),
    [("full", {}), ("nystrom", {"solve_dtype": "model"}), ("nystrom", {"links": ()})],
)
def test_what_has_no_pooled_form_is_called(attention: str, changes: dict[str, Any]):
    assert not SRMNeck(CHANNELS, SMALL.replace(**changes), attention=attention).pools(make_pyramid())


def test_hooks_see_the_steps_of_the_pooled_form():
    neck, seen = make_neck(SMALL), []
    for name in ("sources", "key_sides", "query_sides", "merge"):
        getattr(neck, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    neck(make_pyramid())
    assert seen == ["sources", "key_sides", "query_sides", "merge"]
    neck(make_pyramid(), return_pyramid=True)
    assert len(seen) == 4
