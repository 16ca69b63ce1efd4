"""Test docs/OTHER_MODELS.md: its recipes, its adapters for other packages, and its figures.

`test_pages.py` runs the recipes as scripts. The adapters run with stand-ins for the packages, which have the
signatures, the checks of the input and the output shapes of the real functions.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srm_model.data.labels import import_piq
from srm_model.external import ExternalModel, open_model
from srm_model.files import read_json

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "OTHER_MODELS.md").read_text(encoding="utf-8")
PLAIN, WITH_NECK, WRAPPED = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
(ADAPTERS,) = re.findall(r"```python slow\n(.*?)```", PAGE, flags=re.DOTALL)


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block, "OTHER_MODELS.md", "exec"), names)
    return names


def test_the_neck_goes_into_a_plain_loop_in_under_20_changed_lines():
    changes = [line for line in difflib.ndiff(PLAIN.splitlines(), WITH_NECK.splitlines()) if line[0] in "+-"]
    added = [line for line in changes if line[0] == "+" and line[1:].strip()]
    removed = [line for line in changes if line[0] == "-"]
    assert 0 < len(removed) <= len(added) < 20
    torch.manual_seed(1)
    assert torch.isfinite(run(PLAIN)["loss"])
    names = run(WITH_NECK)
    neck = names["model"].neck
    assert torch.isfinite(names["loss"])
    assert all(parameter.grad is not None for parameter in neck.parameters())
    assert neck.median_rms.isfinite()
    assert all(link.sigma_started for link in neck.links.values())


def test_an_existing_model_is_wrapped_and_left_as_it_is():
    names = run(WRAPPED)
    model, images = names["model"], names["images"]
    trained = {id(parameter) for group in names["optimizer"].param_groups for parameter in group["params"]}
    assert {name.split(".")[0] for name, p in model.named_parameters() if id(p) in trained} == {
        "neck",
        "head",
    }
    assert not any(p.requires_grad for p in model.base.parameters())
    assert all(p.grad is not None for p in (*model.neck.parameters(), *model.head.parameters()))
    assert not any(module.training for module in model.base.modules())
    # Gradients reach the pixels through the frozen model, so that an attack can change the image.
    assert (names["attacked"] - images).abs().max() > 3 / 255
    assert not torch.equal(model(names["attacked"]), model(images))


# Stand-ins for other packages


def means(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def reduced(scores: Tensor, reduction: str) -> Tensor:
    return scores if reduction == "none" else getattr(scores, reduction)()


class Metric(nn.Module):
    """A metric of pyiqa. Without `as_loss`, its scores have no gradient."""

    lower_better = False
    metric_mode = "NR"

    def __init__(self, as_loss: bool, loss_reduction: str) -> None:
        super().__init__()
        self.as_loss, self.loss_reduction = as_loss, loss_reduction

    def forward(self, target: Tensor, ref: Tensor | None = None) -> Tensor:
        assert ref is None
        with torch.set_grad_enabled(self.as_loss):
            scores = means(target)[:, None]
        return reduced(scores, self.loss_reduction) if self.as_loss else scores


def create_metric(
    metric_name: str, as_loss: bool = False, loss_reduction: str = "mean", device: object = None
) -> Metric:
    """Stand-in for `pyiqa.create_metric`."""
    assert (metric_name, device) == ("musiq", "cpu")
    return Metric(as_loss, loss_reduction)


def brisque(
    x: Tensor,
    kernel_size: int = 7,
    kernel_sigma: float = 7 / 6,
    data_range: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Stand-in for `piq.brisque`. It returns (B, 1), a shape that is also accepted."""
    assert x.ndim == 4
    assert 0 <= x.min() <= x.max() <= data_range
    return reduced(100 - means(x)[:, None], reduction)


def arniqa(
    img: Tensor, regressor_dataset: str = "koniq10k", reduction: str = "mean", normalize: bool = True
) -> Tensor:
    """Stand-in for `torchmetrics.functional.image.arniqa`, which squeezes its scores."""
    assert regressor_dataset in ("koniq10k", "kadid10k")
    if normalize and not 0 <= img.min() <= img.max() <= 1:
        raise ValueError("Input image values must be in the [0, 1] range when normalize==True.")
    return reduced(means(img)[:, None].squeeze(), reduction)


class Classifier(nn.Module):
    """Stand-in for an image classifier of transformers with one label."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.head = nn.Linear(1, labels, bias=False)
        nn.init.ones_(self.head.weight)

    @classmethod
    def from_pretrained(cls, name: str, num_labels: int = 2) -> Classifier:
        assert name == "FOLDER"
        return cls(num_labels)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(loss=None, logits=self.head(means(pixel_values)[:, None]))


PACKAGES = {
    "pyiqa": {"create_metric": create_metric},
    "piq": {"brisque": brisque},
    "torchmetrics.functional.image": {"arniqa": arniqa},
    "transformers": {"AutoModelForImageClassification": Classifier},
}


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ExternalModel]:
    """Write the adapters of the page to theirs.py and install the stand-ins. The result opens an adapter by name."""
    for name, members in PACKAGES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(sys.modules[name]).update(members)
    (tmp_path / "theirs.py").write_text(ADAPTERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    return lambda name: open_model(f"theirs:{name}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("musiq", means),
        ("BRISQUE", lambda images: means(images) - 100),
        ("ARNIQA", means),
        ("hugging_face", means),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_an_adapter_of_the_page_gives_one_score_with_gradient_per_image(
    name: str,
    expected: Callable[[Tensor], Tensor],
    batch: int,
    adapters: Callable[[str], ExternalModel],
):
    """Higher is better: the scores of BRISQUE are negated, because its adapter has `lower_better`."""
    images = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = adapters(name)(images)
    assert scores.shape == (batch,)
    assert torch.allclose(scores, expected(images))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient != 0).all()


def test_the_page_has_an_adapter_for_each_package():
    assert set(re.findall(r"^    +(?:import|from) ([\w.]+)", ADAPTERS, flags=re.MULTILINE)) == set(PACKAGES)


def test_the_stand_in_for_piq_has_the_signature_of_piq():
    real = inspect.signature(import_piq().brisque).parameters.values()
    own = inspect.signature(brisque).parameters.values()
    assert [(p.name, p.default) for p in own] == [(p.name, p.default) for p in real]


def test_the_gradient_of_brisque_of_piq_is_zero(monkeypatch: pytest.MonkeyPatch):
    """The page therefore recommends `--suite queries`.

    The sum of the features replaces the downloaded weights.
    """
    piq = import_piq()
    monkeypatch.setattr(
        sys.modules["piq.brisque"], "_score_svr", lambda features: features.sum(1, keepdim=True)
    )
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(piq.brisque(images, reduction="none").sum(), images)
    assert not gradient.any()


# Audits of models from other packages


def test_the_page_states_the_recorded_audits():
    rows = re.findall(r"^\| .* \| `(bench\.classical:\w+)` \| (.*) \|$", PAGE, flags=re.MULTILINE)
    stated = {name: text.split(" | ") for name, text in rows}
    found = {}
    for path in (ROOT / "experiments" / "other-models").glob("*.json"):
        record = read_json(path)
        checks = {check["name"]: check for check in record["checks"]}
        counts = [
            sum(check["passed"] is verdict for check in checks.values()) for verdict in (True, False, None)
        ]
        found[record["model_name"]] = [
            "yes" if record["has_gradient"] else "no",
            *map(str, counts),
            f"{checks['black_box']['data']['other']:.3f}",
        ]
        assert len(checks) == 10
        assert (record["images"], record["queries"], round(255 * record["eps"])) == (8, 30, 4)
    assert stated == found
    assert len(found) == 4
    assert "8 images of 256×256 pixels, L∞ 4/255 and 30 queries per image" in PAGE.replace("\n", " ")


def test_one_score_for_the_whole_batch_is_refused():
    images = torch.rand(3, 3, 8, 8)
    assert ExternalModel(import_piq().TVLoss(reduction="none"))(images).shape == (3,)
    with pytest.raises(ValueError, match=r"of shape \(\) for 3 images"):
        ExternalModel(import_piq().TVLoss())(images)
