"""Test the number of pipeline stages of the kernels for different versions of Triton."""

from __future__ import annotations

import pytest

from srm_kernels import devices


@pytest.mark.parametrize(
    ("triton", "hopper"), [("3.6.0", 1), ("3.7.0", 1), ("3.7.1", 2), ("3.8.0+git1", 2), ("unknown", 2)]
)
def test_copies_run_ahead_of_wgmma_only_where_they_are_fenced(
    triton: str, hopper: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "version", lambda _: triton)
    devices._copies_are_fenced.cache_clear()
    found = [devices.pipeline_stages(capability) for capability in ((8, 0), (8, 9), (9, 0), (12, 0))]
    devices._copies_are_fenced.cache_clear()
    assert found == [2, 2, hopper, 2]
