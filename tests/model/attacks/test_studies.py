from __future__ import annotations

import pytest
import torch
from attack_models import Convolutional, Linear, weight
from test_suite import CONFIG, Images, linear, run

from srm_model.attacks import MSE, Attack, Suite, sweep_eps, sweep_steps, transfer
from srm_model.attacks.suite import Job
from srm_model.metrics import LogisticMap, plcc


def test_transfer_has_every_direction_and_the_suites_white_box_attack():
    models = {"a": linear(), "b": linear(3), "c": Convolutional()}
    dataset = Images()
    logistic = LogisticMap.fit(linear()(dataset.images).detach(), dataset.mos)
    found = transfer(
        models, dataset, norm="linf", eps=4 / 255, config=CONFIG, batch_size=4, logistics={"a": logistic}
    )
    pairs = {(pair["source"], pair["target"]): pair for pair in found["pairs"]}
    assert len(pairs) == 9
    suite = run(linear(), dataset, surrogate=linear(3))
    assert found["clean"]["a"]["scores"] == suite.clean["scores"]
    assert pairs["a", "a"]["scores"] == suite.attacks["pgd_mse"]["scores"]
    assert pairs["a", "a"]["plcc"] == plcc(logistic(pairs["a", "a"]["scores"]), dataset.mos)
    errors = {
        source: (torch.tensor(pairs[source, "a"]["scores"]) - torch.tensor(dataset.mos)).square().mean()
        for source in "abc"
    }
    assert errors["a"] > max(errors["b"], errors["c"])
    # A perturbation crafted on b changes a's score by at most ε⟨sign w_b, w_a⟩.
    moved = torch.tensor(pairs["b", "a"]["scores"]) - torch.tensor(found["clean"]["a"]["scores"])
    reach = 4 / 255 * (models["a"].weight * models["b"].weight.sign()).sum().abs()
    assert moved.abs().max() <= reach + 1e-5
    with pytest.raises(ValueError, match="models has 1 entries; a transfer needs at least two"):
        transfer({"a": linear()}, dataset, norm="linf", eps=0.1)


class Flat(torch.nn.Module):
    """A model whose scores are rounded, so that its gradient is zero."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (
            (images.mean((1, 2, 3)) * 0).detach()
            + images.sum((1, 2, 3)).round() / 100
            + 0 * images.sum((1, 2, 3))
        )


def test_a_transfer_says_where_there_was_no_gradient():
    with pytest.warns(
        UserWarning, match=r"flat: 100 % of its gradients were zero.* may overstate robustness"
    ):
        found = transfer(
            {"a": linear(), "flat": Flat()}, Images(), norm="linf", eps=0.01, config=CONFIG, batch_size=4
        )
    assert [doubt.partition(":")[0] for doubt in found["doubts"]] == ["flat"]
    shares = {(pair["source"], pair["target"]): pair["zero_gradients"] for pair in found["pairs"]}
    assert shares == {("a", "a"): 0, ("a", "flat"): 0, ("flat", "a"): 1, ("flat", "flat"): 1}


def test_sweeps_are_suites_at_other_settings():
    suite = Suite([Attack("pgd_mse", MSE())], CONFIG)
    rows = sweep_steps(suite, linear(), Images(), norm="linf", eps=4 / 255, steps=(1, 4), batch_size=4)
    assert [row["steps"] for row in rows] == [1, 4]
    whole = run(suite=suite)
    assert rows[1]["attacks"]["pgd_mse"]["srocc"] == whole.attacks["pgd_mse"]["srocc"]
    assert rows[1]["worst"] == whole.worst
    assert rows[0]["attacks"]["pgd_mse"]["loss"] <= rows[1]["attacks"]["pgd_mse"]["loss"]
    rows = sweep_eps(suite, linear(), Images(), norm="l2", batch_size=4)
    assert [row["eps"] for row in rows] == list(CONFIG.eps_l2)
    losses = [row["attacks"]["pgd_mse"]["loss"] for row in rows]
    assert losses == sorted(losses)
    assert sweep_steps(suite, linear(), Images(), norm="linf", eps=0.01, batch_size=4)[-1]["steps"] == 80


class Stopping(Images):
    """A dataset that allows the number of reads in `after` and then raises KeyboardInterrupt."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __getitem__(self, index: int):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().__getitem__(index)


@pytest.mark.parametrize(("study", "reads"), [("transfer", 2 + 8), ("sweep", 1 + 11 + 1 + 4)])
def test_a_stopped_study_goes_on_without_repeating(tmp_path, monkeypatch, study, reads):
    suite = Suite([Attack("pgd_mse", MSE())], CONFIG)
    common = {"norm": "linf", "eps": 4 / 255, "batch_size": 4}

    def done(dataset, **more):
        if study == "sweep":
            return sweep_steps(suite, linear(), dataset, steps=(1, 4), **common, **more)
        models = {"a": linear(), "b": Linear(weight(3))}
        return transfer(models, dataset, config=CONFIG, **common, **more)

    whole = done(Images())
    crafted = []
    craft = Job.craft
    monkeypatch.setattr(Job, "craft", lambda *arguments: crafted.append(arguments[1]) or craft(*arguments))
    with pytest.raises(KeyboardInterrupt):
        done(Stopping(reads), resume=tmp_path)
    assert len(crafted) == 4  # 6 batches in all: 3 for each of the two models or step counts
    assert done(Images(), resume=tmp_path) == whole
    assert len(crafted) == 6
    if study == "transfer":
        with pytest.raises(ValueError, match=r"made with model .* this run has"):
            transfer({"a": linear(), "b": linear(4)}, Images(), config=CONFIG, resume=tmp_path, **common)


def test_the_loss_of_a_result_is_the_mean_over_its_images():
    dataset, model = Images(), Linear(weight() * 0.1)
    result = run(model, dataset)
    errors = (torch.tensor(result.attacks["pgd_mse"]["scores"]) - torch.tensor(dataset.mos)).square()
    assert result.attacks["pgd_mse"]["loss"] == pytest.approx(errors.mean().item(), rel=1e-5)
