"""How far an epoch has come, and what it has measured on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_model import ranks
from srm_model.training.seeding import random_state, set_random_state

_KEPT = ("step", "seen", "counted", "seconds", "waited", "skipped", "failures")


class Progress:
    """An epoch in the making. What is measured in it is the whole batches', but times are this process's own."""

    def __init__(self, epoch: int, steps: int, device: torch.device) -> None:
        self.epoch, self.steps, self.device = epoch, steps, device
        self.step = 0  # optimiser steps taken
        self.seen = 0  # images
        self.counted = 0  # images whose losses are in `sums`: those of steps that failed are not
        self.seconds = 0.0
        self.waited = 0.0  # seconds of those in which the next batch was not there yet
        self.skipped = 0  # steps that the loss scaler skipped
        self.failures = 0  # losses in a row, up to now, that were not finite
        self.whole = True  # no step is half done
        self.sums: dict[str, Tensor] = {}  # losses times images
        self._capped = torch.zeros(
            2, device=device
        )  # this rank's images on which the gain cap acted, and all

    @property
    def done(self) -> bool:
        """Whether every step of the epoch is taken."""
        return self.step == self.steps

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step} of {self.steps}"

    def add(self, losses: dict[str, Tensor] | None, images: int, *, skipped: bool) -> None:
        """A step, with its whole batch's mean losses, None where they are not finite, and size."""
        if losses is not None:
            for name, value in losses.items():
                self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value * images
            self.counted += images
        self.seen += images
        self.skipped += skipped
        self.step += 1

    def count_capped(self, output: Any) -> None:
        """Hear of a neck's output; nothing to count without a cap, or in a pass without gradients."""
        gain = getattr(output, "gain", None)
        if gain is not None and torch.is_grad_enabled():
            acted = (gain.detach() < 1).sum()
            self._capped = self._capped + torch.stack([acted, torch.full_like(acted, len(gain))])

    def row(self) -> dict[str, Any]:
        """Mean losses, share of capped images, speed and share of the time that was spent waiting for data."""
        capped, images = ranks.total(self._capped).tolist()
        return {
            **{name: float(value) / self.counted for name, value in self.sums.items()},
            **({"gain_active": capped / images} if images else {}),
            "seconds": self.seconds,
            "images_per_second": self.seen / self.seconds,
            "data_share": self.waited / self.seconds,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values to go on from, the generators' states included; every rank calls this."""
        return {
            **{name: getattr(self, name) for name in _KEPT},
            "sums": {name: float(value) for name, value in self.sums.items()},
            "capped": ranks.total(self._capped).tolist(),
            "random": ranks.gather(random_state()),
        }

    def resume(self, values: dict[str, Any]) -> None:
        """Go on from what `to_dict` gave, also with another number of ranks."""
        rank, _ = ranks.place()
        for name in _KEPT:
            setattr(self, name, values[name])
        self.sums = {name: torch.tensor(value, device=self.device) for name, value in values["sums"].items()}
        if rank == 0:
            self._capped = torch.tensor(values["capped"], device=self.device)
        states = values["random"]
        set_random_state(states[min(rank, len(states) - 1)])
