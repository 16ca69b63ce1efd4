"""Test the compiled code of all operators except attention on the sample of `bench.ptx.matrix`."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from sampled import rows_test

test_run = rows_test(lambda kind: kind.startswith("operator") and "attention" not in kind)
