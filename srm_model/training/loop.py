"""The training loop: one device, resumable after every epoch, best epoch by validation SROCC."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from srm_model.checkpoint import save_model
from srm_model.config import SRMConfig
from srm_model.files import write_text
from srm_model.metrics import LogisticMap, plcc, srocc
from srm_model.modules import evaluating
from srm_model.training.defences import Randomness, adversarial, gradient_norm
from srm_model.training.evaluation import predict
from srm_model.training.optimisation import autocast_dtype, lr_factor, parameter_groups, warmup_steps
from srm_model.training.seeding import deterministic, seeded
from srm_model.training.state import load_tensors, read_values, save_state

HISTORY = "history.jsonl"


class DivergenceError(RuntimeError):
    """The loss or a gradient stopped being finite; the message names the images of that batch."""


def train(
    model: nn.Module,
    train_set: Any,
    val_set: Any,
    folder: str | Path,
    *,
    config: SRMConfig | None = None,
    workers: int = 0,
    resume: bool = True,
    progress: bool = True,
    device: torch.device | str | None = None,
    freeze_backbone: bool = False,
    card: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train `model` by the protocol of SPEC section 5; returns the history, one dict per epoch (from 1).

    `folder` then holds the best epoch by validation SROCC (`model.safetensors`, `config.json`; of equals the
    earlier), the last one (`state.safetensors`), `history.jsonl` and `tensorboard/`. `model` itself ends with
    the weights of the last epoch, on `device` (default: CUDA where there is one).

    A state in `folder` is continued from its last finished epoch, with the same result as if never cut off;
    ValueError where it belongs to another config, model or data set. `resume=False` starts anew over it.
    Random numbers, shuffling included, are a function of (config.seed, epoch). An epoch's last batch may be
    short, but a single left-over image is skipped. `card` is stored in the checkpoint beside the epoch, the
    validation figures and the logistic map fitted on the best epoch's clean validation scores.
    A loss or gradient that is not finite is a DivergenceError naming the files of its batch.
    """
    config = config or model.config  # type: ignore[assignment]
    assert config is not None
    run = _Run(
        model, train_set, val_set, Path(folder), config, workers, progress, _device(device), card or {}
    )
    if freeze_backbone:
        model.backbone.requires_grad_(False)  # type: ignore[union-attr]
    with deterministic(config.deterministic):
        return run.fit(resume=resume, identity={"freeze_backbone": freeze_backbone})


def epoch_batches(count: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The indices of an epoch's batches, shuffled by (seed, epoch); a single left-over image is dropped."""
    order = np.random.default_rng((seed, epoch)).permutation(count).tolist()
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 < batch_size else batches


class _Run:
    def __init__(
        self,
        model: nn.Module,
        train_set: Any,
        val_set: Any,
        folder: Path,
        config: SRMConfig,
        workers: int,
        progress: bool,
        device: torch.device,
        card: dict[str, Any],
    ) -> None:
        self.model: Any = model
        self.train_set, self.val_set = train_set, val_set
        self.folder, self.config, self.card = folder, config, card
        self.workers, self.progress, self.device = workers, progress, device
        self.dtype = autocast_dtype(config.precision, device)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    def fit(self, *, resume: bool, identity: dict[str, Any]) -> list[dict[str, Any]]:
        identity = {
            "backbone": self.model.backbone_name,
            "neck": self.model.neck_name,
            "config": self.config.to_dict(),
            "training set": _identify(self.train_set),
            "validation set": _identify(self.val_set),
            **identity,
        }
        identity = json.loads(json.dumps(identity))  # tuples compare as the lists they are stored as
        stored = read_values(self.folder) if resume else None
        if stored is not None:
            _check_same(self.folder, stored["identity"], identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model.to(device=self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.config),
            betas=self.config.betas,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if stored is not None:
            load_tensors(self.folder, self.model, self.optimizer)
            self.scaler.load_state_dict(stored["scaler"])
            self.history, self.best = stored["history"], stored["best"]
            self._publish()
        finished = len(self.history)
        if finished == self.config.epochs:
            return self.history
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        with SummaryWriter(str(self.folder / "tensorboard"), purge_step=finished + 1) as writer:
            for epoch in range(finished, self.config.epochs):
                with seeded(self.config.seed, epoch):
                    row = self._train_epoch(epoch)
                self.history.append(self._validate(row))
                values = {
                    "identity": identity,
                    "scaler": self.scaler.state_dict(),
                    "history": self.history,
                    "best": self.best,
                }
                save_state(self.folder, self.model, self.optimizer, values)
                self._publish()
                _log(writer, self.history[-1])
                if self.progress:
                    tqdm.write(_summary(self.history[-1], self.config.epochs), file=sys.stderr)
        return self.history

    def _publish(self) -> None:
        # All of this follows from the state, so a kill in between is mended on resuming.
        if self.best is not None and self.best["epoch"] == self.history[-1]["epoch"]:
            save_model(self.model, self.folder, card={**self.card, **self.best})
        write_text(self.folder / HISTORY, "".join(json.dumps(row) + "\n" for row in self.history))

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        config = self.config
        batches = epoch_batches(len(self.train_set), config.batch_size, seed=config.seed, epoch=epoch)
        total, warmup = config.epochs * len(batches), warmup_steps(config, len(batches))
        self.train_set.epoch = epoch
        loader = DataLoader(
            self.train_set,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        self.model.train()
        capped: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        seen, start = 0, time.perf_counter()
        with (
            self.model.neck.register_forward_hook(lambda _, __, output: capped.extend(_capped(output))),
            tqdm(
                total=sum(map(len, batches)),
                desc=f"epoch {epoch + 1}/{config.epochs}",
                unit="img",
                leave=False,
                disable=None if self.progress else True,
            ) as bar,
        ):
            for index, (images, mos) in enumerate(loader):
                images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
                mos = mos.to(self.device, torch.float32, non_blocking=True)
                if epoch == 0 and index == 0:
                    self.model.calibrate(images)
                factor = lr_factor(epoch * len(batches) + index, steps=total, warmup=warmup)
                for group in self.optimizer.param_groups:
                    group["lr"] = factor * group["base_lr"]
                if config.adversarial_eps > 0:
                    images = adversarial(self.model, images, mos, config, config.seed, epoch, index)
                losses, finite = self._step(images, mos)
                if not finite:
                    names = ", ".join(self.train_set.names[i] for i in batches[index])
                    raise DivergenceError(
                        f"the loss or its gradient is not finite in epoch {epoch + 1}, batch {index + 1} of "
                        f"{len(batches)}: {names}; try a lower learning rate or precision fp32"
                    )
                for name, value in losses.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(images)
                seen += len(images)
                bar.update(len(images))
                bar.set_postfix(loss=f"{float(losses['loss']):.4f}", refresh=False)
        seconds = time.perf_counter() - start
        return {
            "epoch": epoch + 1,
            "lr": {
                group["name"]: group["lr"]
                for group in self.optimizer.param_groups
                if not group["name"].endswith("_no_decay")
            },
            **{name: float(value) / seen for name, value in sums.items()},
            **({"gain_active": float(torch.cat(capped).mean())} if capped else {}),
            "seconds": seconds,
            "images_per_second": seen / seconds,
        }

    def _step(self, images: Tensor, mos: Tensor) -> tuple[dict[str, Tensor], bool]:
        config = self.config
        regularised = config.weight_gradient > 0
        randomness = Randomness(self.device) if regularised else None
        images.requires_grad_(regularised)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            scores, auxiliary = self.model(images, return_losses=True)
            if randomness is not None:
                penalty = gradient_norm(self.model, images, scores, config, randomness)
                auxiliary = {**auxiliary, "gradient": penalty}
        mse = F.mse_loss(scores.float(), mos)
        loss = mse
        for name, value in auxiliary.items():
            loss = loss + getattr(config, f"weight_{name}") * value.float()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        # The loss scaler skips steps whose gradients overflow, and lowers its scale: those are no divergence.
        finite = bool(torch.isfinite(loss.detach() if self.scaler.is_enabled() else loss.detach() + norm))
        if finite:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.model.clamp_()
        losses = {
            "loss": loss,
            "loss_mse": mse,
            **{f"loss_{name}": value for name, value in auxiliary.items()},
        }
        return {name: value.detach().float() for name, value in losses.items()}, finite

    def _validate(self, row: dict[str, Any]) -> dict[str, Any]:
        scores = predict(
            self.model,
            self.val_set,
            batch_size=self.config.batch_size,
            workers=self.workers,
            progress=self.progress,
        )
        mos = self.val_set.mos
        logistic = LogisticMap.fit(scores, mos) if np.isfinite(scores).all() else None
        correlation = srocc(scores, mos)
        linear = plcc(scores if logistic is None else logistic(scores), mos)
        row |= {"val_srocc": correlation, "val_plcc": linear, "diagnostics": self._diagnose()}
        # NaN has no place in JSON: it becomes null, in the best epoch's figures too.
        row = json.loads(json.dumps(row), parse_constant=lambda _: None)
        if self.best is None or _exceeds(row["val_srocc"], self.best["val"]["srocc"]):
            self.best = {
                "epoch": row["epoch"],
                "val": {"srocc": row["val_srocc"], "plcc": row["val_plcc"]},
                "logistic": None if logistic is None else logistic.to_dict(),
            }
        return row

    def _diagnose(self) -> dict[str, Any]:
        # Spread over the set: neighbours in it show one photograph.
        count = min(self.config.batch_size, len(self.val_set))
        chosen = np.linspace(0, len(self.val_set) - 1, count).round().astype(int)
        images = torch.stack([self.val_set[int(i)][0] for i in chosen]).to(self.device)
        with evaluating(self.model), torch.no_grad(), seeded(self.config.seed):
            return dict(self.model.diagnose(images))


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _capped(output: Any) -> list[Tensor]:
    """Which images of a batch the gain cap acted on; nothing from a neck without a cap."""
    gain = getattr(output, "gain", None)
    return [] if gain is None else [(gain.detach() < 1).float()]


def _identify(dataset: Any) -> str:
    return f"{len(dataset)} images of {dataset.fingerprint[:12]}"


def _exceeds(value: float | None, best: float | None) -> bool:
    return value is not None and (best is None or value > best)


def _check_same(folder: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    # A field that came later than the training was at its default then.
    defaults = json.loads(json.dumps(SRMConfig().to_dict()))

    def flat(identity: dict[str, Any]) -> dict[str, Any]:
        return {**{k: v for k, v in identity.items() if k != "config"}, **defaults, **identity["config"]}

    before, after = flat(stored), flat(now)
    differences = [
        f"{key} {before.get(key)!r} there, {after.get(key)!r} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if differences:
        raise ValueError(
            f"{folder}: holds a training that differs from this one ({'; '.join(differences)}); "
            "give another folder, or start anew without resuming"
        )


def _log(writer: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if name != "epoch":
            for tag, number in _scalars(name, value):
                writer.add_scalar(tag, number, row["epoch"])
    writer.flush()


def _scalars(tag: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _scalars(f"{tag}/{key}", item)]
    if isinstance(value, list | tuple):
        return [pair for i, item in enumerate(value) for pair in _scalars(f"{tag}/{i}", item)]
    return [(tag, float(value))] if isinstance(value, int | float) else []


def _summary(row: dict[str, Any], epochs: int) -> str:
    def figure(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.3f}"

    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}, "
        f"validation SROCC {figure(row['val_srocc'])}, PLCC {figure(row['val_plcc'])}, "
        f"{row['images_per_second']:.1f} images/s, {row['seconds']:.0f} s"
    )
