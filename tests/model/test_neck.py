"""Test the neck: calibration, every option of the config, and the independence of the images in a batch.

Two fp32 computations of the same tensor may differ by at most 100 eps times the largest absolute value of the tensor
(see `close`).
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from srm_model import SRMConfig, SRMNeck
from srm_model.modules import make_torchvision_importable
from srm_model.neck import PlainNeck, calibration
from srm_model.statistics import BatchStatistics

CHANNELS = (6, 8, 10, 12)
SMALL = SRMConfig(channels=32, heads=2, rank=5, pool_size=4, image_size=64)


def close(a, b, units=100):
    return bool((a - b).abs().max() <= units * torch.finfo(torch.float32).eps * b.abs().max())


def make_pyramid(batch=2, side=16, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    sizes = [max(side // 2**i, 1) for i in range(4)]
    return [
        torch.randn(batch, c, s, s + (s > 1), generator=g) * scale
        for c, s in zip(CHANNELS, sizes, strict=True)
    ]


def make_neck(config=SMALL, *, calibrate=True, seed=0, **kwargs):
    torch.manual_seed(seed)
    neck = SRMNeck(CHANNELS, config, **kwargs)
    if calibrate:
        neck.calibrate(make_pyramid(4, seed=9))
    return neck.eval()


@pytest.mark.parametrize("scale", [0.2, 1.0, 10.0])
def test_calibration_makes_the_mechanism_act_whatever_the_backbones_scale(scale):
    pyramid = make_pyramid(4, scale=scale)
    torch.manual_seed(0)
    neck = SRMNeck(CHANNELS, SMALL).eval()
    neck.calibrate(pyramid)
    report = neck.diagnose(pyramid)
    for link in report["links"].values():
        assert link["attention_entropy"]["median"] < 0.97
        assert 0.8 < link["logit_std"]["median"] < 1.25
        assert link["kappa"]["p90"] <= SMALL.rank * (1 + 1e-3) / (
            1e-3 / SMALL.rank
        )  # docs/METHOD.md §2.1, λ ≥ λ₀/r
    assert all(ratio >= 0.1 for ratio in report["update_ratio"].values())
    assert report["gate_weights"] == pytest.approx([1 / 3] * 3, abs=1e-6)
    for stage, conv in enumerate(neck.align):
        assert conv(pyramid[stage]).square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    assert neck.median_rms.isfinite()


@pytest.mark.parametrize("attention", ["nystrom", "full"])
def test_calibration_in_pieces_is_the_same(attention, monkeypatch):
    whole = make_neck(attention=attention)
    monkeypatch.setattr(calibration, "MOST_LOGITS", 500)
    largest = []

    def logits(Q, K, made=calibration.logits):
        largest.append(made(Q, K).numel())
        return made(Q, K)

    monkeypatch.setattr(calibration, "logits", logits)
    pieces = make_neck(attention=attention)
    assert len(largest) > len(SMALL.links)
    assert max(largest) <= 500
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(pieces.state_dict()[name], value)


def test_calibration_sets_sigma_to_its_reference():
    pyramid = make_pyramid(4)
    neck = make_neck(calibrate=False)
    neck.calibrate(pyramid)
    neck.train()(pyramid)
    for link in neck.links.values():
        assert torch.allclose(link.sigma, torch.full_like(link.sigma, math.sqrt(SMALL.head_dim)), rtol=1e-4)


def test_uncalibrated_neck_is_the_inert_one_the_calibration_is_for():
    pyramid = make_pyramid(4)
    report, calibrated = (make_neck(calibrate=flag).diagnose(pyramid) for flag in (False, True))
    assert all(link["attention_entropy"]["median"] > 0.97 for link in report["links"].values())
    for stage, ratio in report["update_ratio"].items():
        assert 4 * ratio < calibrated["update_ratio"][stage]


@pytest.mark.parametrize("links", [SMALL.links, ((3, 1), (2, 1)), ((4, 1), (3, 1), (4, 2)), ()])
@pytest.mark.parametrize("attention", ["nystrom", "full"])
def test_pooling_first_equals_the_full_resolution_pyramid(links, attention):
    neck = make_neck(SMALL.replace(links=links), attention=attention)
    pyramid = make_pyramid()
    fast, slow = neck(pyramid), neck(pyramid, return_pyramid=True)
    assert fast.pyramid is None
    assert [m.shape[-2:] for m in slow.pyramid] == [m.shape[-2:] for m in pyramid]
    assert close(fast.fused, slow.fused)


def test_a_stage_without_an_incoming_link_is_only_aligned():
    neck = make_neck(SMALL.replace(links=((4, 2),)))
    pyramid = make_pyramid()
    updated = neck(pyramid, return_pyramid=True).pyramid
    for stage in (1, 3, 4):
        assert torch.equal(updated[stage - 1], neck.align[stage - 1](pyramid[stage - 1]))
    assert not close(updated[1], neck.align[1](pyramid[1]))


def test_every_link_reads_the_aligned_maps_never_an_updated_one():
    chain = make_neck(SMALL.replace(links=((4, 3), (3, 1))))
    only = make_neck(SMALL.replace(links=((3, 1),)), calibrate=False)
    only.load_state_dict(chain.state_dict(), strict=False)
    pyramid = make_pyramid()
    assert torch.equal(
        chain(pyramid, return_pyramid=True).pyramid[0], only(pyramid, return_pyramid=True).pyramid[0]
    )


def test_beta_zero_switches_the_mixing_off():
    neck = make_neck()
    pyramid = make_pyramid()
    before = neck(pyramid).fused
    with torch.no_grad():
        for beta in neck.beta.values():
            beta.zero_()
    none = make_neck(SMALL.replace(links=()), calibrate=False)
    none.load_state_dict(neck.state_dict(), strict=False)
    assert close(neck(pyramid).fused, none(pyramid).fused)
    assert not close(before, none(pyramid).fused)


def test_rank_of_all_keys_without_ridge_is_the_quadratic_neck():
    config = SMALL.replace(rank=64, ridge=0.0, solver="lu")
    nystrom, full = make_neck(config), make_neck(config, attention="full", calibrate=False)
    full.load_state_dict(nystrom.state_dict())
    pyramid = make_pyramid()
    assert torch.allclose(nystrom(pyramid).fused, full(pyramid).fused, rtol=1e-3, atol=1e-4)


def test_one_image_alone_and_in_any_batch():
    neck = make_neck()
    pyramid = [m.requires_grad_() for m in make_pyramid(3)]
    together = neck(pyramid).fused
    for i in range(3):
        alone = neck([m[i : i + 1] for m in pyramid]).fused
        assert close(alone[0], together[i])
    gradients = torch.autograd.grad(together[1].square().sum(), pyramid)
    for gradient in gradients:
        assert gradient[1].abs().max() > 0
        assert not gradient[[0, 2]].any()


@pytest.mark.parametrize(
    "changes",
    [
        {"dyt": False},
        {"gate_dyt": True},
        {"tau": False},
        {"gain_cap": None},
        {"qk_norm": None},
        {"qk_norm": "both"},
        {"solver": "lu"},
        {"solver": "svd"},
        {"solver": "auto"},
        {"solver": "neumann"},
        {"solver": "neumann", "neumann_gate": False},
        {"equilibrate": True},
        {"landmarks": "uniform"},
        {"landmarks": "leverage_sample"},
        {"landmarks": "kmeans++"},
        {"landmarks": "pivoted_cholesky"},
        {"kv_pool_prob": 1.0},
        {"fused_stages": (2, 4)},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_every_switch_trains_and_every_parameter_gets_a_gradient(changes):
    config = SMALL.replace(**changes)
    neck = make_neck(config, calibrate=False)
    neck.calibrate(make_pyramid(4))
    neck.train()
    out = neck(make_pyramid(3))
    weight = torch.linspace(-1, 1, out.fused[0].numel()).view_as(out.fused[0])
    (out.fused * weight).square().sum().add(sum(out.losses.values())).backward()
    acting = [link for link in config.links if link[1] in config.fused_stages]
    used = {stage for link in acting for stage in link} | set(config.fused_stages)
    idle = {f"links.{s}to{t}." for s, t in config.links if (s, t) not in acting}
    idle |= {f"beta.{t}" for _, t in config.links if t not in config.fused_stages}
    idle |= {f"align.{stage - 1}." for stage in (1, 2, 3, 4) if stage not in used}
    for name, parameter in neck.named_parameters():
        if name.startswith(tuple(idle)):
            continue
        if "gate.stages" in name:
            # The readouts of the gate are initialised to zero, so no gradient reaches the stages of the gate.
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        zero_at_start = config.qk_norm is None and "theta" in name
        assert zero_at_start or parameter.grad.abs().max() > 0, name


def test_theta_receives_only_the_tau_loss_from_tau_and_the_statistic_none():
    neck = make_neck().train()
    out = neck(make_pyramid(3))
    with torch.no_grad():
        for link in neck.links.values():
            link.sigma.mul_(2)
    neck.zero_grad()
    neck.tau_loss(BatchStatistics()).backward()
    with_gradient = [name for name, p in neck.named_parameters() if p.grad is not None]
    assert with_gradient == [f"links.{name}.theta" for name in neck.links]
    # The loss is the mean of (log(τσ̄/σ_ref))² over L links and H heads. At τ = 1, its derivative with respect to
    # each log τ is 2·log(σ̄/σ_ref) / (L H).
    link = neck.links["4to1"]
    expected = 2 * (link.sigma / math.sqrt(SMALL.head_dim)).log() / (SMALL.heads * len(neck.links))
    assert link.theta.grad.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert expected.abs().min() > 0.1
    assert set(out.losses) == {"tau", "entropy", "balance"}


def test_clamp_keeps_tau_in_its_range():
    neck = make_neck()
    with torch.no_grad():
        neck.links["4to3"].theta.copy_(torch.tensor([-9.0, 9.0]))
    neck.clamp_()
    assert neck.links["4to3"].tau().tolist() == pytest.approx([1 / 16, 16])


def test_statistics_move_in_training_only_by_the_stated_average():
    neck = make_neck().train()
    neck(make_pyramid(3, seed=1))
    link = neck.links["4to2"]
    first, m0 = link.sigma.clone(), neck.median_rms.clone()
    pyramid = make_pyramid(3, seed=2, scale=3.0)
    probe = make_neck()
    probe.load_state_dict(neck.state_dict())
    probe.train()
    probe.links["4to2"].sigma_started.fill_(False)
    probe(pyramid)
    fresh = probe.links["4to2"].sigma  # the batch's own σ
    neck(pyramid)
    assert torch.allclose(link.sigma, 0.99 * first + 0.01 * fresh, rtol=1e-5)
    assert neck.median_rms > m0
    frozen = {name: value.clone() for name, value in neck.named_buffers()}
    neck.eval()(make_pyramid(3, seed=3, scale=9.0))
    assert all(torch.equal(value, frozen[name]) for name, value in neck.named_buffers())


def test_statistics_that_are_not_finite_are_left_out():
    neck = make_neck().train()
    neck(make_pyramid(3, seed=1))
    link = neck.links["4to2"]
    before, m0 = link.sigma.clone(), neck.median_rms.clone()
    statistics = BatchStatistics()
    statistics.sigma = {"4to2": torch.tensor([math.nan, 1.0])}
    statistics.norms = torch.full((3,), math.inf)
    neck.track(statistics)
    assert link.sigma[0] == before[0]
    assert link.sigma[1] == pytest.approx(0.99 * float(before[1]) + 0.01)
    assert neck.median_rms == m0
    link.sigma_started.fill_(False)
    neck.track(statistics)
    assert not link.sigma_started


def test_the_cap_leaves_typical_images_alone_and_binds_on_grown_ones():
    neck = make_neck()
    pyramid = make_pyramid(4, seed=9)
    plain = neck(pyramid)
    assert (plain.gain == 1).all()
    cap = SMALL.gain_cap * neck.median_rms * math.sqrt(plain.fused[0].numel())
    assert close(plain.fused.flatten(1).norm(dim=1), plain.norm)
    grown = neck([3 * m for m in pyramid])
    assert (grown.gain < 1).all()
    assert (grown.norm > cap).all()
    assert (grown.fused.flatten(1).norm(dim=1) <= cap * (1 + 1e-6)).all()
    free = make_neck(SMALL.replace(gain_cap=None), calibrate=False)
    free.load_state_dict(neck.state_dict())
    assert (free([3 * m for m in pyramid]).gain == 1).all()


def test_stochastic_pooling_draws_once_per_source_in_training_only():
    config = SMALL.replace(kv_pool_prob=0.5)
    neck = make_neck(config)
    pyramid = make_pyramid(2)
    assert not neck.stochastic
    assert torch.equal(neck(pyramid).fused, neck(pyramid).fused)
    neck.train()
    torch.manual_seed(0)
    kinds = {tuple(neck(pyramid).fused.flatten()[:4].tolist()) for _ in range(12)}
    assert len(kinds) == 2  # all three links share one source, which is pooled or not
    noisy = make_neck(config.replace(kv_pool_eval=True))
    assert noisy.stochastic
    torch.manual_seed(0)
    assert len({tuple(noisy(pyramid).fused.flatten()[:4].tolist()) for _ in range(12)}) == 2


def test_leverage_sampling_varies_in_training_and_is_plain_leverage_in_evaluation():
    sampled = make_neck(SMALL.replace(landmarks="leverage_sample"))
    plain = make_neck(SMALL.replace(landmarks="leverage"), calibrate=False)
    plain.load_state_dict(sampled.state_dict())
    pyramid = make_pyramid(side=32)
    assert torch.equal(sampled(pyramid).fused, plain(pyramid).fused)
    sampled.train()
    torch.manual_seed(0)
    one, two = sampled(pyramid).fused, sampled(pyramid).fused
    torch.manual_seed(0)
    assert not torch.equal(one, two)
    assert torch.equal(one, sampled(pyramid).fused)


def test_diagnose_and_calibrate_leave_modes_and_statistics_as_found():
    neck = make_neck().train()
    neck.links["4to1"].eval()
    before = {name: value.clone() for name, value in neck.state_dict().items()}
    neck.diagnose(make_pyramid())
    assert all(torch.equal(value, before[name]) for name, value in neck.state_dict().items())
    assert neck.training
    assert not neck.links["4to1"].training


def test_maps_smaller_than_the_grid_and_odd_sizes():
    neck = make_neck()
    for side in (8, 11, 24):
        sizes = [max(math.ceil(side / 2**i), 1) for i in range(4)]
        pyramid = [torch.randn(1, c, s, s) for c, s in zip(CHANNELS, sizes, strict=True)]
        out = neck(pyramid)
        assert out.fused.shape == (1, 32, 4, 4)
        assert close(out.fused, neck(pyramid, return_pyramid=True).fused)


@pytest.mark.parametrize("kind", ["count", "channels", "batch", "nan", "rank", "empty"])
def test_bad_pyramids_are_one_sentence(kind):
    neck = make_neck()
    pyramid = make_pyramid()
    if kind == "count":
        pyramid = pyramid[:3]
    elif kind == "channels":
        pyramid[2] = pyramid[2][:, :4]
    elif kind == "batch":
        pyramid[1] = pyramid[1][:1]
    elif kind == "nan":
        pyramid[3][0, 0, 0, 0] = float("nan")
    elif kind == "rank":
        pyramid[0] = pyramid[0][0]
    else:
        pyramid = [m[:0] for m in pyramid]
    with pytest.raises(ValueError, match=r"pyramid has|stage") as caught:
        neck(pyramid)
    assert "\n" not in str(caught.value)


def test_bad_arguments_of_the_neck_itself():
    with pytest.raises(ValueError, match="in_channels has 3 entries"):
        SRMNeck(CHANNELS[:3], SMALL)
    with pytest.raises(ValueError, match=r"attention='linear'"):
        SRMNeck(CHANNELS, SMALL, attention="linear")
    with pytest.raises(NotImplementedError, match=r"'triton' cannot run"):
        SRMNeck(CHANNELS, SMALL.replace(backend="triton")).double()([m.double() for m in make_pyramid()])


def test_plain_neck_passes_the_deepest_stage_on():
    neck = PlainNeck(CHANNELS, SMALL)
    pyramid = make_pyramid()
    neck.calibrate(pyramid)
    out = neck(pyramid)
    expected = torch.nn.functional.adaptive_avg_pool2d(neck.align(pyramid[3]), 4)
    assert torch.equal(out.fused, expected)
    assert neck.align(pyramid[3]).square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    assert {name: float(loss) for name, loss in out.losses.items()} == {"tau": 0, "entropy": 0, "balance": 0}


# Uncalibrated necks, and weight averages of such necks


def gradients_of(neck, pyramid):
    maps = [m.clone().requires_grad_() for m in pyramid]
    out = neck(maps)
    weigh = torch.linspace(-1, 2, out.fused.numel()).view_as(out.fused)
    return torch.autograd.grad((out.fused * weigh).sum(), [*maps, *neck.align.parameters()])


@pytest.mark.parametrize("attention", ["nystrom", "full"])
def test_without_calibration_gradients_are_those_without_a_cap(attention):
    neck = make_neck(calibrate=False, attention=attention)
    free = make_neck(SMALL.replace(gain_cap=None), calibrate=False, attention=attention)
    pyramid = make_pyramid()
    assert (neck(pyramid).gain == 1).all()
    for found, expected in zip(gradients_of(neck, pyramid), gradients_of(free, pyramid), strict=True):
        assert torch.equal(found, expected)
        assert found.abs().max() > 0


def test_training_without_calibration_warns_once():
    neck, pyramid = make_neck(calibrate=False), make_pyramid()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neck(pyramid)  # evaluation of fresh weights must not warn
        make_neck().train()(pyramid)
    neck.train()
    with pytest.warns(UserWarning, match="never calibrated"):
        neck(pyramid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neck(pyramid)


COMPILED = {
    "the neck whole": lambda neck: torch.compile(neck, backend="eager", fullgraph=True),
    "a function around it": lambda neck: torch.compile(lambda pyramid: neck(pyramid), backend="eager"),
}


@pytest.mark.parametrize("around", COMPILED)
def test_compiled_training_without_calibration_warns_too(around):
    torch._dynamo.reset()
    for calibrate in (True, False):
        neck, pyramid = make_neck(calibrate=calibrate).train(), make_pyramid()
        compiled = COMPILED[around](neck)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            compiled(pyramid)
            compiled([m[:1] for m in pyramid])  # traced again
            neck(pyramid)
        told = [str(w.message) for w in said if "never calibrated" in str(w.message)]
        assert len(told) == (0 if calibrate else 1)


def test_an_uncalibrated_neck_can_be_exported(recwarn):
    neck, pyramid = make_neck(calibrate=False).eval(), make_pyramid()
    for strict in (True, False):
        torch.export.export(neck, (pyramid,), strict=strict)
    assert not [w for w in recwarn if "never calibrated" in str(w.message)]


def averages():
    make_torchvision_importable()
    timm = pytest.importorskip("timm.utils")
    swa = torch.optim.swa_utils
    ema = swa.get_ema_multi_avg_fn(0.9)
    return {
        "timm 2": (lambda m: timm.ModelEmaV2(m, decay=0.9), "update"),
        "timm 3": (lambda m: timm.ModelEmaV3(m, decay=0.9), "update"),
        "swa": (lambda m: swa.AveragedModel(m, use_buffers=True), "update_parameters"),
        "ema": (lambda m: swa.AveragedModel(m, use_buffers=True, multi_avg_fn=ema), "update_parameters"),
    }


@pytest.mark.parametrize("kind", ["timm 2", "timm 3", "swa", "ema"])
@pytest.mark.parametrize("first", [True, False], ids=["begun before", "updated before"])
def test_an_average_begun_before_calibration_scores_and_has_gradients(kind, first):
    make, update = averages()[kind]
    neck, pyramid = make_neck(calibrate=False), make_pyramid(4, seed=9)
    average = make(neck)
    if not first:
        getattr(average, update)(neck)
    neck.calibrate(pyramid)
    neck.train()
    for _ in range(3):
        neck(pyramid)
        getattr(average, update)(neck)
    copy = average.module.eval()
    assert all(buffer.isfinite().all() for buffer in copy.buffers())
    assert copy(pyramid).fused.isfinite().all()
    assert (copy(pyramid).gain == 1).all()  # the averaged M₀ starts so large that the cap does not act
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients_of(copy, pyramid))
    for name, link in copy.diagnose(pyramid)["links"].items():
        assert link["sigma_before_tau"] == pytest.approx(
            neck.diagnose(pyramid)["links"][name]["sigma_before_tau"], rel=1e-4
        )


def test_an_average_comes_to_the_cap_of_the_weights():
    neck, pyramid = make_neck(calibrate=False), make_pyramid(4, seed=9)
    make, update = averages()["timm 3"]
    average = make(neck)
    neck.calibrate(pyramid)
    for _ in range(200):
        getattr(average, update)(neck)
    assert average.module.median_rms == pytest.approx(float(neck.median_rms), rel=1e-4)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("stored", [math.inf, math.nan])
def test_a_state_of_earlier_versions_loads_as_not_started(stored, assign):
    neck, pyramid = make_neck(), make_pyramid(4, seed=9)
    state = make_neck(calibrate=False).state_dict()
    state["median_rms"] = torch.tensor(stored)
    for name in [name for name in state if name.endswith("sigma_started")]:
        state[name] = torch.tensor(False)
    before = dict(state)
    neck.load_state_dict(state, assign=assign)
    assert all(state[name] is value for name, value in before.items())
    assert not neck.calibrated
    assert neck(pyramid).fused.isfinite().all()
    neck.train()(pyramid)
    assert neck.calibrated
    median = neck(pyramid).norm.detach().median() / math.sqrt(32 * 16)
    assert neck.median_rms == pytest.approx(float(median), rel=0.1)  # the first training batch sets M₀
    assert all(link.sigma_started == 1 for link in neck.links.values())
