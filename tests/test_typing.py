"""Test that mypy checks a user's code against the types of both packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSUMER = """
import torch
from srm_kernels import diagnosed_attention, nystrom_attention, rms_scale
from srm_model import SRMConfig, build_model

tokens = torch.rand(1, 2, 16, 8)
mean, rms = rms_scale(tokens)
reveal_type(rms)
reveal_type(SRMConfig().rank)
model = build_model("test_convnext", neck="srm")
y: torch.Tensor = nystrom_attention(tokens, tokens, tokens, 4, method="uniform")
y, solution = diagnosed_attention(tokens, tokens, tokens, 4, ridge=0.1)
rms_scale("tokens")
nystrom_attention(tokens, tokens, tokens, "4")
SRMConfig(no_such_field=1)
diagnosed_attention(tokens, tokens, tokens, 4, rigde=0.1)
"""


def test_a_consumer_is_checked_against_our_types(tmp_path: Path):
    (tmp_path / "consumer.py").write_text(CONSUMER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache"), "consumer.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},  # mypy does not find an editable install
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'Revealed type is "torch._tensor.Tensor"' in done.stdout, done.stdout + done.stderr
    assert 'Revealed type is "int"' in done.stdout.replace("builtins.", "")
    errors = [
        line for line in done.stdout.splitlines() if line.startswith("consumer.py") and ": error: " in line
    ]
    lines = {int(line.split(":")[1]) for line in errors}
    assert lines == {13, 14, 15, 16}, done.stdout


def test_the_marker_of_types_is_installed_with_the_packages():
    for package in ("srm_kernels", "srm_model"):
        assert (ROOT / package / "py.typed").is_file()
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert listed.count('"py.typed"') == 2
