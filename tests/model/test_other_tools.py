"""Test models with wrappers, sharding, adapters, the meta device, transforms of torch.func, and torch.export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from srm_model import IQAModel, SRMConfig, SRMNeck, build_model, load_model
from srm_model.attacks.suite import fingerprint
from srm_model.checkpoint import load_weights, save_model
from srm_model.modules import is_stochastic, unwrapped
from srm_model.training import train

CONFIG = SRMConfig(channels=32, heads=2, rank=4, pool_size=4, image_size=64)
NECKS = ("srm", "quadratic", "none")


def made(neck: str = "srm", config: SRMConfig = CONFIG) -> IQAModel:
    torch.manual_seed(0)
    model = build_model("test_convnext", neck=neck, config=config)
    model.calibrate(images(4))
    return model


def images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.05 + 0.9 * torch.rand(count, 3, 64, 64, generator=generator, dtype=dtype)


@pytest.fixture
def group(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def part_compiled(model: nn.Module) -> nn.Module:
    model.backbone = torch.compile(model.backbone)
    model.neck.gate = torch.compile(model.neck.gate)
    return model


WRAPPERS = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "AveragedModel of torch.compile": lambda m: torch.optim.swa_utils.AveragedModel(torch.compile(m)),
    "torch.compile of parts": part_compiled,
}


def same(model: nn.Module, other: nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_saved_as_the_model_inside(wrapper, tmp_path):
    model = made()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(model))
    save_model(wrapped, tmp_path / "m", card={})
    same(load_model(tmp_path / "m")[0], model)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.zero_()
    load_weights(wrapped, tmp_path / "m")
    assert all(
        torch.equal(one, other)
        for one, other in zip(unwrapped(wrapped).parameters(), model.parameters(), strict=True)
    )


def test_ddp_is_saved_as_the_model_inside(group, tmp_path):
    model = made()
    save_model(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), tmp_path / "m", card={})
    same(load_model(tmp_path / "m")[0], model)


def test_what_is_no_model_of_this_package_is_one_sentence(tmp_path):
    for module in (nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2))):
        with pytest.raises(
            TypeError, match=r"model is a Linear without backbone_name, .*expected an IQAModel"
        ):
            save_model(module, tmp_path / "m", card={})
    assert not (tmp_path / "m").exists()


def test_a_model_with_other_tensors_is_refused_before_anything_is_written(tmp_path):
    model = made()
    nn.utils.parametrizations.weight_norm(model.head.hidden)
    with pytest.raises(ValueError, match="merge adapters and remove parametrizations before saving"):
        save_model(model, tmp_path / "m", card={})
    assert not (tmp_path / "m").exists()


def test_training_takes_the_model_itself(tmp_path):
    for wrapped in (torch.compile(made()), nn.DataParallel(made())):
        with pytest.raises(TypeError, match="around a IQAModel; expected the model without a wrapper"):
            train(wrapped, [], [], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_attributes_are_read_through_wrappers():
    """Check that `stochastic` and the fingerprint of a wrapped model are those of the model inside.

    If `stochastic` were not found, an attack would treat a stochastic model as deterministic.
    """
    model = made(config=CONFIG.replace(kv_pool_prob=0.5, kv_pool_eval=True))
    for wrapper in ("torch.compile", "DataParallel", "AveragedModel"):
        wrapped = WRAPPERS[wrapper](model)
        assert is_stochastic(wrapped)
        assert fingerprint(wrapped) == fingerprint(model)
    assert not is_stochastic(nn.DataParallel(made()))


def test_fsdp_shards_the_model_and_saves_it_whole(group, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = made(), init_device_mesh("cpu", (1,))
    sharded = copy.deepcopy(model)
    fully_shard(sharded.neck, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    x = images()
    torch.testing.assert_close(sharded(x), model(x))
    sharded(x).sum().backward()
    save_model(sharded, tmp_path / "m", card={})
    same(load_model(tmp_path / "m")[0], model)


@pytest.mark.parametrize("whole", [True, False])
def test_weights_are_loaded_into_a_model_that_fsdp_has_sharded(group, tmp_path, whole):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, sharded, mesh = made(), build_model("test_convnext", config=CONFIG), init_device_mesh("cpu", (1,))
    save_model(model, tmp_path / "m", card={})
    fully_shard(sharded.neck, mesh=mesh)
    if whole:
        fully_shard(sharded, mesh=mesh)
    load_weights(sharded, tmp_path / "m")
    torch.testing.assert_close(sharded.eval()(images()), model.eval()(images()))
    save_model(sharded, tmp_path / "again", card={})
    same(load_model(tmp_path / "again")[0], model)


def test_a_scalar_beta_of_an_older_checkpoint_loads(tmp_path, monkeypatch):
    model = made()
    with torch.no_grad():
        for beta in model.neck.beta.values():
            beta.fill_(0.25)
    older = {
        name: value.reshape(()) if ".beta." in name else value for name, value in model.state_dict().items()
    }
    assert sum(value.dim() == 0 for name, value in older.items() if ".beta." in name) == 3
    fresh = build_model("test_convnext", config=CONFIG)
    fresh.load_state_dict(older)
    same(fresh, model)
    with monkeypatch.context() as patch:
        patch.setattr("srm_model.checkpoint._own_tensors", lambda _: (older, False))
        save_model(model, tmp_path / "older", card={})
    same(load_model(tmp_path / "older")[0], model)


@pytest.mark.parametrize(
    ("backbone", "inside"), [("test_convnext", True), ("swin_tiny_patch4_window7_224", False)]
)
def test_a_model_built_on_meta_is_whole_once_its_weights_are_loaded(backbone, inside, tmp_path):
    torch.manual_seed(0)
    config = CONFIG.replace(image_size=96)
    model = build_model(backbone, config=config)
    x = torch.rand(1, 3, 96, 96)
    save_model(model, tmp_path / "m", card={})
    with torch.device("meta"):
        empty = build_model(backbone, config=config)
    assert empty.mean.is_meta
    empty = nn.Sequential(empty).to_empty(device="cpu")[0] if inside else empty.to_empty(device="cpu")
    for buffer in (empty.mean, empty.std):
        assert buffer.isfinite().all()
    load_weights(empty, tmp_path / "m")
    assert torch.equal(empty.eval()(x), model(x))


class LoRA(nn.Module):
    """An adapter in the style of PEFT: it adds its own term to the output of a base layer.

    Its attribute `weight` is the weight of the base layer, so code that only reads `weight` misses the term.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.extra = nn.Parameter(torch.full_like(base.weight, 0.5))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(x, self.extra)


def test_an_adapter_on_the_gate_acts_and_learns():
    model = made()
    x, before = images(), made().neck_output(images()).weights
    plain = copy.deepcopy(model)
    plain.neck.gate.readouts[0].weight.data += 0.5
    model.neck.gate.readouts[0] = LoRA(model.neck.gate.readouts[0])
    output = model.neck_output(x)
    assert not torch.allclose(output.weights, before)
    torch.testing.assert_close(output.weights, plain.neck_output(x).weights)
    model(x).sum().backward()
    assert model.neck.gate.readouts[0].extra.grad.abs().sum() > 0


def test_a_parametrised_gate_acts_as_its_weight():
    model, x = made(), images()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.neck.gate.stages[0][0].weight.mul_(2)

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model.neck.gate.stages[0][0], "weight", Twice())
    with torch.no_grad():
        model.neck.gate.readouts[0].weight.fill_(0.1)
        expected.neck.gate.readouts[0].weight.fill_(0.1)
    torch.testing.assert_close(model.neck_output(x).weights, expected.neck_output(x).weights)


def test_a_gate_that_is_called_agrees_with_one_whose_weights_are_read():
    gate, maps = made().neck.gate, [torch.randn(2, 32, 4, 4) for _ in range(3)]
    with torch.no_grad():
        for readout in gate.readouts:
            readout.weight.normal_()
    torch.testing.assert_close(gate.called(maps), gate(maps))


def test_adapters_of_links_are_not_fused_past():
    neck = SRMNeck([8] * 4, CONFIG)
    pyramid = [torch.randn(1, 8, 8 // 2**i, 8 // 2**i) for i in range(4)]
    assert neck.pools(pyramid)
    link = next(iter(neck.links.values()))
    link.query = LoRA(link.query)
    assert not neck.pools(pyramid)


@pytest.mark.parametrize("neck", NECKS)
def test_derivatives_of_a_model_under_transforms(neck):
    model, x = made(neck).double(), images(dtype=torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 100
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).sum(), leaf)
    torch.testing.assert_close(grad(lambda x: model(x).sum())(x), expected, rtol=1e-6, atol=1e-10)
    slope = jvp(lambda x: model(x).sum(), (x,), (direction,))[1]
    torch.testing.assert_close(slope, (expected * direction).sum(), rtol=1e-6, atol=1e-10)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def score(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],)).sum()

    each = vmap(grad(score), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        for name, value in grad(score)(parameters, x[i]).items():
            torch.testing.assert_close(each[name][i], value, rtol=1e-6, atol=1e-10)


def test_rounded_parameters_have_derivatives_under_transforms():
    """Check derivatives under autocast, where the gate rounds its weights."""
    model, x = made(), images()
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(leaf).sum(), leaf)
        found = grad(lambda x: model(x).sum())(x)
    # Both gradients have rounding errors of bf16.
    assert (found - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("attention", ["nystrom", "full"])
def test_a_neck_exports_with_any_size(attention):
    neck = SRMNeck([8] * 4, CONFIG, attention=attention).eval()

    def pyramid(batch: int, side: int) -> list[Tensor]:
        return [torch.randn(batch, 8, side * 2**i, side * 2**i) for i in (3, 2, 1, 0)]

    batch, side = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("side", min=4, max=64)
    shapes = [{0: batch, 2: side * 2**i if i else side, 3: side * 2**i if i else side} for i in (3, 2, 1, 0)]
    program = torch.export.export(neck, (pyramid(2, 5),), dynamic_shapes=(shapes,)).module()
    for sizes in ((1, 4), (3, 6)):
        maps = pyramid(*sizes)
        torch.testing.assert_close(program(maps).fused, neck(maps).fused)
