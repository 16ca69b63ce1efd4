"""Compare two PGD attacks on one model: through the Triton kernels and through the reference backend.

Both attacks start from the same point. They must have the same losses and end with the same ranking of the images. The
tolerance of the losses is 1e-3 of the largest loss, because rounding decides the sign of very small gradients.
"""

from __future__ import annotations

import pytest
import torch

from srm_model import SRMConfig, build_model
from srm_model.attacks import MSE
from srm_model.attacks.gradient import pgd_trace

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = SRMConfig(channels=16, heads=1, rank=6, pool_size=4, image_size=64, links=((4, 3), (4, 2)))


def with_backend(plain, backend):
    model = build_model("test_convnext", neck="srm", config=CONFIG.replace(backend=backend)).to(DEVICE)
    model.load_state_dict(plain.state_dict())
    return model


def test_pgd_follows_the_same_losses_and_ends_with_the_same_ranking():
    torch.manual_seed(0)
    plain = build_model("test_convnext", neck="srm", config=CONFIG).to(DEVICE)
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 64, 64, generator=draw).to(DEVICE)
    plain.calibrate(images)
    traces, scores = [], []
    for backend in ("reference", "triton"):
        model = with_backend(plain, backend)
        trace = pgd_trace(model, images, torch.zeros(2), MSE(), eps=4 / 255, steps=2, restarts=1)
        traces.append(trace.losses[0].double().cpu())  # (steps + 1, B)
        with torch.no_grad():
            scores.append(model.eval()(trace.images))
    expected, found = traces
    assert expected[-1].mean() > expected[0].mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert torch.equal(scores[0].argsort(), scores[1].argsort())
