"""Operators by implementation and shape: `pytest bench --benchmark-only`, compared across commits by pytest-benchmark.

`--benchmark-autosave`, then `--benchmark-compare` on another commit; times of two runs are a hint, and
`python -m bench.compare` decides. An implementation whose numbers are wrong on these inputs fails and has no time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.operators import DIRECTIONS, FAMILIES, OPERATORS, SETS, NumericsError, Timed
from srm_kernels import backends
from srm_model.profiling import machine


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" not in metafunc.fixturenames:
        return
    device = metafunc.config.getoption("--on")
    shapes = metafunc.config.getoption("--shapes") or ("all" if device.startswith("cuda") else "some")
    available = [name for name, status in backends().items() if status.available]
    metafunc.parametrize("family", SETS[shapes])
    metafunc.parametrize("direction", DIRECTIONS)
    metafunc.parametrize("operator", OPERATORS)
    metafunc.parametrize("implementation", available)


def test_operator(
    benchmark: Any,
    request: pytest.FixtureRequest,
    operator: str,
    implementation: str,
    family: str,
    direction: str,
) -> None:
    device, dtype = request.config.getoption("--on"), request.config.getoption("--kind")
    try:
        timed = Timed(operator, FAMILIES[family], implementation, direction, dtype, device)
        error = timed.verify()
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    except NumericsError as refusal:
        pytest.fail(str(refusal), pytrace=False)
    benchmark.group = f"{operator}, {family}, {direction}, {dtype}"
    benchmark.extra_info.update(
        machine=machine(device), relative_error=error, sizes=FAMILIES[family]._asdict()
    )
    if torch.device(device).type != "cuda":
        benchmark(timed.call)
        return

    def finished() -> None:
        timed.call()
        torch.cuda.synchronize()

    benchmark(finished)
