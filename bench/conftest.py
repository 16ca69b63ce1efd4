"""Options of `pytest bench --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

from bench.operators import DTYPES, SETS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("operators", "operator benchmarks")
    group.addoption("--shapes", choices=tuple(SETS), help="default: some on a CPU, all on a GPU")
    group.addoption("--on", default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    group.addoption("--kind", default="fp32", choices=tuple(DTYPES), help="dtype (default: fp32)")
