"""Test training with a backbone and a head compiled by torch.compile. The neck is not compiled.

The tests use the backend `aot_eager`. It traces the forward and backward pass as `inductor` does, but needs no C++
compiler, which a test machine may lack. The code that `inductor` generates is not tested here.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_distributed import CONFIG, Images

from srm_model import build_model
from srm_model.checkpoint import load_weights
from srm_model.neck import SRMNeck
from srm_model.training import train

SMALL = CONFIG.replace(epochs=1, weights_ema=0.0, accumulate=1)


def fit(folder: Path, **options):
    torch.manual_seed(0)
    model = build_model("test_convnext", config=SMALL)
    history = train(model, Images(16), Images(8, seed=1), folder, progress=False, device="cpu", **options)
    return model, history[-1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory):
    return fit(tmp_path_factory.mktemp("plain"))


def test_a_compiled_training_is_the_same_training(plain, tmp_path: Path):
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.utils.counters["graph_break"].clear()  # remove the counts of other tests in this process
    model, row = fit(tmp_path, compile="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > frames
    assert not torch._dynamo.utils.counters["graph_break"]
    # Compiled code uses other fp32 kernels for the same sums, so the loss differs by a few units of rounding. If a
    # gradient is only rounding error, each of the two steps of Adam can be as large as the learning rate, in either
    # direction.
    assert row["loss"] == pytest.approx(plain[1]["loss"], rel=1e-4)
    for one, other in zip(model.parameters(), plain[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2 * 2 * SMALL.lr_neck)
    assert model.backbone._compiled_call_impl is None
    loaded = build_model("test_convnext", config=SMALL)
    load_weights(loaded, tmp_path)  # the names of the weights are those of the uncompiled model


def test_what_cannot_be_asked_for_is_a_sentence(plain, tmp_path: Path):
    with pytest.raises(ValueError, match=r"compile='triton': expected one of .*'inductor'"):
        fit(tmp_path, compile="triton")


def test_a_training_begun_without_is_not_continued_with(tmp_path: Path):
    fit(tmp_path)
    with pytest.raises(ValueError, match="compile None there, 'eager' here"):
        fit(tmp_path, compile="eager")


def test_a_training_neck_and_its_statistics_are_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    neck = SRMNeck([8] * 4, SMALL)
    pyramid = [torch.randn(2, 8, 16 // 2**i, 16 // 2**i) for i in range(4)]
    neck.calibrate(pyramid)
    twin = copy.deepcopy(neck).train()
    fused = torch.compile(neck.train(), backend="eager", fullgraph=True)(pyramid).fused
    torch.testing.assert_close(fused, twin(pyramid).fused)
    for ours, theirs in zip(neck.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
