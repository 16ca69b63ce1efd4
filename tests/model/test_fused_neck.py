"""Tests of the neck with Triton kernels against the reference neck in PyTorch.

Without a GPU, the kernels run in Triton's interpreter. `bench.neck_numerics` defines the tolerances.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from training_run import Run, agree, training_run

pytest.importorskip("triton")
from bench import neck_numerics
from bench.launches import count_launches, forward_of
from srm_kernels.neck import end_kernels, launch_rules
from srm_model import NeckOutput, SRMConfig, SRMNeck, build_model
from srm_model.attacks import MSE, fgsm
from srm_model.statistics import BatchStatistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = SRMConfig(channels=16, heads=1, rank=4, pool_size=2, image_size=32, entropy_floor=1.0)
CHANNELS = (3, 4, 5, 6)


@pytest.fixture(autouse=True)
def larger_tiles(monkeypatch):
    """Use larger tiles in the interpreter, whose time grows with the number of tiles."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch_rules, "forward_positions", lambda *a: 64)
        monkeypatch.setattr(launch_rules, "token_tile", lambda *a: launch_rules.TokenTile(64, 64, 32))
        monkeypatch.setattr(launch_rules, "backward_tile", lambda *a: (64, {}))


SQUARE = [(8, 8), (4, 4), (2, 2), (2, 2)]
by_kernels = functools.partial(neck_numerics.with_backend, backend="triton")


def make_pyramid(batch: int, grids: list[tuple[int, int]], channels=CHANNELS, seed: int = 0) -> list[Tensor]:
    return neck_numerics.make_pyramid(batch, grids, channels, seed, DEVICE)


def make_neck(config: SRMConfig, grids=SQUARE, channels=CHANNELS, seed: int = 0) -> SRMNeck:
    return neck_numerics.make_neck(config, grids, channels, seed, DEVICE)


def check(neck: SRMNeck, pyramid: list[Tensor], dtype: torch.dtype | None = None) -> None:
    """Check that the errors of a training step are within the bounds of `bench.neck_numerics`.

    `dtype` is the dtype of autocast. If it is None, autocast is off.
    """
    assert by_kernels(neck).pools(pyramid)
    wrong = {name: r for name, r in neck_numerics.ratios(neck, pyramid, dtype).items() if not r <= 1}
    assert wrong == {}


CASES = {
    "square": (TINY, SQUARE, CHANNELS, 2),
    "three to two, one image, no DyT": (
        TINY.replace(dyt=False), [(12, 8), (6, 4), (3, 2), (2, 2)], CHANNELS, 1,
    ),
    "odd, three images, heads of width 24": (
        TINY.replace(channels=48, heads=2, pool_size=3, links=((4, 2),), gate_dyt=True),
        [(7, 5), (5, 3), (3, 2), (3, 5)], CHANNELS, 3,
    ),
    "links beyond the default, pooled keys, no τ, normalised queries": (
        TINY.replace(links=((4, 1), (3, 1), (3, 2)), kv_pool_prob=1.0, tau=False, qk_norm="both"),
        [(6, 6), (5, 5), (4, 4), (4, 3)], CHANNELS, 2,
    ),
    "channels of mobilenetv3, another solver, no normalisation": (
        TINY.replace(solver="lu", qk_norm=None, landmarks="uniform", links=((4, 3),), dyt=False),
        [(3, 3), (3, 2), (2, 2), (2, 2)], (16, 40, 112, 960), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_a_training_step_is_that_of_the_reference(name, dtype):
    config, grids, channels, batch = CASES[name]
    check(make_neck(config, grids, channels), make_pyramid(batch, grids, channels), dtype)


def test_a_rank_beyond_the_kernels_is_that_of_the_keys_there_are():
    """The rank is 200, but there are only 4 keys. The kernels and the reference both use 4 landmarks."""
    check(make_neck(TINY.replace(rank=200, links=((4, 1),), dyt=False)), make_pyramid(1, SQUARE))


def test_a_grid_beyond_the_fused_kernels_takes_the_unfused_ones():
    """The pooled form has no kernels for `pool_size` = 33.

    The neck then computes its links one by one, without an error.
    """
    neck = by_kernels(make_neck(TINY.replace(links=((4, 1),), pool_size=33)).eval())
    assert not neck.pools(make_pyramid(1, SQUARE))


def test_tokens_beyond_the_fused_kernels_take_the_unfused_ones():
    """With DyT, C = 264 exceeds the limit of the fused kernels. Without DyT, C has no limit."""
    for dyt in (True, False):
        config = TINY.replace(channels=264, heads=11, links=((4, 1),), dyt=dyt, backend="triton")
        assert SRMNeck(CHANNELS, config).pools(make_pyramid(1, SQUARE)) is not dyt


def test_the_path_is_decided_by_the_dtype_that_maps_are_read_in(monkeypatch: pytest.MonkeyPatch):
    """Under autocast, the dtype of autocast and not that of the maps decides whether the neck uses the pooled form.

    The dtype matters, because some sizes are supported only in bf16.
    """
    asked = []
    neck, pyramid = by_kernels(make_neck(TINY)), make_pyramid(1, SQUARE)
    monkeypatch.setattr(
        "srm_model.neck.mixing.serves_pooled_links", lambda like, *a, **k: asked.append(like.dtype) or False
    )
    neck.pools(pyramid)
    with torch.autocast(DEVICE, torch.bfloat16):
        neck.pools(pyramid)
    assert asked == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_cap_holds_for_maps_of_any_scale(scale, dtype):
    """‖fused‖_F is at most the cap after rounding.

    The cap is half the median norm for maps of scale 1. For maps of scale 1e-4, the biases dominate ‖fused‖_F,
    which may then be below the cap.
    """
    neck = by_kernels(make_neck(TINY.replace(links=((4, 1),), gain_cap=0.5))).eval()
    with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        out = neck([scale * m for m in make_pyramid(2, SQUARE)])
    cap = float(neck.median_rms) * 0.5 * out.fused[0].numel() ** 0.5
    assert scale < 1 or (out.gain < 1).all()
    assert out.fused.isfinite().all()
    assert out.fused.double().flatten(1).norm(dim=1).max() <= cap * (1 + 2**-20)  # rounding of the cap itself


def test_backends_change_between_training_and_evaluation():
    """A neck trained with the kernels and one trained with the reference give the same maps.

    Each neck is evaluated with both backends. The tolerance is 1e-4 of the largest entry.
    """
    config, pyramid = TINY.replace(links=((4, 1),)), make_pyramid(2, SQUARE)
    neck = make_neck(config)
    scores = []
    for trained in (by_kernels(neck), copy.deepcopy(neck)):
        optimiser = torch.optim.SGD(trained.parameters(), lr=1e-2)
        out = trained(pyramid)
        (out.fused.square().mean() + sum(out.losses.values())).backward()
        optimiser.step()
        judge = SRMNeck(CHANNELS, config.replace(backend="reference")).to(DEVICE)
        judge.load_state_dict(trained.state_dict())
        for one in (judge.eval(), by_kernels(judge)):
            with torch.no_grad():
                scores.append(one(pyramid).fused)
    for other in scores[1:]:
        assert (other - scores[0]).abs().max() <= 1e-4 * scores[0].abs().max()


def test_channels_last_maps():
    config = TINY.replace(links=((4, 1),), dyt=False)
    pyramid = [m.contiguous(memory_format=torch.channels_last) for m in make_pyramid(2, SQUARE)]
    check(make_neck(config), pyramid)


@pytest.mark.parametrize("dyt", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype, dyt):
    """Errors are measured against the neck in fp64 without autocast."""
    check(make_neck(TINY.replace(links=((4, 1),), dyt=dyt)), make_pyramid(2, SQUARE), dtype)


@pytest.mark.skipif(
    DEVICE == "cuda", reason="the interpreter is counted; test_fused_neck_on_cuda counts on a GPU"
)
@pytest.mark.parametrize("dyt", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_default_schedule_takes_twelve_launches(dyt, dtype):
    """A forward pass takes at most 12 launches, not counting the six convolutions of the gate.

    Autocast adds two launches if maps and weights are in fp32: one casts the operands of products before the links, and
    the other before the gate.
    """
    neck, maps = forward_of(dyt=dyt)
    assert neck.config.links == SRMConfig().links
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        found = count_launches(lambda: neck(maps), neck.gate)
    if dtype is not None:
        assert found.others.pop("_foreach_copy") == 2, str(found)
    assert found.total <= 12, str(found)
    assert found.kernels.total() >= 8  # the launches of the fused kernels are counted
    assert found.products.total() == 1, str(found)  # the alignment of the source map
    assert found.others.total() == 0, str(found)  # no copy, no cast
    assert found.gate.total() == 6, str(found)


def test_compiled_and_checkpointed_it_is_the_same():
    """Gradient checkpointing, and compilation without graph breaks, give the same results.

    The neck is in evaluation mode, where a repeated forward pass changes no buffer.
    """
    neck, pyramid = by_kernels(make_neck(TINY.replace(links=((4, 1),))).eval()), make_pyramid(1, SQUARE)
    torch.compiler.reset()
    compiled = torch.compile(neck, fullgraph=True, backend="aot_eager")

    def run(fused: Callable[..., Tensor]) -> list[Tensor]:
        maps = [m.clone().requires_grad_() for m in pyramid]
        wanted = [*maps, neck.align[0].weight, neck.links["4to1"].query.weight]
        out = fused(*maps)
        return [out, *torch.autograd.grad(out.square().sum(), wanted)]

    expected = run(lambda *maps: neck(maps).fused)
    for other in (
        lambda *maps: compiled(maps).fused,
        lambda *maps: checkpoint(lambda *m: neck(m).fused, *maps, use_reentrant=False),
    ):
        for found, e in zip(run(other), expected, strict=True):
            torch.testing.assert_close(found, e, rtol=1e-5, atol=1e-6)


def summed(out: NeckOutput) -> Tensor:
    """Return a loss whose backward pass needs tensors computed after the neck.

    The repeated forward pass of gradient checkpointing therefore runs the whole neck and does not stop before its end.
    """
    return (out.fused * out.fused.detach().cos()).sum() + sum(out.losses.values())


def trained(neck: SRMNeck, passes: list[list[Tensor]], call: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Run a forward and a backward pass in training mode for each pyramid in `passes`.

    Return the gradients and buffers after the last pass.
    """
    neck.zero_grad()
    maps = [[m.clone().requires_grad_() for m in pyramid] for pyramid in passes]
    for number, pyramid in enumerate(maps):
        torch.manual_seed(number)
        call(*pyramid).backward()
    seen = dict(neck.named_buffers())
    seen |= {name: p.grad for name, p in neck.named_parameters() if p.grad is not None}
    return seen | {f"map {i}": m.grad for i, m in enumerate(m for pyramid in maps for m in pyramid)}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kernels_serve", [False, True])
@pytest.mark.parametrize("dyt", [False, True])
def test_checkpointed_training_steps_are_the_same(kernels_serve, reentrant, dyt):
    """Gradients and buffers after three steps are bitwise equal with and without gradient checkpointing.

    The cap is active, landmarks are sampled, keys are sometimes pooled, and the maps are computed inside the
    checkpoint. The repeated pass must draw the same random numbers and use the same σ̄ and M₀ as the first pass, and it
    must not update σ̄ and M₀ again.
    """
    config = TINY.replace(
        links=((4, 1),), dyt=dyt, gain_cap=0.5, ema=0.5, landmarks="leverage_sample", kv_pool_prob=0.5
    )
    neck = make_neck(config)
    passes = [make_pyramid(2, SQUARE, seed=seed) for seed in range(3)]
    found = []
    for repeated in (False, True):
        one = by_kernels(neck) if kernels_serve else copy.deepcopy(neck)

        def run(*maps: Tensor, one: SRMNeck = one) -> Tensor:
            out = one([m.sin() for m in maps])
            assert (out.gain < 1).all()
            return summed(out)

        def again(*maps: Tensor, run: Callable[..., Tensor] = run) -> Tensor:
            return checkpoint(run, *maps, use_reentrant=reentrant)

        found.append(trained(one, passes, again if repeated else run))
    assert found[0].keys() == found[1].keys()
    assert {name for name in found[0] if not torch.equal(found[0][name], found[1][name])} == set()


@pytest.mark.parametrize("reentrant", [False, True])
def test_another_pass_than_the_last_is_not_taken_again(reentrant):
    """With gradient checkpointing, two training passes before one backward pass are refused on a CPU.

    They are accepted if the statistics of each pass were finished before. Gradients are then bitwise equal with and
    without checkpointing. There is one exception: reentrant checkpointing sums the gradients of a weight over the two
    passes in another order, so that the gradients of parameters are compared with a tolerance.
    """
    neck = make_neck(TINY.replace(links=((4, 1),), gain_cap=0.5))
    batches = [make_pyramid(2, SQUARE, seed=seed) for seed in range(2)]

    def gradients(given: list[BatchStatistics], call: Callable[..., Tensor]) -> list[Tensor | None]:
        maps = [[m.clone().requires_grad_() for m in pyramid] for pyramid in batches]
        losses = [
            call(lambda *m, s=s: summed(neck(m, statistics=s)), *pyramid)
            for s, pyramid in zip(given, maps, strict=True)
        ]
        neck.zero_grad()
        sum(losses).backward()
        return [m.grad for pyramid in maps for m in pyramid] + [p.grad for p in neck.parameters()]

    def again(run: Callable[..., Tensor], *maps: Tensor) -> Tensor:
        return checkpoint(run, *maps, use_reentrant=reentrant)

    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="one forward pass before each backward pass"):
            gradients([None, None], again)
    given = [BatchStatistics() for _ in batches]
    with torch.no_grad():
        for s, pyramid in zip(given, batches, strict=True):
            neck(pyramid, statistics=s)
            s.finish()
    found = gradients(given, again), gradients(given, lambda run, *maps: run(*maps))
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        if reentrant and number >= 2 * len(SQUARE) and one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        else:
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("kernels_serve", [False, True])
def test_a_checkpointed_training_step_with_finished_statistics_is_the_same(kernels_serve):
    """With finished statistics and an active cap, gradient checkpointing gives bitwise equal gradients.

    The gradients of compiled steps are equal up to rounding. At the end, `track` updates M₀.
    """
    neck = make_neck(TINY.replace(links=((4, 1),), dyt=False, gain_cap=0.5))
    neck = by_kernels(neck) if kernels_serve else neck
    pyramid = make_pyramid(2, SQUARE)
    statistics = BatchStatistics()
    with torch.no_grad():
        assert (neck(pyramid, statistics=statistics).gain < 1).all()
    statistics.finish()
    torch.compiler.reset()
    compiled = torch.compile(neck, fullgraph=True, backend="aot_eager")

    def run(*maps: Tensor, one: Callable[..., NeckOutput] = neck) -> Tensor:
        return summed(one(maps, statistics=statistics))

    def again(*maps: Tensor) -> Tensor:
        return checkpoint(run, *maps, use_reentrant=False)

    inside = functools.partial(checkpoint, functools.partial(run, one=compiled), use_reentrant=False)
    found = []
    for call in (run, again, inside, torch.compile(again, fullgraph=True, backend="aot_eager")):
        maps = [m.clone().requires_grad_() for m in pyramid]
        neck.zero_grad()
        call(*maps).backward()
        found.append([m.grad for m in maps] + [p.grad for p in neck.parameters()])
    plain, repeated, *compiled_ones = found
    assert all(
        one is other is None or torch.equal(one, other) for one, other in zip(plain, repeated, strict=True)
    )
    for others in compiled_ones:
        for one, other in zip(plain, others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    before = neck.median_rms.clone()
    neck.track(statistics)
    assert neck.median_rms != before


def test_the_pyramid_on_request_agrees_with_the_fused_path():
    neck = by_kernels(make_neck(TINY.replace(links=((4, 1),))).eval())
    pyramid = make_pyramid(2, SQUARE)
    with torch.no_grad():
        fast, slow = neck(pyramid).fused, neck(pyramid, return_pyramid=True).fused
    assert (fast - slow).abs().max() <= 64 * torch.finfo(torch.float32).eps * slow.abs().max()


def test_three_steps_of_training_follow_the_reference():
    """Losses agree with a relative tolerance of 1e-4.

    AdamW divides each gradient by its recent magnitude, so it amplifies the rounding errors of small gradients.
    """
    config = TINY.replace(links=((4, 1),))
    losses = []
    neck = make_neck(config)
    for one in (neck, by_kernels(neck)):
        optimiser = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for seed in range(3):
            out = one(make_pyramid(2, SQUARE, seed=seed))
            loss = out.fused.square().mean() + sum(out.losses.values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            one.clamp_()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4)


def test_a_training_run_ends_where_the_references_does(monkeypatch: pytest.MonkeyPatch):
    """Runs with both backends agree within the tolerances of `training_run`. A run with another seed does not."""
    config = TINY.replace(links=((4, 1),), dyt=False)
    launches: Counter[str] = Counter()
    launcher = type(
        end_kernels._merge_links_kernel
    )  # Triton's JIT class on a GPU, its interpreter's class otherwise
    plain_run = launcher.run

    def counted_run(kernel: Any, *args: Any, **options: Any) -> Any:
        launches[kernel.fn.__name__] += 1
        return plain_run(kernel, *args, **options)

    monkeypatch.setattr(launcher, "run", counted_run)

    def trained_by(backend: str, seed: int) -> Run:
        launches.clear()
        return training_run(
            backend, config, (8, 8, 8, 8), steps=8, side=8, device=DEVICE, lr=1e-2, batch=4, held_out=24,
            seed=seed,
        )  # fmt: skip

    found = trained_by("triton", 0)
    assert launches["_merge_links_kernel"] == 8 + 1  # one for each step and one for the evaluation
    plain = trained_by("reference", 0)
    assert launches.total() == 0
    other = trained_by("reference", 1)
    agree(found, plain)
    with pytest.raises(AssertionError):
        agree(other, plain)


def test_micro_batches_give_the_statistic_of_the_whole_batch():
    """σ̄ and M₀ of the kernels on two halves of a batch equal those of the reference on the whole batch."""
    config = TINY.replace(links=((4, 1),), dyt=False)
    neck, pyramid = make_neck(config), make_pyramid(4, SQUARE)
    with torch.no_grad():
        neck(pyramid)
        fused = by_kernels(make_neck(config))
        statistics = BatchStatistics()
        for half in (slice(0, 2), slice(2, 4)):
            fused([m[half] for m in pyramid], statistics=statistics)
        statistics.finish()
        fused.track(statistics)
    for (name, found), (_, expected) in zip(fused.named_buffers(), neck.named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("dyt", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_a_training_step_keeps_is_maps_the_key_side_and_the_grid(dtype, layout, dyt):
    """Of stage 1, a training step saves only the input map, which has three channels.

    This also holds under autocast if the maps have the dtype of autocast. After its alignment, the map of stage 1 has
    32×24 positions and 16 channels. All other saved tensors together, including cast weights, are smaller than half of
    this aligned map.
    """
    neck = by_kernels(make_neck(TINY.replace(links=((4, 1),), dyt=dyt)))
    pyramid = make_pyramid(1, [(32, 24), (2, 2), (2, 2), (2, 2)])
    pyramid = [m.to(dtype or m.dtype).contiguous(memory_format=layout).requires_grad_() for m in pyramid]
    kept: dict[int, Tensor] = {}
    with (
        torch.autocast(DEVICE, dtype, enabled=dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ),
    ):
        neck(pyramid)
    given = {t.untyped_storage().data_ptr() for t in (*pyramid, *neck.parameters())}
    assert pyramid[0].untyped_storage().data_ptr() in kept
    rest = [t for place, t in kept.items() if place not in given]
    assert max(t.numel() for t in rest) < 32 * 24
    assert sum(t.numel() for t in rest) < 32 * 24 * 16 / 2


def test_a_model_of_kernels_trains_and_is_attacked():
    """Scores and the direction of an FGSM step match the reference, and the same parameters have gradients."""
    config = TINY.replace(links=((4, 1),))
    torch.manual_seed(0)
    plain = build_model("test_convnext", config=config.replace(backend="reference")).to(DEVICE)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    model = build_model("test_convnext", config=config.replace(backend="triton")).to(DEVICE)
    model.load_state_dict(plain.state_dict())
    steps = []
    for one in (plain, model):
        scores, losses = one.train()(images, return_losses=True)
        (scores.square().sum() + sum(losses.values())).backward()
        adversarial = fgsm(one, images, torch.tensor([0.5], device=DEVICE), MSE(), eps=1 / 255)
        trained = {name for name, p in one.named_parameters() if p.grad is not None}
        steps.append((scores.detach(), adversarial - images, trained))
    torch.testing.assert_close(steps[1][0], steps[0][0], rtol=1e-4, atol=1e-5)
    assert steps[1][2] == steps[0][2]
    assert (steps[1][1].sign() == steps[0][1].sign()).float().mean() > 0.999
