"""Tests that the formula, fvcore and torch count the same multiply-accumulates."""

from __future__ import annotations

import pytest
import torch

from srm_model import SRMConfig, SRMNeck
from srm_model.head import Head
from srm_model.neck import PlainNeck
from srm_model.profiling import Case, Sweep
from srm_model.profiling.counting import (
    fvcore_macs,
    link_macs,
    map_sizes,
    neck_macs,
    parameters,
    torch_macs,
)
from srm_model.profiling.subjects import meta_copy

CHANNELS = (5, 6, 7, 9)
CONFIGS = {
    "default, 128 px": (SRMConfig(), 128, 128),
    "small, not square": (SRMConfig(channels=24, heads=3, rank=5, pool_size=3), 96, 160),
    "links between shallow stages, rank above the keys": (
        SRMConfig(channels=32, heads=2, rank=500, links=((4, 3), (3, 2), (2, 1))),
        100,
        100,
    ),
}


def make(neck: str, config: SRMConfig):
    torch.manual_seed(0)
    if neck == "none":
        return PlainNeck(CHANNELS, config).eval()
    return SRMNeck(CHANNELS, config, attention="full" if neck == "quadratic" else "nystrom").eval()


def pyramid(height: int, width: int) -> list[torch.Tensor]:
    return [
        torch.randn(1, channels, *size)
        for channels, size in zip(CHANNELS, map_sizes(height, width), strict=True)
    ]


@pytest.mark.parametrize("neck", ["srm", "quadratic", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_formula_fvcore_and_torch_agree(name: str, neck: str):
    config, height, width = CONFIGS[name]
    parts = neck_macs(config, neck, CHANNELS, map_sizes(height, width))
    formula = sum(parts.values())
    module, inputs = make(neck, config), (pyramid(height, width),)
    traced = fvcore_macs(module, inputs)
    counted = torch_macs(*meta_copy(module, inputs))
    # All methods of counting round d³/3 and r³/3 at the same point, so that the counts are the same integer.
    assert counted == formula
    assert traced in (formula, None)
    assert traced is not None or not _has_fvcore()


def _has_fvcore() -> bool:
    try:
        import fvcore.nn  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_link_is_the_articles_equation():
    config = SRMConfig(channels=64, heads=4, rank=8, landmarks="leverage")
    nq, nk, r, d = 100, 30, 8, 16
    eq30 = 2 * nq * r * d + 2 * r * nk * d + r * r * d + 2 * nk * d * d + d**3 / 3 + r**3 / 3 + r * r * d
    # d³/3 and r³/3 are each rounded down.
    assert 4 * (eq30 - 2) <= link_macs(config, "srm", nq, nk) <= 4 * eq30
    assert link_macs(config, "quadratic", nq, nk) == 4 * 2 * nq * nk * d
    assert link_macs(config.replace(landmarks="uniform"), "srm", nq, nk) < link_macs(config, "srm", nq, nk)


def test_a_backward_pass_is_counted_too():
    config, height, width = CONFIGS["small, not square"]
    module, inputs = meta_copy(make("none", config).train(), (pyramid(height, width),))
    forward = torch_macs(module, inputs)
    # Only weight gradients are computed: the input pyramid does not require a gradient.
    assert torch_macs(module, inputs, backward=True) == 2 * forward
    inputs[0][-1].requires_grad_()
    assert torch_macs(module, inputs, backward=True) == 3 * forward


def test_parameters():
    assert parameters(torch.nn.Linear(3, 2)) == 8


def test_a_sweep_reports_the_same_counts_for_necks_and_for_models():
    sweep = Sweep(torch.device("cpu"), SRMConfig(channels=16, heads=2, rank=4, pool_size=2))
    counts = {
        part: sweep._count(Case(part, "test_convnext", "srm", None, 64, 3, "bf16", "forward"))
        for part in ("neck", "model")
    }
    assert counts["neck"]["formula"] == counts["neck"]["torch"]
    assert counts["neck"]["fvcore"] in (counts["neck"]["formula"], None)
    assert counts["model"]["formula"] is None
    assert counts["model"]["fvcore"] in (counts["model"]["torch"], None)
    fused = torch.randn(1, sweep.config.channels, sweep.config.pool_size, sweep.config.pool_size)
    head = torch_macs(*meta_copy(Head(sweep.config.channels), (fused,)))
    assert counts["model"]["torch"] > counts["neck"]["torch"] + head
