"""Tests of which backend runs, and of the error if the requested backend cannot run."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle import tokens

import srm_kernels
from srm_kernels import backends, checks, dispatch, nystrom_attention

NAMES = ("reference", "torch", "triton")
REFUSED = (NotImplementedError, RuntimeError, ValueError)


CALLS = {
    "ridge_leverage_scores": lambda b: srm_kernels.ridge_leverage_scores(tokens(0, 1, 1, 4, 3), backend=b),
    "select_landmarks": lambda b: srm_kernels.select_landmarks(tokens(0, 1, 1, 4, 3), 2, backend=b),
    "landmark_solve": lambda b: srm_kernels.landmark_solve(torch.eye(3), torch.ones(3, 2), backend=b),
    "nystrom_attention": lambda b: nystrom_attention(
        *[tokens(i, 1, 1, 4, 3) for i in range(3)], 2, backend=b
    ),
    "full_attention": lambda b: srm_kernels.full_attention(
        *[tokens(i, 1, 1, 4, 3) for i in range(3)], backend=b
    ),
    "rms_scale": lambda b: srm_kernels.rms_scale(tokens(0, 1, 1, 4, 3), backend=b),
    "dyt": lambda b: srm_kernels.dyt(
        *(torch.ones(shape, dtype=torch.float64) for shape in ((2, 3), (), (3,), (3,))), backend=b
    ),
    "gated_fusion": lambda b: srm_kernels.gated_fusion(
        tokens(0, 1, 2, 3, 2, 2), tokens(1, 1, 2), cap=1.0, backend=b
    ),
    "biased_gelu": lambda b: srm_kernels.biased_gelu([tokens(0, 1, 3, 2, 2)], [tokens(1, 3)], backend=b),
    "gate_logits": lambda b: srm_kernels.gate_logits(
        [tokens(0, 1, 3, 2, 2)], [tokens(1, 3)], [(tokens(2, 1, 3), tokens(3, 1))], backend=b
    ),
    "gate_losses": lambda b: srm_kernels.gate_losses(tokens(0, 1, 2) ** 2, entropy_floor=0.5, backend=b),
    "landmark_side": lambda b: srm_kernels.landmark_side(
        *[tokens(i, 1, 1, 4, 3) for i in range(2)], 2, backend=b
    ),
    "project_sources": lambda b: srm_kernels.project_sources(
        tokens(0, 1, 4, 3), [tokens(1, 3, 3)], [tokens(2, 3, 3)], backend=b
    ),
    "pooled_links": lambda b: srm_kernels.pooled_links(
        [tokens(0, 1, 2, 3, 3)],
        [(tokens(1, 3, 2), tokens(2, 3))],
        [tokens(3, 3, 3)],
        [tokens(4, 1, 1, 2, 3)],
        [0],
        size=2,
        backend=b,
    ),
    "merge_links": lambda b: srm_kernels.merge_links(
        srm_kernels.PooledLinks(tokens(0, 1, 1, 1, 4, 2), tokens(1, 1, 4, 2), None),
        [tokens(2, 1, 1, 2, 3)],
        [(tokens(3, 3, 2), tokens(4, 3))],
        [tokens(5, 3, 3)],
        [0],
        [tokens(6, 1)],
        backend=b,
    ),
    "tau_loss": lambda b: srm_kernels.tau_loss([tokens(0, 2)], [tokens(1, 2) ** 2], reference=1.0, backend=b),
    "adaptive_pool": lambda b: srm_kernels.adaptive_pool(tokens(0, 1, 2, 3, 4), 2, backend=b),
}


def test_every_public_name_is_there():
    assert set(CALLS) | {"backends"} <= set(srm_kernels.__all__)
    for name in srm_kernels.__all__:
        assert hasattr(srm_kernels, name)


def test_backends_says_what_can_run_and_why_the_rest_cannot():
    found = backends()
    assert set(found) == set(NAMES)
    text = str(found)
    assert "reference" in text
    if not torch.cuda.is_available():
        assert len(str(found["triton"])) > 10, "a reason is expected"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may run these")
@pytest.mark.parametrize("name", CALLS)
def test_asking_for_what_cannot_run_is_an_error_that_says_why(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(REFUSED, match="triton") as caught:
        CALLS[name]("triton")
    assert len(str(caught.value)) > 20
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", CALLS)
def test_the_reference_runs_everything(name, backend):
    assert CALLS[name](backend) is not None


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_backend_names_the_known_ones(name):
    with pytest.raises(ValueError, match="pytorch") as caught:
        CALLS[name]("pytorch")
    assert "reference" in str(caught.value)


def test_torch_and_reference_agree_where_both_run():
    q, k, v = (tokens(i, 2, 2, 9, 8) for i in range(3))
    a = srm_kernels.full_attention(q, k, v, backend="torch")
    b = srm_kernels.full_attention(q, k, v, backend="reference")
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_environment_variable_asks_for_a_backend(monkeypatch):
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "reference")
    assert CALLS["nystrom_attention"](None) is not None
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"SRM_KERNELS_BACKEND.*fast"):
        CALLS["dyt"](None)
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "")
    assert CALLS["dyt"](None) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may run this")
@pytest.mark.parametrize("name", CALLS)
def test_the_environment_variable_never_falls_back(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "triton")
    with pytest.raises(REFUSED, match="triton"):
        CALLS[name](None)


def test_an_argument_overrules_the_environment_variable(monkeypatch):
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "fast")
    assert CALLS["dyt"]("reference") is not None


def test_imports_without_triton_compiler_or_warnings(fresh_import):
    """The import writes nothing to stderr and loads no large optional package.

    It runs in a new process, in which Triton is blocked, PATH is empty, and warnings are errors.
    """
    assert fresh_import["stderr"] == ""
    assert fresh_import["backends"] == sorted(NAMES)
    heavy = {"timm", "scipy", "matplotlib", "srm_model", "torchvision", "hypothesis"}
    assert not heavy & set(fresh_import["loaded"])


@pytest.mark.parametrize(("keys", "expected"), [(64, 1), (2**16 + 1, 2)])
def test_small_work_of_the_key_side_stays_on_one_thread(keys, expected):
    """Of two threads, `work` uses one if there are few keys, and both if there are many.

    After the call, the number of threads is two again, even if `work` raises an error.
    """
    seen = []

    def work(key: torch.Tensor, fail: bool) -> None:
        seen.append(torch.get_num_threads())
        if fail:
            raise RuntimeError("failed")

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        dispatch.few_threads(work)(torch.empty(keys, 32), False)
        with pytest.raises(RuntimeError, match="failed"):
            dispatch.few_threads(work)(torch.empty(keys, 32), True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == [expected, expected]


@pytest.mark.parametrize("call", ["ridge_leverage_scores", "select_landmarks", "landmark_side"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_operators_of_the_key_side_ask_for_few_threads(call, backend, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    CALLS[call](backend)
    assert asked
    assert asked == [1, 2] * (len(asked) // 2)


def test_the_name_of_the_last_release_is_taken_with_one_warning(monkeypatch):
    checks._warn_renamed.cache_clear()
    x, ones = tokens(0, 1, 2, 5, 4), torch.ones(4, dtype=torch.float64)
    arguments = x, ones[0], ones, ones
    with pytest.warns(FutureWarning, match="backend 'sdpa' is now called 'torch'"):
        found = srm_kernels.dyt(*arguments, backend="sdpa")
    assert torch.equal(found, srm_kernels.dyt(*arguments, backend="torch"))
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert srm_kernels.explain("dyt", *arguments).backend == "torch"
    checks._warn_renamed.cache_clear()
    with pytest.warns(FutureWarning, match="backend 'sdpa' is now called 'torch'"):
        srm_kernels.dyt(*arguments)
    assert "sdpa" not in srm_kernels.backends()


def test_a_program_that_the_last_release_exported_runs():
    """A program exported by the last release can contain "sdpa", the former name of the backend "torch", as a constant.

    With "sdpa", operators therefore give the same results and gradients as with "torch".
    """
    x, ones = tokens(0, 1, 2, 5, 4).requires_grad_(), torch.ones(4, dtype=torch.float64)
    results = [torch.ops.srm.dyt(x, ones[0], ones, ones, name) for name in ("sdpa", "torch")]
    grads = [torch.autograd.grad(result.square().sum(), x)[0] for result in results]
    assert torch.equal(*results)
    assert torch.equal(*grads)


def test_an_amd_build_of_torch_is_refused_in_a_sentence(monkeypatch):
    """An AMD build of torch also names its devices "cuda", and they would pass the check of the compute capability."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    reason = "its kernels are written for NVIDIA GPUs, and this torch is built for AMD GPUs"
    assert backends()["triton"] == (False, reason)
    with pytest.raises(NotImplementedError, match=r"cannot run dyt: .* built for AMD GPUs$"):
        CALLS["dyt"]("triton")
