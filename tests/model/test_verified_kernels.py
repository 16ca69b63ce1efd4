"""Test which backends run on a verified device, above all with `backend=None`, and how commands report them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench.neck_numerics import make_neck, make_pyramid, with_backend
from srm_kernels import choice, rms_scale, verdicts
from srm_kernels.registration import running
from srm_kernels.verify import command
from srm_kernels.verify.cases import OPERATORS, cases
from srm_kernels.verify.measure import sizes_of
from srm_model import SRMConfig, build_model
from srm_model.checkpoint import save_model
from srm_model.cli import main
from srm_model.cli.parser import make_parser
from srm_model.files import read_json, write_json
from srm_model.neck import SRMNeck
from srm_model.neck import make_neck as build_neck
from srm_model.neck.calibration import calibrate
from srm_model.neck.diagnosis import measure
from srm_model.reports.page import _kernels
from srm_model.reports.run import read_run

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors pretend to be on the device")
KEY = verdicts.key_of("NVIDIA Pretended", (8, 9), "580.1")
CONFIG = SRMConfig(channels=32, heads=2, rank=4, pool_size=2, image_size=32, links=((4, 1),))
GRIDS = ((8, 8), (4, 4), (2, 2), (2, 2))


@pytest.fixture
def pretended() -> Iterator[None]:
    with choice.pretended(KEY):
        yield


@pytest.fixture(autouse=True)
def device(pretended: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat CPU tensors as tensors on a CUDA device, and store verdicts in a temporary folder.

    The fixture `pretended` is requested before `monkeypatch`. Fixtures end in reverse order, so the patches of a test
    are undone before `pretended` ends.
    """
    monkeypatch.setenv("SRM_KERNELS_CACHE", str(tmp_path / "kept"))


def verify(**statuses: str) -> None:
    """Save a verdict in which all kernels are faster than the reference.

    `statuses` maps names of operators to their status. The status of all other operators is "right".
    """
    times = {"triton": 1.0, "reference": 2.0}
    rows: list[dict[str, Any]] = [
        {
            "operator": case.operator.label,
            "backend": "triton",
            "dtype": case.dtype,
            "shape": case.shape,
            "sizes": sizes_of(case),
            "status": statuses.get(case.operator.name, "right"),
            "reason": None,
            "ratio": 0.5,
            "milliseconds": {"forward": times, "backward": times},
            "measured": "2025-01-02",
        }
        for case in cases(shapes=("tiny",))
    ]
    assert len({row["operator"] for row in rows}) == len({operator.label for operator in OPERATORS})
    verdicts.save(verdicts.Verdict(KEY, tuple(rows)))
    choice.refresh()


@pytest.fixture
def neck() -> SRMNeck:
    reference = make_neck(CONFIG, GRIDS, (8, 8, 8, 8)).eval()
    return with_backend(reference, None)  # type: ignore[arg-type]


def launched(neck: SRMNeck) -> set[str]:
    """Return strings such as "dyt triton": name and implementation of every operator that a forward pass calls."""
    pyramid = make_pyramid(2, GRIDS, (8, 8, 8, 8))
    seen: set[str] = set()

    class Recording(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "srm":
                seen.add(f"{function._opname} {args[-1]}")
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Recording():
        neck(pyramid)
    return seen


def test_a_verified_device_runs_the_neck_fused(neck: SRMNeck):
    assert not any("triton" in one for one in launched(neck))
    verify()
    found = launched(neck)
    assert {"pooled_links triton", "merge_links triton", "landmark_context triton"} <= found
    assert {one.split()[1] for one in found} == {"triton"}
    pyramid = make_pyramid(2, GRIDS, (8, 8, 8, 8))
    with torch.no_grad():
        fused, named = neck(pyramid), with_backend(neck, "triton")(pyramid)
        alone = neck([m[1:] for m in pyramid])
    assert torch.equal(fused.fused, named.fused)
    assert torch.equal(fused.fused[1:], alone.fused)


def test_a_fault_of_one_operator_leaves_the_others(neck: SRMNeck):
    verify(gated_fusion="wrong")
    found = launched(neck)
    assert "gated_fusion reference" in found
    assert "pooled_links triton" in found
    verify(pooled_links="timeout")
    assert [one for one in launched(neck) if one.startswith("pooled_links")] == ["pooled_links reference"]


def test_a_named_backend_is_not_overruled(neck: SRMNeck):
    verify()
    plain = SRMNeck((8, 8, 8, 8), CONFIG.replace(backend="reference")).eval()
    plain.load_state_dict(neck.state_dict())
    assert not any("triton" in one for one in launched(plain))


@pytest.mark.parametrize("name", ["srm", "quadratic"])
@pytest.mark.parametrize("landmarks", ["leverage", "uniform", "kmeans++"])
def test_no_step_beside_the_forward_pass_overrules_a_name(name: str, landmarks: str):
    """Check that calibration and diagnosis also use the backend that the config names.

    Both choose landmarks and compute statistics outside the forward pass.
    """
    verify()
    pyramid = make_pyramid(2, GRIDS, (8, 8, 8, 8))
    for backend in ("reference", None):
        config = CONFIG.replace(backend=backend, landmarks=landmarks)
        neck = build_neck(name, (8, 8, 8, 8), config)
        with running() as found:
            calibrate(neck, pyramid)
            measure(neck, pyramid)
            neck.train()(pyramid)
        assert {"rms_scale", "gated_fusion"} <= found.keys()
        assert ("triton" in set().union(*found.values())) == (backend is None)
        assert name == "quadratic" or "select_landmarks" in found
    if name == "srm":
        neck = build_neck(name, (8, 8, 8, 8), CONFIG.replace(backend="triton", landmarks=landmarks))
        with running() as found:
            calibrate(neck, pyramid)
        assert found["select_landmarks"] == {"reference" if landmarks == "kmeans++" else "triton"}


def test_what_ran_and_whose_verdict_is_one_sentence(neck: SRMNeck, monkeypatch):
    cpu = torch.device("cpu")
    with running() as plain:
        launched(neck)
    assert "triton" not in choice.ran(cpu, None, plain)
    assert "not verified" in choice.ran(cpu, None, plain)
    verify(gated_fusion="wrong")
    with running() as nothing:
        pass
    assert choice.ran(cpu, None, nothing) == "no operator of srm_kernels ran"
    with running() as whole:
        with running() as first:
            launched(neck)
        with running() as second:
            rms_scale(torch.zeros(1, 1, 4, 8))
    assert choice.ran(cpu, None, second) == "triton for 1 operator; verdict of this machine, 2025-01-02"
    said = choice.ran(cpu, None, first)
    assert said.startswith("triton for ")
    assert said.endswith("reference for 1 operator; verdict of this machine, 2025-01-02")
    assert whole == first | second
    assert choice.ran(cpu, "torch", {"dyt": {"torch"}}) == "torch for 1 operator; set by the config"
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "reference")
    assert choice.ran(cpu, None, {"dyt": {"reference"}}).endswith("; set by SRM_KERNELS_BACKEND")
    monkeypatch.delenv("SRM_KERNELS_BACKEND")
    monkeypatch.setattr(choice, "_pretended", None)
    choice.refresh()
    assert "CUDA devices only" in choice.ran(cpu, None, second)


@pytest.mark.parametrize("named", [None, "reference"])
def test_what_compiled_code_runs_is_seen_at_every_run(named: str | None):
    verify()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: rms_scale(x, backend=named).rms, backend="aot_eager", fullgraph=True)
    x = torch.ones(1, 1, 4, 8)
    for _ in range(2):
        with running() as found:
            compiled(x)
        assert found == {"rms_scale": {named or "triton"}}


def test_score_says_a_named_backend_on_stderr(tmp_path: Path, capsys):
    save_model(build_model("test_convnext", config=CONFIG), tmp_path / "checkpoint", card={})
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    arguments = ["score", str(tmp_path / "checkpoint"), str(tmp_path / "one.png"), "--device", "cpu"]
    assert main(arguments) == 0
    assert "kernels" not in capsys.readouterr().err
    assert main([*arguments, "--backend", "reference"]) == 0
    err = capsys.readouterr().err
    assert "kernels: reference for " in err
    assert "; set by the config" in err


def test_srm_iqa_verify_is_the_same_command(monkeypatch, capsys):
    given: list[Any] = []
    monkeypatch.setattr("srm_model.cli.verify.main", lambda *arguments: given.append(arguments) or 1)
    assert main(["verify", "--quick", "--only", "dyt"]) == 1
    assert given == [(["--quick", "--only", "dyt"], "srm-iqa verify")]
    monkeypatch.undo()
    assert main(["verify", "--help"]) == 0
    text = capsys.readouterr().out
    own = argparse.ArgumentParser()
    command.add_options(own)
    options = {name for action in own._actions for name in action.option_strings}
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    passed = {name for action in commands.choices["verify"]._actions for name in action.option_strings}
    assert passed == options
    assert all(name in text for name in options)


def test_the_kernels_of_an_evaluation_are_read_for_the_report(tmp_path: Path):
    run = tmp_path / "run"
    save_model(build_model("test_convnext", config=CONFIG), run / "srm", card={})
    values = {
        "mos": [0.1, 0.5, 0.9],
        "scores": [0.1, 0.5, 0.9],
        "names": ["a", "b", "c"],
        "srocc": 1.0,
        "plcc": 1.0,
    }
    write_json(run / "srm" / "evaluation.json", values | {"kernels": "triton for 14 operators; shipped"})
    assert _kernels(read_run(run)) == {"kernels of srm": "triton for 14 operators; shipped"}
    write_json(run / "srm" / "evaluation.json", values)
    assert _kernels(read_run(run)) == {}
    assert "kernels" not in read_json(run / "srm" / "evaluation.json")
