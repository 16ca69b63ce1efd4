"""Test the errors of the class `Graphed`.

`test_fused_neck_on_cuda.py` tests that a graph gives the results of the neck.
"""

from __future__ import annotations

import pytest
import torch

from srm_model import SRMConfig, SRMNeck
from srm_model.graphs import Graphed

SMALL = SRMConfig(channels=16, heads=1, rank=4, pool_size=2)
MAPS = [torch.ones(1, c, 4, 4) for c in (3, 4, 5, 6)]


@pytest.mark.parametrize(
    ("message", "config", "training"),
    [
        ("training mode", SMALL, True),
        ("stochastic", SMALL.replace(kv_pool_prob=0.5, kv_pool_eval=True), False),
        ("on cpu; expected CUDA", SMALL, False),
    ],
)
def test_what_cannot_be_captured_is_said(message, config, training):
    with pytest.raises(ValueError, match=message):
        Graphed(SRMNeck((3, 4, 5, 6), config).train(training), MAPS)
