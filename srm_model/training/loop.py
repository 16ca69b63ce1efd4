"""The training loop, in one or several processes (docs/METHOD.md §5)."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from srm_model import ranks
from srm_model.backbones import Backbone, check_size
from srm_model.checkpoint import save_model
from srm_model.config import SRMConfig
from srm_model.files import json_text, make_folder, utf8_path, write_text
from srm_model.metrics import LogisticMap, plcc, srocc
from srm_model.modules import evaluating, unwrapped
from srm_model.neck import SRMNeck
from srm_model.statistics import BatchStatistics
from srm_model.training.batches import deal, epoch_batches
from srm_model.training.defences import Randomness, adversarial, consistency, gradient_norm
from srm_model.training.evaluation import predict
from srm_model.training.faults import (
    DivergenceError,
    Preempted,
    Termination,
    is_worker_death,
    reading,
    reading_fault,
    worker_start,
)
from srm_model.training.optimisation import (
    autocast_dtype,
    average_weights,
    lr_factor,
    parameter_groups,
    warmup_share,
    warmup_steps,
)
from srm_model.training.progress import Progress
from srm_model.training.seeding import deterministic, seeded
from srm_model.training.state import Stored, load_tensors, read_state, save_state

HISTORY = "history.jsonl"
SKIPS = 3  # with a loss scaler, training ends after this many consecutive losses that are not finite
STEPPED, SKIPPED, FAILED = "stepped", "skipped", "failed"  # outcomes of a step


class _Part(NamedTuple):
    """A micro-batch of one rank."""

    images: Tensor  # (B, 3, H, W)
    mos: Tensor  # (B,)
    attacked: Tensor | None = None  # attacked copies of `images`, for the consistency term


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
    save_every: int | None = None,
    compile: str | None = None,
    card: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train a model by the protocol of docs/METHOD.md §5.

    The folder receives these files:

    - `model.safetensors` and `config.json`: the checkpoint of the epoch with the best validation SROCC;
    - `state.safetensors` and `state.previous.safetensors`: the latest state of the training and the state before it;
    - `history.jsonl` and `tensorboard/`: losses, validation results and diagnostics of every epoch.

    After training, the model has the weights of the last epoch. With `config.weights_ema` > 0, the average of the
    weights is validated and saved in the checkpoint, instead of the current weights.

    A state is written after every epoch, when SIGTERM arrives, and every `save_every` steps if this argument is given.
    A resumed training gives the same result as an uninterrupted training: the random numbers of an epoch depend only on
    `config.seed`, the dataset's seed, the epoch and the rank, and a state within an epoch contains the states of the
    random generators. The order of the images depends only on `config.seed` and the epoch.

    In a process group (torchrun), every rank calls this function with the same arguments and the same folder. Each
    batch is divided among the ranks. The statistics and losses of a batch are the same as in one process. Only rank 0
    writes files.

    Args:
        model: The model without wrappers. It has the attributes `backbone_name`, `neck_name` and `config`, like
            `IQAModel`.
        train_set: Dataset of pairs (image, normalised MOS), which are read by index. It has the attributes of
            `ImageQualityDataset`. If `config.crop_size` is given, the dataset's `crop_size` is set to this value.
        val_set: Validation dataset, with the same kind of items and the same attributes as `train_set`.
        folder: Folder of the results.
        config: Settings of the training. Default: the model's config.
        workers: Number of processes that load images.
        resume: Whether to resume from a state in the folder. Otherwise training starts from the beginning and
            overwrites the state.
        progress: Whether to show progress on stderr.
        device: Device of the training. Default: CUDA if available.
        freeze_backbone: Whether to keep the backbone's weights fixed.
        save_every: Number of steps between two states within an epoch. Default: no states within an epoch.
        compile: Backend of torch.compile for backbone and head, such as "inductor".
        card: Facts to store in the checkpoint, in addition to the epoch, the validation results and the logistic map.

    Returns:
        The history: a dictionary for each epoch.

    Raises:
        TypeError: The model is wrapped.
        ValueError: The state in the folder belongs to another config, model or dataset, or an image cannot be read.
        DivergenceError: The loss or a gradient is not finite. With a loss scaler, this error is raised only after three
            failed steps in a row.
        WorkerError: A process that loads images was killed.
        OSError: The folder cannot be written to, for example because the disk is full.
        Preempted: SIGTERM arrived.
    """
    if unwrapped(model) is not model:
        raise TypeError(
            f"model is a {type(model).__name__} around a {type(unwrapped(model)).__name__}; expected the model "
            "without a wrapper (train itself distributes the model under torchrun, and compiles it if compile is given)"
        )
    config = config or model.config  # type: ignore[assignment]
    assert config is not None
    if isinstance(getattr(model, "backbone", None), Backbone):
        check_size(model.backbone.name, config.image_size)  # type: ignore[union-attr, arg-type]
    if config.crop_size is not None:
        train_set.crop_size = config.crop_size
    run = _Run(
        model,
        train_set,
        val_set,
        Path(folder),
        config,
        workers,
        progress,
        torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        card or {},
        save_every,
    )
    if freeze_backbone:
        model.backbone.requires_grad_(False)  # type: ignore[union-attr]
    identity = {"freeze_backbone": freeze_backbone, "compile": compile}
    with deterministic(config.deterministic), _compiled(model, compile), run.termination:
        return run.fit(resume=resume, identity=identity)


@dataclass
class _Run:
    model: Any
    train_set: Any
    val_set: Any
    folder: Path
    config: SRMConfig
    workers: int
    progress: bool
    device: torch.device
    card: dict[str, Any]
    save_every: int | None

    def __post_init__(self) -> None:
        self.dtype = autocast_dtype(self.config.precision, self.device)
        self.rank, self.world = ranks.place()
        self.progress = self.progress and self.rank == 0
        self.termination = Termination()
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.average: Any = None
        self.identity: dict[str, Any] = {}

    def fit(self, *, resume: bool, identity: dict[str, Any]) -> list[dict[str, Any]]:
        identity = {
            "backbone": self.model.backbone_name,
            "neck": self.model.neck_name,
            "config": self.config.to_dict(),
            "training set": _identify(self.train_set),
            "validation set": _identify(self.val_set),
            **identity,
        }
        self.identity = json.loads(json.dumps(identity))  # turns tuples into lists, as in a stored identity
        stored = ranks.from_first(lambda: self._stored() if resume else None)
        self._batches(0)  # raises before anything is written
        if self.rank == 0:
            make_folder(self.folder)
            for leftover in self.folder.glob(".*.partial*"):  # files of an interrupted save
                leftover.unlink(missing_ok=True)
        self.model.to(device=self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.config),
            betas=self.config.betas,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if self.config.weights_ema > 0:
            self.average = copy.deepcopy(self.model).requires_grad_(False)
        begun: dict[str, Any] | None = None
        if stored is not None:
            load_tensors(stored.path, self.model, self.optimizer, self.average)
            self.scaler.load_state_dict(stored.values["scaler"])
            self.history, self.best = stored.values["history"], stored.values["best"]
            begun = stored.values["progress"]
            self._publish(whole=begun is None)
        self.forward: nn.Module = self.model
        if self.world > 1:
            self.forward = DistributedDataParallel(
                self.model, broadcast_buffers=False, find_unused_parameters=self._has_idle_parameters()
            )
        finished = len(self.history)
        if finished == self.config.epochs:
            return self.history
        with self._writer(finished) as writer:
            for epoch in range(finished, self.config.epochs):
                with seeded(self.config.seed, epoch, rank=self.rank):
                    row, done = self._train_epoch(epoch, begun)
                begun = None
                self.history.append(self._validate(row, done))
                self._save(None)
                self._publish()
                if writer is not None:
                    _log(writer, self.history[-1])
                if self.progress:
                    tqdm.write(_summary(self.history[-1], self.config.epochs), file=sys.stderr)
        return self.history

    def _batches(self, epoch: int) -> list[list[int]]:
        return epoch_batches(
            len(self.train_set),
            self.config.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            processes=self.world,
        )

    def _has_idle_parameters(self) -> bool:
        """Return whether some trainable parameters have no effect on the score.

        For example, the parameters of links into a stage that is not fused have no effect.
        """
        side = self.config.image_size
        image = torch.full((1, 3, side, side), 0.5, device=self.device)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with evaluating(self.model), seeded(self.config.seed):
            gradients = torch.autograd.grad(self.model(image).sum(), trained, allow_unused=True)
        return any(gradient is None for gradient in gradients)

    def _stored(self) -> Stored | None:
        stored = read_state(self.folder)
        if stored is not None:
            _check_same(self.folder, stored.values["identity"], self.identity)
        return stored

    @contextmanager
    def _writer(self, finished: int) -> Iterator[Any]:
        if self.rank > 0:
            yield None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # here, because the import takes seconds
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"training needs tensorboard for its curves ({error}); run pip install 'srm-iqa[model]'"
            ) from None

        with (
            utf8_path(self.folder) as folder,
            SummaryWriter(str(folder / "tensorboard"), purge_step=finished + 1) as writer,
        ):
            yield writer

    def _save(self, progress: dict[str, Any] | None) -> None:
        """Write the state of the training to the folder.

        `progress` is the result of `Progress.to_dict` for an unfinished epoch, or None after a finished epoch.
        """
        values = {
            "identity": self.identity,
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "best": self.best,
            "progress": progress,
        }
        if self.rank == 0:
            with self._write_errors():
                save_state(self.folder, self.model, self.optimizer, values, self.average)

    def _publish(self, *, whole: bool = True) -> None:
        """Write the history, and also the checkpoint if the last finished epoch is the best epoch.

        `whole` is False if training resumes within an epoch. The checkpoint is then not written, because the weights
        already include steps of the unfinished epoch.
        """
        # These files are derived from the state. If a write is interrupted, a resumed training writes them again.
        if self.rank > 0:
            return
        with self._write_errors():
            if whole and self.best is not None and self.best["epoch"] == self.history[-1]["epoch"]:
                save_model(self._judged, self.folder, card={**self.card, **self.best})
            write_text(self.folder / HISTORY, "".join(json_text(row) + "\n" for row in self.history))

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise OSError(
                f"{self.folder}: cannot be written to ({reason}); the last saved files are intact; "
                "make room there and run the same command to resume"
            ) from None

    @property
    def _judged(self) -> Any:
        return self.model if self.average is None else self.average

    def _train_epoch(self, epoch: int, begun: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Train an epoch; return the epoch's row of the history and the epoch's progress (`Progress.to_dict`).

        The row has no validation results yet. If the validation of the epoch fails, `_validate` saves the progress, so
        that a resumed training validates the epoch without training it again.
        """
        config = self.config
        batches = self._batches(epoch)
        shares = [
            deal(batch, accumulate=config.accumulate, rank=self.rank, processes=self.world)
            for batch in batches
        ]
        total, warmup = config.epochs * len(batches), warmup_steps(config, len(batches))
        at = Progress(epoch, len(batches), self.device)
        if begun is not None:
            at.resume(begun)
        self.train_set.epoch = epoch
        loader = self._loader([*chain.from_iterable(shares[at.step :])])
        self.model.train()
        start = time.perf_counter() - at.seconds
        with (
            self.model.neck.register_forward_hook(lambda _, __, output: at.count_capped(output)),
            tqdm(
                total=sum(map(len, batches)),
                initial=at.seen,
                desc=f"epoch {epoch + 1}/{config.epochs}",
                unit="img",
                leave=False,
                disable=None if self.progress else True,
            ) as bar,
            self._kept_if_a_worker_dies(at),
            reading(loader) as items,
        ):
            for index in range(at.step, len(batches)):
                batch = batches[index]
                parts = self._fetch(items, len(shares[index]), at)
                at.whole = False
                parts = self._on_device(parts)
                if epoch == 0 and index == 0:
                    self._calibrate(batch, parts[0].images)
                step = epoch * len(batches) + index
                factor = lr_factor(step, steps=total, warmup=warmup)
                for group in self.optimizer.param_groups:
                    group["lr"] = factor * group["base_lr"]
                if config.adversarial_eps > 0:
                    share = warmup_share(step, config.adversarial_warmup * len(batches))
                    parts = self._attacked(parts, epoch, index, share)
                losses, outcome = self._step(parts, len(batch))
                self._check(outcome, at, batch)
                if outcome == STEPPED and self.average is not None:
                    average_weights(self.average, self.model, config.weights_ema, step)
                at.add(losses if outcome != FAILED else None, len(batch), skipped=outcome != STEPPED)
                at.seconds = time.perf_counter() - start
                at.whole = True
                bar.update(len(batch))
                bar.set_postfix(loss=f"{float(losses['loss']):.4f}", refresh=False)
                if self.save_every and at.step % self.save_every == 0 and not at.done:
                    self._save(at.to_dict())
            self._stop_if_asked(at)
        factor = lr_factor((epoch + 1) * len(batches) - 1, steps=total, warmup=warmup)
        skipped = {"skipped_steps": at.skipped} if self.scaler.is_enabled() else {}
        return {"epoch": epoch + 1, "lr": self._rates(factor), **at.row(), **skipped}, at.to_dict()

    def _rates(self, factor: float) -> dict[str, float]:
        """Return the learning rate of each parameter group with weight decay, by the name of the group.

        The backbone has two parameter groups, one with and one without weight decay, and so has the neck. The two
        groups of a module have the same learning rate, so the result omits the groups without weight decay.
        """
        return {
            group["name"]: factor * group["base_lr"]
            for group in self.optimizer.param_groups
            if not group["name"].endswith("_no_decay")
        }

    def _loader(self, batches: list[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            self.train_set,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=worker_start(),
            # Without this argument, the loader would draw a seed from the global generator after every resume.
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    def _on_device(self, parts: list[Any]) -> list[_Part]:
        return [
            _Part(
                images.to(self.device, non_blocking=True, memory_format=torch.channels_last),
                mos.to(self.device, torch.float32, non_blocking=True),
            )
            for images, mos in parts
        ]

    def _attacked(self, parts: list[_Part], epoch: int, index: int, share: float) -> list[_Part]:
        """Attack the images of a step for adversarial training, with the budget `share` · `config.adversarial_eps`.

        If `weight_consistency` is 0, the attacked images replace the clean images. Otherwise, each micro-batch keeps
        its clean images and also gets the attacked images.
        """
        seed = (self.config.seed, epoch, index, self.rank)
        found = []
        for number, part in enumerate(parts):
            images = adversarial(self.model, part.images, part.mos, self.config, *seed, number, share=share)
            name = "attacked" if self.config.weight_consistency > 0 else "images"
            found.append(part._replace(**{name: images}))
        return found

    def _fetch(self, items: Iterator[Any], count: int, at: Progress) -> list[Any]:
        """Load the micro-batches of a step.

        If any rank cannot read its images or receives SIGTERM, the progress is saved, and all ranks raise an exception.
        """
        start = time.perf_counter()
        found, fault = [], None
        try:
            found = [next(items) for _ in range(count)]
        except Exception as error:
            fault = reading_fault(error)
        at.waited += time.perf_counter() - start
        self._stop_if_asked(at)  # first, because the signal may have caused the fault
        faults = [error for error in ranks.gather(fault) if error is not None] if self._any(fault) else []
        if faults:
            self._save(at.to_dict())
            raise faults[0]
        return found

    def _stop_if_asked(self, at: Progress) -> None:
        if self._any(self.termination.received):
            self._save(at.to_dict())
            raise Preempted(str(at))

    def _any(self, condition: object) -> bool:
        """Return whether the condition is true on any rank."""
        held = bool(condition)
        if self.world > 1:
            held = bool(ranks.total(torch.tensor(float(held), device=self.device)))
        return held

    @contextmanager
    def _kept_if_a_worker_dies(self, at: Progress) -> Iterator[None]:
        """If a worker dies in the `with` block, save the progress if possible, and raise a WorkerError.

        torch can raise the error of a dead worker at any line of the `with` block. If torch raises it while `_fetch`
        loads images, `_fetch` handles the error. In all other cases, this context manager handles it. It then saves the
        progress, except in two situations. During a step, it cannot save, because the step is incomplete. With several
        ranks, it cannot save, because all ranks must take part in saving.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_worker_death(error):
                raise
            if at.whole and self.world == 1:
                self._save(at.to_dict())
            raise reading_fault(error) from None

    def _calibrate(self, batch: list[int], images: Tensor) -> None:
        if len(images) < len(batch):  # every rank calibrates on the whole batch
            whole = default_collate([self.train_set[i][0] for i in batch])
            images = whole.to(self.device, memory_format=torch.channels_last)
        self.model.calibrate(images)
        ranks.take_from_first(self.model.state_dict().values())
        if self.average is not None:
            self.average.load_state_dict(self.model.state_dict())

    def _step(self, parts: list[_Part], count: int) -> tuple[dict[str, Tensor], str]:
        """Run an optimiser step on this rank's share of a batch; return the losses and the outcome.

        `count` is the number of images of the whole batch, over all ranks. The returned losses are also computed over
        the whole batch. The outcome is STEPPED, SKIPPED or FAILED, as in `_update`.
        """
        statistics = self._survey(parts) if len(parts) > 1 else None
        self.optimizer.zero_grad(set_to_none=True)
        found = []
        for number, part in enumerate(parts):
            if statistics is not None:
                statistics.current = number
            with self._communicating(number + 1 == len(parts)):
                share = len(parts) * self.world * len(part.images) / count
                losses = self._losses(part, statistics, share)
                self.scaler.scale(losses["loss"] / len(parts)).backward()
            found.append({name: value.detach().float() for name, value in losses.items()})
        if statistics is not None:
            self.model.neck.track(statistics)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        whole = self._mean(found)
        return whole, self._update(whole["loss"], norm)

    def _losses(self, part: _Part, statistics: BatchStatistics | None, share: float) -> dict[str, Tensor]:
        """Return the losses of one micro-batch of this rank.

        Each loss is scaled so that its mean over all micro-batches and ranks is the loss of the whole batch. For a loss
        that is a mean over images, the factor is `share`. It is the number of images in this micro-batch, divided by
        the mean of this number over all micro-batches and ranks.
        """
        config = self.config
        images, regularised = part.images, config.weight_gradient > 0
        randomness = Randomness(self.device) if regularised or part.attacked is not None else None
        images.requires_grad_(regularised)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            options = {} if statistics is None else {"statistics": statistics}
            scores, auxiliary = self.forward(images, return_losses=True, **options)
            if randomness is not None and regularised:
                penalty = gradient_norm(self.model, images, scores, config, randomness)
                auxiliary = {**auxiliary, "gradient": share * penalty}
            if randomness is not None and part.attacked is not None:
                change = consistency(self.model, part.attacked, scores, randomness)
                auxiliary = {**auxiliary, "consistency": share * change}
        mse = F.mse_loss(scores.float(), part.mos)
        if share != 1:
            mse = share * mse
        loss = mse
        for name, value in auxiliary.items():
            loss = loss + getattr(config, f"weight_{name}") * value.float()
        return {
            "loss": loss,
            "loss_mse": mse,
            **{f"loss_{name}": value for name, value in auxiliary.items()},
        }

    @torch.no_grad()
    def _survey(self, parts: list[_Part]) -> BatchStatistics | None:
        """Compute a batch's statistics in a first pass without gradients; return None for a neck without statistics.

        Afterwards, the random state is restored, so that the second pass, with gradients, draws the same random numbers
        as the first pass.
        """
        if not isinstance(self.model.neck, SRMNeck):
            return None
        statistics = BatchStatistics()
        with (
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None),
        ):
            for part in parts:
                self.model(part.images, return_losses=True, statistics=statistics)
        statistics.finish()
        return statistics

    def _communicating(self, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients between ranks only after the last micro-batch."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()

    def _mean(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the losses of the whole batch, on every rank."""
        if len(found) * self.world == 1:
            return found[0]
        own = torch.stack([torch.stack([*losses.values()]) for losses in found]).mean(0)
        return dict(zip(found[0], ranks.total(own) / self.world, strict=True))

    def _update(self, loss: Tensor, norm: Tensor) -> str:
        """Run the optimiser's step if loss and gradient are finite.

        Returns:
            STEPPED if the step was run. SKIPPED if the loss is finite, the gradient is not, and the scale of the loss
            scaler is above 1: the scaler then lowers its scale, which may avoid the overflow. FAILED otherwise.
        """
        loss_finite, norm_finite = torch.isfinite(torch.stack([loss, norm.float()])).tolist()
        if loss_finite and norm_finite:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.model.clamp_()
            return STEPPED
        if not self.scaler.is_enabled():
            return FAILED
        # Gradients that overflow at a scale above 1 are no divergence. The scaler skips the step and lowers the scale.
        outcome = FAILED if not loss_finite or self.scaler.get_scale() <= 1 else SKIPPED
        self.scaler.update()
        return outcome

    def _check(self, outcome: str, at: Progress, batch: list[int]) -> None:
        at.failures = at.failures + 1 if outcome == FAILED else 0
        if outcome != FAILED or (self.scaler.is_enabled() and at.failures < SKIPS):
            return
        names = ", ".join(self.train_set.names[i] for i in batch)
        before = f" and the {SKIPS - 1} before it" if self.scaler.is_enabled() else ""
        raise DivergenceError(
            f"the loss or its gradient is not finite in epoch {at.epoch + 1}, batch {at.step + 1} of "
            f"{at.steps}{before}: {names}; try a lower learning rate or precision fp32"
        )

    def _validate(self, row: dict[str, Any], done: dict[str, Any]) -> dict[str, Any]:
        """Validate the model after an epoch; return the completed `row`.

        On an error or SIGTERM, save the state before raising, so that a resumed training repeats only the validation.
        """
        try:
            with self.termination.at_once():
                return self._judge(row)
        except Preempted:
            self._save(done)
            raise Preempted(f"epoch {row['epoch']}, before its validation") from None
        except Exception as error:
            self._save(done)
            raise reading_fault(error) from None

    def _judge(self, row: dict[str, Any]) -> dict[str, Any]:
        scores = predict(
            self._judged,
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
        # JSON has no NaN. Convert NaN to None here, so that the results of the best epoch have None too.
        row = json.loads(json.dumps(row), parse_constant=lambda _: None)
        if self.best is None or _exceeds(row["val_srocc"], self.best["val"]["srocc"]):
            self.best = {
                "epoch": row["epoch"],
                "val": {"srocc": row["val_srocc"], "plcc": row["val_plcc"]},
                "logistic": None if logistic is None else logistic.to_dict(),
            }
        return row

    def _diagnose(self) -> dict[str, Any]:
        # Take evenly spaced images, because neighbouring images of a dataset may show the same photograph.
        count = min(self.config.batch_size, len(self.val_set))
        chosen = np.linspace(0, len(self.val_set) - 1, count).round().astype(int)
        images = torch.stack([self.val_set[int(i)][0] for i in chosen]).to(self.device)
        with evaluating(self._judged), torch.no_grad(), seeded(self.config.seed):
            return dict(self._judged.diagnose(images))


@contextmanager
def _compiled(model: Any, backend: str | None) -> Iterator[None]:
    """Compile backbone and head, but not the neck, with torch.compile for the duration of the `with` block."""
    if backend is None:
        yield
        return
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"compile={backend!r}: expected one of {', '.join(map(repr, known))}")
    parts = (model.backbone, model.head)
    for part in parts:
        part.compile(backend=backend)
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


def _identify(dataset: Any) -> str:
    return f"{len(dataset)} images of {dataset.fingerprint[:12]}"


def _exceeds(value: float | None, best: float | None) -> bool:
    return value is not None and (best is None or value > best)


def _check_same(folder: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    # If the stored config lacks a field, the field was added later. The stored training used its default value.
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
            "give another folder, or start again with --restart (resume=False)"
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
        f"{row['images_per_second']:.1f} images/s, {row['seconds']:.0f} s, {row['data_share']:.0%} waiting for data"
    )
