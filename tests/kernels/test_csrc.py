"""The CUDA sources where no GPU is: their arithmetic on the host and their compilation; how setup.py builds csrc.

On a CUDA device with the library built, the same solves through `backend="cuda"`. The CPU's core: test_cpu_core.py.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from oracle import tokens
from torch import Tensor

from srm_kernels import Solver, backends, landmark_solve
from srm_kernels.conditioning import reference
from srm_kernels.options import SolveOptions

ROOT = Path(__file__).parents[2]
EPS = torch.finfo(torch.float32).eps
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
needs_cuda = pytest.mark.skipif(not backends()["cuda"].available, reason=backends()["cuda"].reason)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/host.cpp: the template that the kernel is made of, for one thread."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("csrc") / "host.so"
    flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(ROOT / "csrc/host.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run(host: ctypes.CDLL, A: Tensor, G: Tensor, mask: Tensor | None, transposed: bool, keep: bool) -> Tensor:
    r, d = G.shape[-2:]
    a, x = A.float().contiguous(), G.float().clone(memory_format=torch.contiguous_format)
    wanted = None if mask is None else mask.to(torch.uint8).contiguous()

    def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())

    host.srm_jacobi_solve_host(
        pointer(a), pointer(x), pointer(wanted), ctypes.c_int64(A[..., 0, 0].numel()), r, d, transposed, keep
    )
    return x


def jacobi_of(host: ctypes.CDLL) -> reference.SVD:
    """What conditioning/cuda.py hands to the reference, on the host."""

    def svd(A: Tensor, ridge: float, mask: Tensor | None) -> reference.Solve:
        return lambda rhs, transposed: run(host, A, rhs, mask, transposed, ridge > 0)

    return svd


@pytest.mark.parametrize("rows", [2, 4, 16, 128])
def test_every_pair_of_rows_meets_once_and_no_row_twice_in_a_round(host, rows):
    first, second = ctypes.c_int(), ctypes.c_int()
    met = set()
    for t in range(rows - 1):
        busy = set()
        for place in range(rows // 2):
            host.srm_jacobi_pair(t, place, rows, ctypes.byref(first), ctypes.byref(second))
            pair = {first.value, second.value}
            assert len(pair) == 2
            assert not busy & pair
            busy |= pair
            met.add(frozenset(pair))
    assert len(met) == rows * (rows - 1) // 2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 17, 64, 128])
def test_the_backward_error_is_rounding_whatever_kappa(host, r, transposed):
    """‖A X − G‖ ≤ 4 √r eps (‖A‖‖X‖ + ‖G‖), κ from 10 to 1e6: smooth landmarks, λ₀ = 1e-1 and 1e-5."""
    d = 9
    keys = oracle.landmark_family("smooth", 3, 1, 2, r, d)
    logits = keys @ keys.mT / math.sqrt(d)
    for ridge in (1e-1, 1e-5):
        A, G = oracle.system(logits, keys, ridge).matrix.float(), tokens(4, 1, 2, r, d, dtype=torch.float32)
        x = run(host, A, G, None, transposed, True).double()
        wide = A.double().mT if transposed else A.double()
        size = oracle.frobenius(wide) * oracle.frobenius(x) + oracle.frobenius(G)
        assert (oracle.frobenius(wide @ x - G) / size).max() <= 4 * math.sqrt(r) * EPS


def test_without_a_ridge_the_answer_has_the_least_norm(host):
    keys = oracle.landmark_family("duplicated", 7, 2, 3, 8, 24)
    logits, rhs = (keys @ keys.mT / math.sqrt(24)).float(), tokens(8, 2, 3, 8, 24, dtype=torch.float32)
    found, used = reference.landmark_solve(logits, rhs, SolveOptions(0.0, "svd"), jacobi_of(host))
    exact = oracle.pseudo_inverse_solve(logits, rhs, 0.0, EPS)
    assert (used == Solver.SVD).all()
    assert (found.double() - exact).abs().max() <= 1e-4 * exact.abs().max()
    torch.testing.assert_close(found[..., :4, :], found[..., 4:, :], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("equilibrate", [False, True])
def test_auto_leaves_the_unflagged_as_they_are_and_differentiates(host, equilibrate):
    """One flagged matrix among three; gradients are those of the reference in fp64, to fp32."""
    keys = oracle.normalise(tokens(5, 3, 9, 16))
    keys[1, 4] = keys[1, 0]
    logits, rhs = keys @ keys.mT / 4, tokens(6, 3, 9, 5)
    kappa = oracle.condition(oracle.system(logits, rhs, 1e-2, equilibrate).matrix)
    limit = float(kappa[[0, 2]].max()) * 1.5
    assert kappa[1] > 2.1 * limit
    grad = tokens(7, 3, 9, 5)
    found = []
    for dtype, svd in ((torch.float32, jacobi_of(host)), (torch.float64, None)):
        inputs = [t.to(dtype).requires_grad_() for t in (logits, rhs)]
        options = SolveOptions(1e-2, "auto", equilibrate, limit)
        x, used = reference.landmark_solve(*inputs, options, svd)
        assert used.tolist() == [Solver.LU, Solver.SVD, Solver.LU]
        found.append([x, *torch.autograd.grad(x, inputs, grad.to(dtype))])
    for single, exact in zip(*found, strict=True):
        assert (single.double() - exact).abs().max() <= 100 * EPS * float(kappa[1]) * exact.abs().max()


@needs_nvcc
def test_it_compiles_for_every_architecture_without_spills(build, tmp_path):
    """Plain nvcc, no header of torch; shared memory and stack as ptxas reports them."""
    command = ["nvcc", *build.NVCC, *build.architecture_flags(), "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-c", str(ROOT / "csrc/jacobi.cu"), "-o", str(tmp_path / "jacobi.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"for 'sm_(\d+)'", done.stderr) == [str(a) for a in build.ARCHITECTURES]
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert len(spills) == len(build.ARCHITECTURES)
    assert set(spills) == {("0", "0", "0")}


LOADING = {
    # CPU tensors are refused by torch, not by a crash.
    "cuda": """
ones = torch.ones(1, dtype=torch.uint8)
try:
    torch.ops.srm_cuda.jacobi_solve(torch.eye(3)[None], torch.ones(1, 3, 2), ones, False, True)
except NotImplementedError as error:
    assert "CPU" in str(error), error
else:
    raise SystemExit("it ran")
""",
    "cpu": """
x, served = torch.ones(1, 3, 2), torch.zeros(1, dtype=torch.bool)
torch.ops.srm_cpu.symmetric_solve(torch.zeros(1, 3, 3), x, served, 0.5)
assert served and torch.allclose(x, torch.tensor(1 / (1 + 0.5 / 3)))
""",
}


@pytest.mark.parametrize("name", LOADING)
def test_the_library_builds_and_this_torch_loads_it(build, tmp_path, name):
    """In a process of its own, the operator is there."""
    missing = [tool for tool in {build.CXX, build.TOOLS[name]} if shutil.which(tool) is None]
    if missing or build.torch_folder() is None:
        pytest.skip(f"missing: {', '.join(missing) or 'the headers of torch'}")
    library = tmp_path / "library.so"
    build.build_library(name, library, build.torch_folder())
    code = f"import sys, torch\ntorch.ops.load_library(sys.argv[1])\n{LOADING[name]}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("environment", "path", "reason"),
    [
        ({"SRM_BUILD_EXT": "0"}, None, "SRM_BUILD_EXT=0"),
        ({}, "/nowhere", "on PATH"),
        ({"SRM_BUILD_EXT": "1"}, "/nowhere", "on PATH"),
    ],
)
def test_an_install_without_a_compiler_says_so_in_one_line(
    build, monkeypatch, capsys, environment, path, reason, name
):
    monkeypatch.setattr(build, "TOOLS", {name: build.TOOLS[name]})
    monkeypatch.delenv("SRM_BUILD_EXT", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    if environment.get("SRM_BUILD_EXT") == "1":
        with pytest.raises(SystemExit, match=reason):
            build.extensions()
        return
    assert build.extensions() == []
    told = capsys.readouterr().err
    assert reason in told
    assert f"the {name} library is not built" in told
    assert told.count("\n") == 1


def test_a_library_that_is_built_again_leaves_the_loaded_one_as_it_was(build, monkeypatch, tmp_path):
    """A process maps the file that it loaded: another one takes its name."""
    from setuptools import Distribution, Extension

    target = tmp_path / "srm_kernels" / "_cpu.so"
    built = tmp_path / "build" / "srm_kernels" / "_cpu.so"
    for path, content in ((target, b"old"), (built, b"new")):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    command = build.BuildLibrary(Distribution())
    command.build_lib, command.extensions = str(tmp_path / "build"), [Extension("srm_kernels._cpu", [])]
    with target.open("rb") as loaded:
        command.copy_extensions_to_source()
        assert loaded.read() == b"old"
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_asking_for_it_where_it_cannot_run_says_why():
    if backends()["cuda"].available:
        pytest.skip("it can run here")
    with pytest.raises(NotImplementedError, match=r"csrc|CUDA device"):
        landmark_solve(torch.eye(3), torch.ones(3, 2), solver="svd", backend="cuda")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("solver", ["svd", "auto"])
@pytest.mark.parametrize("r", [3, 32, 128])
def test_on_a_device(host, r, solver):
    keys = oracle.normalise(tokens(5, 4, r, 16))
    keys[1, 1] = keys[1, 0]
    logits, rhs = (keys @ keys.mT / 4).float(), tokens(6, 4, r, 40, dtype=torch.float32)
    same, used = reference.landmark_solve(
        logits, rhs, SolveOptions(solver=solver, kappa_max=50.0), jacobi_of(host)
    )
    on_device = logits.cuda(), rhs.cuda()
    options = {"solver": solver, "kappa_max": 50.0, "backend": "cuda", "diagnostics": "estimate"}
    landmark_solve(*on_device, **options)  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = landmark_solve(*on_device, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.solver.cpu(), used)
    assert (found.x.cpu() - same).abs().max() <= 1e-4 * same.abs().max()
