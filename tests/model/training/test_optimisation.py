from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from torch import nn
from toy import CONFIG, ToyModel

from srm_model.training.batches import epoch_batches
from srm_model.training.optimisation import autocast_dtype, lr_factor, parameter_groups, warmup_steps


def test_groups_have_their_rates_and_spare_norms_biases_and_scalars():
    model = ToyModel()
    model.backbone.append(nn.LayerNorm(4))
    model.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(3, 3))
    config = CONFIG.replace(lr_backbone=1e-3, lr_neck=1e-2, weight_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        group["name"]: (group["lr"], group["weight_decay"], {names[id(p)] for p in group["params"]})
        for group in parameter_groups(model, config)
    }
    assert found == {
        "backbone": (1e-3, 0.5, {"backbone.0.weight"}),
        "backbone_no_decay": (
            1e-3,
            0.0,
            {
                "backbone.0.bias",
                "backbone.3.weight",
                "backbone.3.bias",
                "backbone.relative_position_bias_table",
            },
        ),
        "neck": (1e-2, 0.5, {"neck.weight", "head.weight"}),
        "neck_no_decay": (1e-2, 0.0, {"tau", "neck.bias", "head.bias"}),
    }


def test_frozen_parameters_are_in_no_group():
    model = ToyModel()
    model.backbone.requires_grad_(False)
    assert {group["name"] for group in parameter_groups(model, CONFIG)} == {"neck", "neck_no_decay"}


def test_schedule_warms_up_linearly_and_decays_by_a_cosine():
    factors = [lr_factor(step, steps=12, warmup=4) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in pairwise(factors[4:]))
    assert lr_factor(12, steps=12, warmup=4) == 0
    assert lr_factor(0, steps=12, warmup=0) == 1


def test_warmup_takes_at_most_a_quarter_of_the_run():
    assert warmup_steps(CONFIG.replace(epochs=120, warmup_epochs=5), 10) == 50
    assert warmup_steps(CONFIG.replace(epochs=4, warmup_epochs=5), 10) == 10
    assert warmup_steps(CONFIG.replace(epochs=1, warmup_epochs=0), 10) == 0


def test_auto_precision_is_full_on_the_cpu():
    assert autocast_dtype("auto", torch.device("cpu")) is None
    assert autocast_dtype("bf16", torch.device("cpu")) is torch.bfloat16


def test_batches_are_a_function_of_seed_and_epoch():
    batches = epoch_batches(10, 4, seed=1, epoch=2)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(chain(*batches)) == list(range(10))
    assert batches == epoch_batches(10, 4, seed=1, epoch=2)
    assert batches != epoch_batches(10, 4, seed=1, epoch=3) != epoch_batches(10, 4, seed=2, epoch=3)


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(9, 4, [4, 4]), (1, 4, [1]), (2, 1, [1, 1])])
def test_a_single_left_over_image_is_skipped(count: int, batch_size: int, sizes: list[int]):
    assert [len(batch) for batch in epoch_batches(count, batch_size, seed=0, epoch=0)] == sizes
