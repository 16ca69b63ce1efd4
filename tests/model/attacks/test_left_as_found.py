from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from attack_models import Convolutional, batch
from torch import nn

from srm_model.attacks import MSE, Drift, apgd, fgsm, pgd, square
from srm_model.attacks.guard import as_found, predict


def global_state():
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
        torch.is_grad_enabled(),
    )


def run_pgd(model):
    pgd(model, batch(), [0.5] * 4, Drift(), eps=0.1, steps=3, restarts=2)


def run_apgd(model):
    apgd(model, batch(), [0.5] * 4, Drift(), eps=0.1, steps=5, restarts=3, restart_batch=2)


def run_square(model):
    square(model, batch(), [0.5] * 4, Drift(), norm="l2", eps=0.1, queries=6)


def run_fgsm(model):
    fgsm(model, batch(), [0.5] * 4, MSE(), eps=0.1)


def run_failing(model):
    def objective(scores, mos, clean_scores):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pgd(model, batch(), [0.5] * 4, objective, eps=0.1)


def run_predict(model):
    predict(model, batch(), samples=2)


@pytest.mark.parametrize("run", [run_pgd, run_apgd, run_square, run_fgsm, run_failing, run_predict])
def test_nothing_is_left_on_the_model_or_the_process(run):
    model = Convolutional().train()
    model.norm.eval()  # frozen statistics in a training model
    model.convolution.weight.grad = torch.ones_like(model.convolution.weight)
    model.linear.bias.requires_grad_(False)
    model(batch())  # the buffers leave their initial values
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = {name: id(tensor) for name, tensor in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    asked = [parameter.requires_grad for parameter in model.parameters()]
    process = global_state()

    run(model)

    assert global_state() == process
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert torch.equal(model.convolution.weight.grad, torch.ones_like(model.convolution.weight))
    assert model.linear.weight.grad is None
    assert {name: id(tensor) for name, tensor in model.named_buffers()} == objects
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_inside_everything_is_in_evaluation_mode_and_no_weight_is_trained():
    model = Convolutional().train()
    with as_found(model, batch(), seed=0):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_generator_that_the_model_owns_is_put_back():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(5)

        def forward(self, x):
            return x.mean((1, 2, 3)) * torch.rand((), generator=self.generator)

    model = Owner()
    state = model.generator.get_state().clone()
    run_pgd(model)
    assert torch.equal(model.generator.get_state(), state)


def test_models_may_draw_from_any_global_generator_and_stay_reproducible():
    class Dice(nn.Module):
        def forward(self, x):
            draw = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
            return x.mean((1, 2, 3)) * draw

    first = predict(Dice(), batch(), samples=2, seed=1)
    random.seed(8)
    np.random.seed(8)  # noqa: NPY002
    torch.manual_seed(8)
    assert torch.equal(predict(Dice(), batch(), samples=2, seed=1), first)
    assert not torch.equal(predict(Dice(), batch(), samples=2, seed=2), first)
