"""Track the progress and the measurements of an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_model import ranks
from srm_model.training.seeding import random_state, set_random_state

_KEPT = ("step", "seen", "counted", "seconds", "waited", "skipped", "failures")


class Progress:
    """Progress of an epoch.

    The first epoch has the number 0. Losses are means over whole batches, which include the images of all ranks. Times
    are measured in this process only.
    """

    def __init__(self, epoch: int, steps: int, device: torch.device) -> None:
        self.epoch, self.steps, self.device = epoch, steps, device
        self.step = 0  # finished optimiser steps
        self.seen = 0  # images
        self.counted = 0  # images whose losses are in `sums`; images of failed steps are not counted
        self.seconds = 0.0
        self.waited = 0.0  # seconds spent waiting for data
        self.skipped = 0  # steps that the loss scaler skipped
        self.failures = 0  # consecutive losses that were not finite
        self.whole = True  # false within a step
        self.sums: dict[str, Tensor] = {}  # losses times images
        self._capped = torch.zeros(
            2, device=device
        )  # on this rank: the number of images with an active gain cap, and the number of all images

    @property
    def done(self) -> bool:
        """Whether all steps of the epoch are finished."""
        return self.step == self.steps

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step} of {self.steps}"

    def add(self, losses: dict[str, Tensor] | None, images: int, *, skipped: bool) -> None:
        """Record a finished step.

        Args:
            losses: Losses of the step by name, each a mean over its batch; None if the losses are not finite.
            images: Number of images in the batch.
            skipped: Whether the loss scaler skipped the step.
        """
        if losses is not None:
            for name, value in losses.items():
                self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value * images
            self.counted += images
        self.seen += images
        self.skipped += skipped
        self.step += 1

    def count_capped(self, output: Any) -> None:
        """Count the images in a neck's output, and how many of them have an active gain cap.

        Passes without gradients are not counted.
        """
        gain = getattr(output, "gain", None)
        if gain is not None and torch.is_grad_enabled():
            acted = (gain.detach() < 1).sum()
            self._capped = self._capped + torch.stack([acted, torch.full_like(acted, len(gain))])

    def row(self) -> dict[str, Any]:
        """Return the measurements of the epoch for its row of the history.

        The measurements are the mean losses, the share of images with an active gain cap, the time in seconds, the
        throughput, and the share of time that was spent waiting for data.
        """
        capped, images = ranks.total(self._capped).tolist()
        return {
            **{name: float(value) / self.counted for name, value in self.sums.items()},
            **({"gain_active": capped / images} if images else {}),
            "seconds": self.seconds,
            "images_per_second": self.seen / self.seconds,
            "data_share": self.waited / self.seconds,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the progress and the states of random generators as JSON values.

        Every rank must call this method, because the values of all ranks are combined.
        """
        return {
            **{name: getattr(self, name) for name in _KEPT},
            "sums": {name: float(value) for name, value in self.sums.items()},
            "capped": ranks.total(self._capped).tolist(),
            "random": ranks.gather(random_state()),
        }

    def resume(self, values: dict[str, Any]) -> None:
        """Restore the progress and the random states from a result of `to_dict`.

        The number of ranks may have changed since the call of `to_dict`.
        """
        rank, _ = ranks.place()
        for name in _KEPT:
            setattr(self, name, values[name])
        self.sums = {name: torch.tensor(value, device=self.device) for name, value in values["sums"].items()}
        if rank == 0:
            self._capped = torch.tensor(values["capped"], device=self.device)
        states = values["random"]
        set_random_state(states[min(rank, len(states) - 1)])
