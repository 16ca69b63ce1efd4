from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from attack_models import Convolutional, Linear, Noisy, batch, weight
from safetensors.torch import save
from torch.utils.data import Subset

from srm_model.attacks import MSE, Attack, Drift, PairInversion, Suite, pgd
from srm_model.attacks.methods import ATTACK_METHODS
from srm_model.config import SRMConfig
from srm_model.files import read_json, write_json
from srm_model.metrics import LogisticMap, plcc, srocc

CONFIG = SRMConfig(attack_steps=4, attack_restarts=2, eot_samples=3, attack_queries=40)
ATTACKS = ["pgd_mse", "pgd_drift", "pgd_pair_inversion", "transfer"]


class Images:
    """An in-memory dataset whose MOS are the scores of a linear model plus noise."""

    def __init__(self, count: int = 11, side: int = 8, seed: int = 0) -> None:
        self.images = batch(count, seed=seed, side=side)
        scores = Linear(weight(side=side))(self.images).detach().double()
        noise = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.mos = (
            0.5 + (scores - scores.mean()) / (6 * scores.std(correction=0)) + 0.1 * (noise - 0.5)
        ).tolist()
        self.names = [f"image-{i:02d}.png" for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index], self.mos[index]


def linear(seed: int = 0, scale: float = 0.1) -> Linear:
    """Return a linear model. For seed 0, it is the model that the MOS come from, times `scale`."""
    return Linear(weight(seed) * scale)


def run(model=None, dataset=None, *, suite=None, **changes):
    arguments = {"norm": "linf", "eps": 4 / 255, "batch_size": 4, **changes}
    return (suite or Suite.paper(CONFIG)).run(model or linear(), dataset or Images(), **arguments)


def plain(result):
    """Serialize the result to JSON text, in which NaN equals NaN."""
    return json.dumps(result.to_dict())


def test_the_paper_suite():
    suite = Suite.paper()
    assert [attack.name for attack in suite.attacks] == ATTACKS
    assert [attack.objective for attack in suite.attacks] == [MSE(), Drift(), PairInversion(), MSE()]
    assert [attack.transfer for attack in suite.attacks] == [False, False, False, True]
    config = SRMConfig(pair_margin=0.2, pair_temperature=0.3)
    assert Suite.paper(config).attacks[2].objective == PairInversion(margin=0.2, temperature=0.3)


def test_the_extended_suite_holds_the_papers_and_is_at_least_as_strong():
    suite = Suite.extended(CONFIG)
    assert [attack.name for attack in suite.attacks[:4]] == ATTACKS
    beyond = ["pgd_raise", "pgd_lower", "pgd_soft_spearman", "apgd_mse", "apgd_pair_inversion", "square_mse"]
    assert [attack.name for attack in suite.attacks[4:]] == beyond
    paper, extended = run(), run(suite=suite)
    for name in ATTACKS[:3]:
        assert extended.attacks[name] == paper.attacks[name]
    assert extended.worst["srocc"] <= paper.worst["srocc"]
    clean = np.array(extended.clean["scores"])
    assert (np.array(extended.attacks["pgd_raise"]["scores"]) > clean).all()
    assert (np.array(extended.attacks["pgd_lower"]["scores"]) < clean).all()
    assert extended.attacks["pgd_soft_spearman"]["srocc"] < extended.clean["srocc"]


def test_scores_and_correlations_are_those_of_the_attacked_images():
    model, dataset = linear(), Images()
    result = run(model, dataset, surrogate=Convolutional())
    clean = model(dataset.images).detach()
    assert result.clean["scores"] == pytest.approx(clean.tolist(), rel=1e-5)
    assert result.mos == dataset.mos
    assert result.names == dataset.names
    assert list(result.attacks) == ATTACKS
    for entry in (result.clean, *result.attacks.values()):
        assert entry["srocc"] == srocc(entry["scores"], dataset.mos)
        assert entry["plcc"] == plcc(entry["scores"], dataset.mos)
    # For a linear model, the attack changes every score by at most ε‖w‖₁. Under pgd_mse, scores move away from the
    # MOS.
    reach = 4 / 255 * model.weight.abs().sum().item()
    moved = np.array(result.attacks["pgd_mse"]["scores"]) - result.clean["scores"]
    away = np.sign(np.array(result.clean["scores"]) - dataset.mos)
    assert moved == pytest.approx(away * reach, rel=1e-3)
    assert np.abs(result.attacks["pgd_drift"]["scores"] - np.array(result.clean["scores"])) == pytest.approx(
        np.full(11, reach), rel=1e-3
    )


def test_worst_is_the_minimum_over_the_attacks_for_each_metric():
    result = run(surrogate=linear(seed=3))
    for metric in ("srocc", "plcc"):
        values = {name: entry[metric] for name, entry in result.attacks.items()}
        assert len(set(values.values())) > 1
        assert result.worst[metric] == min(values.values())
        assert values[result.worst[f"{metric}_attack"]] == result.worst[metric]
        assert result.worst[f"{metric}_drop"] == result.clean[metric] - result.worst[metric]
    assert result.worst["srocc"] < result.clean["srocc"] - 0.2


def test_pair_inversion_reverses_pairs_within_its_batches():
    dataset = Images(12)
    result = run(dataset=dataset, batch_size=4)
    attacked = torch.tensor(result.attacks["pgd_pair_inversion"]["scores"])
    for start in (0, 4, 8):
        part = slice(start, start + 4)
        mos = torch.tensor(dataset.mos[part])
        loss = PairInversion()
        assert (
            loss(attacked[part], mos, mos) > loss(torch.tensor(result.clean["scores"][part]), mos, mos) + 0.1
        )


def test_transfer_follows_the_surrogate_and_is_scored_on_the_target():
    target, surrogate, dataset = linear(), linear(seed=3, scale=1.0), Images()
    result = run(target, dataset, surrogate=surrogate, batch_size=11)
    errors = surrogate(dataset.images).detach() - torch.tensor(dataset.mos)
    crafted = dataset.images + 4 / 255 * errors.sign()[:, None, None, None] * surrogate.weight.sign()
    assert result.attacks["transfer"]["scores"] == pytest.approx(target(crafted).tolist(), rel=1e-4)
    assert result.attacks["transfer"]["crafted_on"] == "surrogate"
    assert result.attacks["pgd_mse"]["crafted_on"] == "model"
    assert result.incomplete == []


def test_without_a_surrogate_transfer_is_left_out_and_the_result_says_so():
    result = run()
    assert list(result.attacks) == ATTACKS[:3]
    assert result.incomplete == ["transfer"]
    assert result.to_dict()["incomplete"] == ["transfer"]
    # The other attacks give the same results as in a run with a surrogate.
    assert result.attacks == {name: run(surrogate=linear(3)).attacks[name] for name in ATTACKS[:3]}


def test_l2_budgets_scale_with_the_image_and_linf_ones_do_not():
    result = run(norm="l2", eps=2.5)
    assert result.radius == 2.5 * 8 / 512
    assert result.step_size == pytest.approx(4 * result.radius / 4)
    moved = np.abs(np.array(result.attacks["pgd_mse"]["scores"]) - result.clean["scores"])
    assert moved.max() <= result.radius * linear().weight.norm().item() * (1 + 1e-5)
    assert moved.min() >= 0.9 * result.radius * linear().weight.norm().item()
    assert run().radius == 4 / 255
    assert (result.eps, result.to_dict()["eps"]) == (2.5, 2.5)


def test_eps_zero_leaves_every_score():
    for norm in ("linf", "l2"):
        result = run(norm=norm, eps=0.0, surrogate=linear(3))
        assert all(entry["scores"] == result.clean["scores"] for entry in result.attacks.values())
        assert result.worst["srocc_drop"] == 0


def test_settings_come_from_the_config_and_batches_of_eight_from_the_order(monkeypatch):
    seen = []
    genuine = ATTACK_METHODS["pgd"]

    def spy(model, images, mos, objective, **arguments):
        seen.append((len(images), arguments["steps"], arguments["restarts"], arguments["eot"]))
        return genuine.trace(model, images, mos, objective, **arguments)

    monkeypatch.setitem(ATTACK_METHODS, "pgd", genuine._replace(trace=spy))
    result = Suite.paper(CONFIG).run(linear(), Images(), norm="linf", eps=4 / 255)
    assert seen == [(8, 4, 2, 1)] * 3 + [(3, 4, 2, 1)] * 3
    assert (result.steps, result.restarts, result.batch_size, result.eot) == (4, 2, 8, 1)


def test_a_stochastic_model_is_attacked_and_scored_with_eot():
    model = Noisy(weight() * 0.1, spread=0.05)
    result = run(model, Images(4))
    # Passes for one batch: 1 clean score, restarts · (steps + 1) evaluations and 1 score for each of the 3 attacks,
    # and 1 more score of the clean images for drift. EOT repeats each pass 3 times.
    assert model.passes == 3 * (1 + 3 * (2 * 5 + 1) + 1)
    assert result.eot == 3
    assert plain(run(Noisy(weight() * 0.1, spread=0.05), Images(4))) == plain(result)


def test_the_seed_decides_and_the_global_state_does_not():
    model = Convolutional()
    first = run(model, seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert plain(run(model, seed=1)) == plain(first)
    assert torch.equal(torch.get_rng_state(), state)
    assert run(model, seed=2).attacks["pgd_mse"]["scores"] != first.attacks["pgd_mse"]["scores"]


def test_each_batch_and_attack_has_its_own_random_starts(monkeypatch):
    starts = []
    genuine = ATTACK_METHODS["pgd"]

    def spy(*arguments, generator, **more):
        starts.append(generator.initial_seed())
        return genuine.trace(*arguments, generator=generator, **more)

    monkeypatch.setitem(ATTACK_METHODS, "pgd", genuine._replace(trace=spy))
    run()
    assert len(set(starts)) == len(starts) == 9


def test_the_logistic_is_applied_frozen_to_clean_and_attacked():
    dataset, model = Images(), linear()
    scores = model(dataset.images).detach()
    logistic = LogisticMap.fit(scores, dataset.mos)
    result = run(model, dataset, logistic=logistic)
    for entry in (result.clean, result.attacks["pgd_mse"]):
        assert entry["plcc"] == plcc(logistic(entry["scores"]), dataset.mos)
    assert result.clean["plcc"] != plcc(result.clean["scores"], dataset.mos)
    assert result.to_dict()["logistic"] == logistic.to_dict()
    assert "logistic" in result.to_dict()["plcc"]
    assert run(model, dataset).to_dict()["plcc"] == "plain Pearson"
    assert run(model, dataset).logistic is None


def test_a_model_that_breaks_under_attack_is_the_worst_case():
    class Fragile(Linear):
        def forward(self, x):
            scores = super().forward(x)
            return torch.where(scores > self.limit, math.nan, scores)

    dataset, model = Images(), Fragile(weight() * 0.1)
    model.limit = linear()(dataset.images).max().item() + 0.1
    # PGD changes scores by 0.24, enough to exceed the limit. The surrogate has no gradient, so that the transfer attack
    # consists of its random start, which changes scores by only a tenth of that.
    result = run(model, dataset, surrogate=Linear(0 * weight()), keep=11)
    assert math.isfinite(result.clean["srocc"])
    assert math.isfinite(result.attacks["transfer"]["srocc"])
    assert math.isnan(result.attacks["pgd_drift"]["srocc"])
    assert math.isnan(result.worst["srocc"])
    assert math.isnan(result.worst["plcc_drop"])
    assert result.worst["plcc_attack"] != "transfer"
    # The examples include the images whose attacked score is NaN.
    broken = {e.position for e in result.examples if math.isnan(e.attacked_score)}
    assert broken == {
        i for i in range(11) if any(math.isnan(entry["scores"][i]) for entry in result.attacks.values())
    }


def test_to_dict_is_json_and_has_what_readers_expect(tmp_path):
    result = run(surrogate=linear(3), keep=2)
    write_json(tmp_path / "result.json", result.to_dict())
    found = read_json(tmp_path / "result.json")
    assert found == result.to_dict()
    assert {"norm", "eps", "steps", "restarts", "seed", "clean", "mos", "names", "attacks", "worst"} <= set(
        found
    )
    assert set(found["clean"]) == {"srocc", "plcc", "scores"}
    assert {"srocc", "plcc", "srocc_attack", "plcc_attack"} <= set(found["worst"])
    assert "examples" not in found


def test_diagnostics_count_the_images_without_gradient():
    class Partly(Linear):
        def forward(self, x):
            return super().forward(x) * (x[:, 0, 0, 0] > 0.5)

    dataset = Images(11)
    # 2 images of each batch (of 4, 4 and 3) have no gradient
    dataset.images[:, 0, 0, 0] = torch.tensor([0.3, 0.7]).repeat(6)[:11]
    entries = run(Partly(weight() * 0.1), dataset).attacks
    assert entries["pgd_mse"]["zero_gradients"] == pytest.approx(6 / 11)
    assert entries["pgd_mse"]["nonfinite_gradients"] == 0
    assert run(linear(), dataset).attacks["pgd_mse"]["zero_gradients"] == 0


def test_limit_takes_evenly_spaced_images():
    result = run(limit=3)
    assert result.names == ["image-01.png", "image-05.png", "image-09.png"]
    assert run(limit=99).names == Images().names


def test_names_survive_a_subset_and_default_to_indices():
    result = run(dataset=Subset(Images(), [3, 1, 7]))
    assert result.names == ["image-03.png", "image-01.png", "image-07.png"]
    nameless = [(image, mos) for image, mos in zip(Images().images, Images().mos, strict=True)]
    assert run(dataset=nameless).names == [str(i) for i in range(11)]


# Examples.


def test_examples_are_the_attack_that_moved_the_score_most():
    model, dataset = linear(), Images()
    result = run(model, dataset, surrogate=linear(3), keep=3)
    assert [example.position for example in result.examples] == [1, 5, 9]
    for position, clean, attacked, clean_score, attacked_score, attack in result.examples:
        assert torch.equal(clean, dataset.images[position])
        assert clean_score == result.clean["scores"][position]
        assert attacked_score == result.attacks[attack]["scores"][position]
        assert model(attacked[None]).item() == pytest.approx(attacked_score, rel=1e-5)
        moves = {name: abs(e["scores"][position] - clean_score) for name, e in result.attacks.items()}
        assert moves[attack] == max(moves.values())
        assert (attacked - clean).abs().max() <= 4 / 255 + 1e-7
    assert run(model, dataset).examples == []


# Resuming.


class Interrupting(Images):
    """A dataset that allows the number of reads in `after` and then raises KeyboardInterrupt."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.reads = 0
        self.after = after

    def __getitem__(self, index: int):
        self.reads += 1
        if self.reads > self.after:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def attacks_made(monkeypatch):
    made = []
    genuine = ATTACK_METHODS["pgd"]

    def spy(model, images, mos, objective, **arguments):
        made.append((mos.tolist(), objective))
        return genuine.trace(model, images, mos, objective, **arguments)

    monkeypatch.setitem(ATTACK_METHODS, "pgd", genuine._replace(trace=spy))
    return made


def test_a_stopped_run_goes_on_without_repeating_and_ends_the_same(tmp_path, monkeypatch):
    model, folder = Convolutional(), tmp_path / "attacks"
    resumed = partial(run, model, surrogate=linear(3), keep=3, resume=folder)
    whole = run(model, surrogate=linear(3), keep=3)
    made = attacks_made(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        resumed(Interrupting(after=1 + 4 + 4))  # the first image for its shape, then two of three batches
    assert len(made) == 8
    made.clear()
    result = resumed()
    assert [len(mos) for mos, _ in made] == [3] * 4  # only the last batch; no examples are recomputed
    assert plain(result) == plain(whole)
    for ours, theirs in zip(result.examples, whole.examples, strict=True):
        assert torch.equal(ours.attacked, theirs.attacked)
        assert ours.attack == theirs.attack
    made.clear()
    assert plain(resumed()) == plain(whole)
    assert made == []
    assert sorted(path.name for path in folder.iterdir()) == [f"batch-00000{n}.safetensors" for n in range(3)]


def test_a_stop_within_a_batch_keeps_its_finished_attacks(tmp_path, monkeypatch):
    class Weak(MSE):  # without a gradient; PGD only has its random starts, which change scores less
        stop = True

        def __call__(self, scores, mos, clean_scores):
            if self.stop:
                raise KeyboardInterrupt
            return super().__call__(scores.detach(), mos, clean_scores)

    suite = Suite([Attack("strong", MSE()), Attack("weak", Weak())], CONFIG)
    with pytest.raises(KeyboardInterrupt):
        run(suite=suite, resume=tmp_path, keep=11)
    made = attacks_made(monkeypatch)
    Weak.stop = False
    result = run(suite=suite, resume=tmp_path, keep=11)
    # The second attack on the first batch, then both attacks on the other two batches.
    assert [type(objective) for _, objective in made] == [Weak, MSE, Weak, MSE, Weak]
    assert {example.attack for example in result.examples} == {"strong"}
    for example in result.examples:
        assert linear()(example.attacked[None]).item() == pytest.approx(example.attacked_score, rel=1e-5)


class Breaking(Linear):
    """A linear model that returns NaN for images with a pixel above `most`.

    No clean image of `Images` has a pixel above 0.75.
    """

    def __init__(self, most: float) -> None:
        super().__init__(weight())
        self.most = most

    def forward(self, x):
        return super().forward(x) * torch.where(x.amax((1, 2, 3)) > self.most, math.nan, 1.0)


def test_a_broken_score_survives_the_resume_folder(tmp_path):
    first = run(Breaking(0.75), resume=tmp_path)
    again = run(Breaking(0.75), resume=tmp_path)
    assert all(map(math.isfinite, first.clean["scores"]))
    assert any(map(math.isnan, first.attacks["pgd_mse"]["scores"]))
    assert math.isnan(first.worst["srocc"])
    assert plain(again) == plain(first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eps": 1 / 255}, "eps"),
        ({"norm": "l2"}, "norm"),
        ({"seed": 4}, "seed"),
        ({"batch_size": 5}, "batch_size"),
        ({"model": linear(scale=0.2)}, "model"),
        ({"surrogate": linear(4)}, "attacks|surrogate"),
        ({"dataset": Images(seed=3)}, "images"),
        ({"limit": 4}, "images"),
        ({"suite": Suite.paper(CONFIG.replace(attack_steps=5))}, "steps"),
        ({"suite": Suite.paper(CONFIG.replace(pair_margin=0.1))}, "attacks"),
        ({"keep": 1}, "keep"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, changes, words):
    run(resume=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"made with ({words}) .*; name another folder or remove") as caught:
        run(**{**changes, "resume": tmp_path})
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_batch_whose_file_is_gone_is_attacked_again_and_one_that_is_not_whole_is_reported(
    tmp_path, monkeypatch
):
    whole = run(resume=tmp_path)
    made = attacks_made(monkeypatch)
    second = tmp_path / "batch-000001.safetensors"
    kept = second.read_bytes()
    second.unlink()
    assert plain(run(resume=tmp_path)) == plain(whole)
    assert [mos for mos, _ in made] == [Images().mos[4:8]] * 3
    assert second.read_bytes() == kept
    (tmp_path / "of-somebody-else.json").write_text("[]")
    tensors = {"0": torch.zeros(1)}
    for damaged in (
        b"",
        kept[: len(kept) // 2],
        save(tensors),
        save(tensors, {"record": '{"settings": {}}'}),
    ):
        second.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"batch-000001.safetensors: incomplete record .* remove this file"
        ) as caught:
            run(resume=tmp_path)
        assert "\n" not in str(caught.value)


def test_a_file_in_place_of_the_resume_folder_is_reported(tmp_path):
    (tmp_path / "attacks.json").write_text("[]")
    with pytest.raises(ValueError, match=r"attacks\.json is a file; expected a folder"):
        run(resume=tmp_path / "attacks.json")


def test_progress_counts_every_step_on_stderr(capsys):
    run(progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "72/72" in err  # 3 batches · 3 attacks · 2 restarts · 4 steps
    run()
    assert capsys.readouterr() == ("", "")


# Bad input.


class Uneven(Images):
    def __getitem__(self, index: int):
        image, mos = super().__getitem__(index)
        return (image[:, :4] if index == 2 else image), mos


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"norm": "l3"}, ValueError, "norm='l3'"),
        ({"eps": -1}, ValueError, "eps=-1"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 0.5}, TypeError, "seed=0.5"),
        ({"limit": 1}, ValueError, "limit=1"),
        ({"keep": -1}, ValueError, "keep=-1"),
        ({"dataset": Images(1)}, ValueError, "1 images"),
        ({"dataset": Uneven()}, ValueError, r"image-02.png has shape \(3, 4, 8\)"),
        ({"model": 3}, TypeError, "torch.nn.Module"),
        (
            {"model": Breaking(0.7)},
            ValueError,
            r"4 of 4 images .* not finite, for example that of image-00.png",
        ),
        ({"surrogate": 3}, TypeError, "torch.nn.Module"),
        ({"logistic": 3}, TypeError, "LogisticMap"),
        ({"suite": Suite([Attack("t", MSE(), transfer=True)])}, ValueError, "surrogate"),
    ],
)
def test_bad_input_is_one_sentence(changes, error, words):
    with pytest.raises(error, match=words) as caught:
        run(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [[], ["a", "a"], ["clean"]])
def test_attacks_need_distinct_names(names):
    with pytest.raises(ValueError, match="distinct names"):
        Suite([Attack(name, MSE()) for name in names])


def test_an_attack_is_pgd_with_the_suites_settings():
    model, dataset = Convolutional(), Images(4)
    result = run(model, dataset, keep=4, suite=Suite([Attack("only", MSE())], CONFIG))
    seed = int(np.random.SeedSequence([0, 0, 1]).generate_state(1, np.uint64)[0] >> 1)
    expected = pgd(
        model,
        dataset.images,
        torch.tensor(dataset.mos, dtype=torch.float64),
        MSE(),
        eps=4 / 255,
        steps=4,
        restarts=2,
        generator=torch.Generator().manual_seed(seed),
    )
    assert torch.equal(torch.stack([example.attacked for example in result.examples]), expected)
