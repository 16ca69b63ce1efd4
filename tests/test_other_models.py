"""Test the recipes of docs/OTHER_MODELS.md: which parameters they train, and how many lines of a plain loop change.

`test_pages.py` runs the recipes as scripts.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import torch

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "OTHER_MODELS.md").read_text(encoding="utf-8")
PLAIN, WITH_NECK, WRAPPED = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


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
