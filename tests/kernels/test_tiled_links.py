"""Test the tiled implementations of `pooled_links`: values, gradients, batch independence and peak memory.

Results follow the rule of `srm_kernels.numerics`. A tile has at most 40 positions, unless a test sets another number.
Most maps then have several tiles, and some rows are longer than a tile.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from kernel_rule import follow_the_rule, results_and_gradients, within
from links import SHAPES, inputs, pooled, results, schedule, several
from oracle import tokens
from torch import Tensor, library
from torch.autograd import gradcheck, gradgradcheck

from srm_kernels import adaptive_pool, dispatch, native, neck
from srm_kernels.neck import batched, tile_steps, tiled
from srm_kernels.neck.tile_native import NativeGrid, grid_of
from srm_kernels.options import QuerySides
from srm_model.profiling.memory import peak

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
made = partial(inputs, device="cpu")
NORMS = (None, "keys", "both")


@pytest.fixture(autouse=True, params=["torch", "csrc", "GPU"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test with small tiles and with each of three implementations.

    - "torch": a tile has one image, and its steps run in plain PyTorch.
    - "csrc": a tile has one image, and its steps run in C++.
    - "GPU": a tile has all images of the batch, as on a GPU.
    """
    positions(monkeypatch, 40)
    if request.param == "GPU":
        monkeypatch.setattr(neck, "_by_tiles", lambda _: batched)
    elif request.param == "csrc":
        request.getfixturevalue("core")
        if not isinstance(grid_of(2, 2, 1, 4, torch.ones(1)), NativeGrid):
            pytest.skip("the installed library is older than csrc: install the package again")
    else:
        monkeypatch.setattr(native, "BUILT", False)
    return str(request.param)


def positions(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for module in (tiled, batched):
        monkeypatch.setattr(module, "POSITIONS", count)


def without_x(arguments: list[Tensor]) -> list[Tensor]:
    return arguments[:5] + arguments[6:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("qk_norm", "dyt"), [("keys", False), (None, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, qk_norm, dtype, dyt):
    arguments = without_x(made(1, dtype=dtype, dyt=dyt, **SHAPES[shape]))
    follow_the_rule(results(4, qk_norm=qk_norm), arguments, backend="torch")


@pytest.mark.parametrize("dyt", [False, True])
@pytest.mark.parametrize("qk_norm", NORMS)
@pytest.mark.parametrize("grid", [(9, 13), (3, 101), (2, 3), (1, 1)])
def test_values_and_gradients_in_fp64(grid, qk_norm, dyt):
    arguments = without_x(made(2, dtype=torch.float64, dyt=dyt, grid=grid))
    arguments[4][0, 1, 2] = 0  # a zero key has no direction
    call = results(4, qk_norm=qk_norm, scale=0.7)
    found, exact = (
        results_and_gradients(partial(call, backend=name), arguments) for name in ("torch", "reference")
    )
    for one, other in zip(found, exact, strict=True):
        oracle.agree(one, other.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dyt", [False, True])
def test_normalised_queries(dyt, dtype):
    arguments = without_x(made(3, dtype=dtype, dyt=dyt))
    follow_the_rule(results(4, qk_norm="both"), arguments, backend="torch")


@pytest.mark.parametrize("dyt", [False, True])
@pytest.mark.parametrize("qk_norm", NORMS)
def test_derivatives(qk_norm, dyt, monkeypatch):
    """First derivatives are computed in tiles shorter than a row. Second derivatives use the reference."""
    positions(monkeypatch, 2)
    sizes: dict[str, Any] = {"b": 1, "d": 2, "channels": 2, "grid": (2, 3), "rank": 2}
    leaves = without_x(made(4, dtype=torch.float64, dyt=dyt, **sizes))
    call = partial(results(2, qk_norm=qk_norm), backend="torch")
    assert gradcheck(call, [t.requires_grad_() for t in leaves])
    if qk_norm == "keys" and not dyt:
        assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dyt", [False, True])
def test_links_that_share_maps_and_differ_in_rank(dyt, dtype):
    arguments = schedule(dtype, dyt=dyt, device="cpu")
    follow_the_rule(lambda *t, backend: several(*t, backend=backend)[:2], arguments, backend="torch")
    found = several(*arguments, backend="torch").probabilities
    assert not found[1, ..., 3:].any()  # this link has rank 3, the others 5


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dyt", [False, True])
def test_the_statistic(dyt, offset):
    """With X of mean 1000, the relative tolerance of the RMS is 1e-3, as in test_pooled_links.py."""
    f, a, bias, w, k, x, *of_dyt = made(5, dyt=dyt, grid=(9, 50))
    x += offset
    call = partial(pooled, size=4, qk_norm="keys")
    found = call(f, a, bias, w, k, *of_dyt, x=x, backend="torch").scales[0]
    plain = call(f, a, bias, w, k, *of_dyt, x=x, backend="reference").scales[0]
    wide = [t.double() for t in (f, a, bias, w, k, *of_dyt)]
    exact = call(*wide, x=x.double(), backend="reference").scales[0]
    if offset:
        torch.testing.assert_close(found.mean.double(), exact.mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.rms.double(), exact.rms, rtol=1e-3, atol=0)
        return
    for part in range(2):
        within(found[part], plain[part], exact[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dyt", [False, True])
def test_any_strides(dyt, dtype):
    arguments = without_x(made(6, dyt=dyt, dtype=dtype))
    f, call = arguments[0], results(4, qk_norm="keys")
    for strided in (
        f.contiguous(memory_format=torch.channels_last),
        f.mT.contiguous().mT,
        torch.cat([f, f], -1)[..., : f.shape[-1]],
    ):
        follow_the_rule(call, [strided, *arguments[1:]], backend="torch")
    expanded = call(f[:1].expand_as(f), *arguments[1:], backend="torch")[0]
    assert torch.equal(expanded, call(torch.cat([f[:1], f[:1]]), *arguments[1:], backend="torch")[0])


@pytest.mark.parametrize("steps", ["torch", "csrc"], indirect=True)
@pytest.mark.parametrize("grid", [(9, 13), (16, 16)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dyt", [False, True])
def test_an_image_alone_and_in_a_batch_gives_the_same_bits(dyt, dtype, layout, grid):
    """On a CPU, where a tile has one image, P̄, pool(F), dF and dK̃ have the same bits alone and in a batch.

    With the 9×13 grid, the images of a batch do not start in memory at multiples of the length of a SIMD vector.
    """
    f, a, bias, w, k, _, *of_dyt = made(7, b=3, dyt=dyt, dtype=dtype, d=16, channels=5, grid=grid)
    wide = k.dtype
    upstream = tokens(90, 1, 3, 2, 16, 5).to(wide), tokens(91, 3, 16, 5).to(dtype)

    def run(chosen: slice) -> list[Tensor]:
        leaves = [
            f[chosen].clone().contiguous(memory_format=layout).requires_grad_(),
            k[chosen].clone().requires_grad_(),
        ]
        found = pooled(leaves[0], a, bias, w, leaves[1], *of_dyt, size=4, qk_norm="keys", backend="torch")
        given = [upstream[0][:, chosen], upstream[1][chosen]]
        grads = torch.autograd.grad(found[:2], leaves, given)
        return [found.probabilities[0], found.maps, *grads]

    together = run(slice(None))
    for image in range(3):
        for whole, alone in zip(together, run(slice(image, image + 1)), strict=True):
            assert torch.equal(whole[image : image + 1], alone)


@pytest.mark.parametrize("dyt", [False, True])
def test_nan_stays_in_its_image_and_head(dyt):
    f, a, bias, w, k, _, *of_dyt = made(8, dyt=dyt)
    expected = pooled(f, a, bias, w, k, *of_dyt, size=4, backend="torch").probabilities[0]
    f[0, 1, 2, 3] = math.nan
    k[1, 1, 2] = math.nan
    found = pooled(f, a, bias, w, k, *of_dyt, size=4, backend="torch").probabilities[0]
    assert found[0].isnan().any(-1).any(-1).all()
    assert found[1, 1].isnan().all()
    assert torch.equal(found[1, 0], expected[1, 0])


def test_parameters_may_be_wider_than_the_maps():
    """A, a and W_Q in a wider dtype are first rounded to the maps' dtype.

    Gradients of the parameters are in the parameters' dtype.
    """
    f, a, bias, w, k, _, *of_dyt = made(9, dtype=torch.bfloat16, dyt=True)
    call = partial(results(4), backend="torch")
    narrow = results_and_gradients(call, [f, a, bias, w, k, *of_dyt])
    finer = [t.float() * (1 + 2**-12) for t in (a, bias, w)]
    wide = results_and_gradients(call, [f, *finer, k, *(t.float() for t in of_dyt)])
    for one, other in zip(narrow, wide, strict=True):
        assert torch.equal(one, other.to(one.dtype))
    assert [t.dtype for t in wide[2:]] == [torch.bfloat16, *[torch.float32] * 7]


@pytest.mark.parametrize("dyt", [False, True])
def test_no_block_of_all_positions_is_ever_in_memory(dyt, monkeypatch):
    """Peak memory is at most a quarter of the memory for the N×r probabilities of all heads of one image, here 6 MiB.

    For the forward and backward passes together, the memory of the gradients is added to this limit. The reference
    needs more than 6 MiB.
    """
    positions(monkeypatch, 64)
    f, a, bias, w, k, x, *of_dyt = made(10, b=2, heads=4, d=8, channels=6, grid=(96, 128), rank=32, dyt=dyt)
    parameters = (f, a, bias, w, k, *of_dyt)
    leaves = [t.clone().requires_grad_() for t in parameters]
    block = 4 * f.shape[2] * f.shape[3] * 4 * 32

    def forward(backend: str) -> object:
        with torch.no_grad():
            return pooled(*parameters, size=8, x=x, qk_norm="keys", backend=backend)

    def both(backend: str) -> object:
        found = pooled(*leaves, size=8, x=x, qk_norm="keys", backend=backend)
        return torch.autograd.grad(found.probabilities.sum() + found.maps.sum(), leaves)

    of_gradients = sum(4 * t.numel() for t in leaves)
    for call, kept in ((forward, 0), (both, of_gradients)):
        assert peak(partial(call, "reference"), CPU).above > block
        assert peak(partial(call, "torch"), CPU).above <= block / 4 + kept


def test_it_is_the_default(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    f, *rest = without_x(made(11))
    for features in (f, f.to("meta")):
        for name, expected in ((None, "torch"), ("torch", "torch"), ("reference", "reference")):
            assert neck._choose_backend(name, features, 5, 8, 4, 0) == expected
    default, by_name, reference = (
        results(4)(f, *rest, backend=name)[0] for name in (None, "torch", "reference")
    )
    assert torch.equal(default, by_name)
    assert not torch.equal(default, reference)


def test_a_tile_has_all_images_unless_it_is_on_a_cpu(monkeypatch):
    monkeypatch.undo()
    sides = QuerySides(*[[torch.ones(1)]] * 9, [0], 4, 1.0, None)
    assert neck._by_tiles(sides) is tiled
    assert neck._by_tiles(replace(sides, maps=[torch.ones(1, device="meta")])) is batched


def test_opcheck():
    f, a, bias, w, k, x, *of_dyt = (
        [t.requires_grad_()] for t in made(12, b=1, heads=1, grid=(5, 4), dyt=True)
    )
    operator = torch.ops.srm.pooled_links.default
    for dyt in (of_dyt, ([],) * 3):
        arguments = (f, a, bias, *dyt, w, k, [x[0].detach()], [0], 2, 0.3, "keys", "torch")
        library.opcheck(operator, arguments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", [1, 7, 16, 1024])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (9, 13), (3, 300), (16, 16), (70, 5)])
def test_tiles_cover_every_position_once(height, width, positions):
    covered = []
    for tile in tile_steps.tiles_of(height, width, positions):
        rows, columns = range(height)[tile.rows], range(width)[tile.columns]
        covered += [y * width + x for y in rows for x in columns]
        assert covered[-tile.stop + tile.start :] == list(range(tile.start, tile.stop))
        assert tile.stop - tile.start <= positions
        assert len(columns) == width or len(rows) == 1
    assert covered == list(range(height * width))


@pytest.mark.parametrize("steps", ["torch", "csrc"], indirect=True)
def test_what_is_not_compiled_is_plain_pytorch(steps):
    """`grid_of` uses the C++ steps only for CPU tensors, and only if the library with these steps is built."""
    assert (type(grid_of(2, 2, 1, 4, torch.ones(1))) is NativeGrid) == (steps == "csrc")
    assert type(grid_of(2, 2, 1, 4, torch.ones(1, device="meta"))) is tile_steps.Grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_is_accurate_relative_to_itself(dtype):
    """The relative error is at most 2 eps. For NaN, ±infinity and 0, the result is equal to that of `torch.tanh`."""
    x = torch.cat([tokens(1, 20_000, scale=4), 10 ** tokens(2, 20_000, scale=8).clamp(-30, 2)]).to(dtype)
    grid, space = grid_of(2, 2, 1, 4, x), x.clone()
    exact = x.double().tanh()
    found = grid.squash_(space)
    assert found is space
    assert ((found - exact) / exact).abs().max() <= 2 * torch.finfo(dtype).eps
    ends = torch.tensor([math.nan, math.inf, -math.inf, 0.0], dtype=dtype)
    found = grid.squash_(ends.clone())
    assert torch.equal(found.nan_to_num(7), ends.tanh().nan_to_num(7))


@pytest.mark.parametrize("rank", [1, 7, 64, 70])
def test_logits_far_apart_or_not_finite(rank):
    """Probabilities and gradients agree with plain PyTorch for logits that are far apart or not finite.

    Exponentials that underflow are 0. A logit of NaN or infinity makes its own row of probabilities NaN.
    """
    logits = tokens(3, 2, 12, rank, scale=60).float()
    logits[0, 4, -1], logits[1, 7, 0] = math.nan, math.inf
    tile = tile_steps.tiles_of(3, 4, 12)[0]
    like, grad = logits.new_empty(0), tokens(4, 2, 2, 2 * rank).float()
    found, plain = grid_of(3, 4, 2, 12, like), tile_steps.Grid(3, 4, 2, 12, like)
    pooled = [torch.zeros(2, 2, 2 * rank) for _ in range(2)]
    by = [logits.clone() for _ in range(4)]
    for grid, probabilities, into in ((found, by[0], pooled[0]), (plain, by[1], pooled[1])):
        grid.pool(probabilities, tile, into, tile_steps.Workspace(like))
    assert torch.equal(by[0].isnan(), by[1].isnan())
    torch.testing.assert_close(by[0], by[1], rtol=1e-5, atol=1e-7, equal_nan=True)
    grads = [
        grid.pool_backward(given, tile, grad, tile_steps.Workspace(like))
        for grid, given in ((found, by[2]), (plain, by[3]))
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (9, 13), (16, 24), (3, 300)])
def test_means_of_a_map(height, width, dtype, size):
    image = tokens(5, 6, height, width, dtype=dtype)
    image[2, height // 2, width // 2] = math.nan
    grid = grid_of(height, width, size, 40, image)
    for layout in (image, image.mT.contiguous().mT):
        found = grid.pool_map(layout)
        assert found.dtype == dtype
        plain, exact = (
            adaptive_pool(image[None].to(kind), size, backend="reference")[0]
            for kind in (dtype, torch.float64)
        )
        within(found, plain, exact)


def test_the_compiled_steps_check_what_they_are_given(steps):
    if steps == "torch":
        pytest.skip("of csrc alone")
    core, logits, pooled = torch.ops.srm_cpu, torch.ones(2, 12, 5), torch.ones(2, 2, 10)
    library.opcheck(core.softmax_pool_.default, (logits, pooled, 3, 4, 2, 0, 12), test_utils="test_schema")
    library.opcheck(
        core.softmax_pool_backward_.default, (logits, pooled, 3, 4, 2, 0, 12), test_utils="test_schema"
    )
    library.opcheck(core.tanh_.default, (logits,), test_utils="test_schema")
    for arguments in (
        (logits.mT, pooled, 3, 4, 2, 0, 12),
        (logits.double(), pooled, 3, 4, 2, 0, 12),
        (logits, pooled[:1], 3, 4, 2, 0, 12),
        (logits, pooled, 3, 4, 2, 1, 13),
        (logits, pooled, 3, 4, 3, 0, 12),
    ):
        for step in (core.softmax_pool_, core.softmax_pool_backward_):
            with pytest.raises(ValueError, match="contiguous"):
                step(*arguments)
    image, means = torch.ones(3, 4, 5), torch.zeros(3, 2, 2)
    library.opcheck(core.cell_means_.default, (means, image), test_utils="test_schema")
    for given in (
        (means[:2], image),
        (means[:, :1].contiguous(), image),
        (means.double(), image),
        (means, image.mT),
    ):
        with pytest.raises(ValueError, match="contiguous"):
            core.cell_means_(*given)
    with pytest.raises(ValueError, match="contiguous"):
        core.tanh_(logits.mT)
