"""Test the settings in `conftest.py` that make libraries exact and deterministic on a GPU."""

from __future__ import annotations

import torch


def test_fp32_is_fp32_and_algorithms_are_fixed_wherever_tests_run():
    """Check that TF32 is off and that cuDNN is deterministic.

    By default, torch allows TF32 in convolutions, also on a machine without a GPU. Without the fixture
    `exact_libraries`, this test would therefore fail on every machine.
    """
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
