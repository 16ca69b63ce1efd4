"""What tests rely on that no test of their own would notice: exact libraries on a GPU."""

from __future__ import annotations

import torch


def test_fp32_is_fp32_and_algorithms_are_fixed_wherever_tests_run():
    """TF32 convolutions are torch's default; without the fixture of `conftest` this fails on a CPU too."""
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
