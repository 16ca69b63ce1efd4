"""Batch statistics over micro-batches and ranks (docs/METHOD.md §3.1, §3.2 and §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from srm_kernels import RMSScale, gate_losses, rms_scale

from . import ranks


class BatchStatistics:
    """Statistics of one batch that may be split into micro-batches and over ranks.

    Each forward pass adds the statistics of its micro-batch. `finish` then computes the statistics of the whole batch,
    over all micro-batches of all ranks. Every rank must add the same number of micro-batches before it calls `finish`.

    Attributes:
        current: Index of the micro-batch whose gate weights get gradients in `gate_losses`. Micro-batches are numbered
            in the order in which they were added.
        finished: Whether `finish` was called.
        sigma: σ of each link, (H,), by the link's name.
        norms: Root mean square of M for each image of the batch, (N,).
        median_rms: M₀ as it was before the update with this batch.
        averages: Copy of σ̄ that is updated with this batch, by the link's name.
    """

    def __init__(self) -> None:
        self.current = 0
        self.finished = False
        self.sigma: dict[str, Tensor] = {}
        self.norms: Tensor | None = None
        self.median_rms: Tensor | None = None
        self.averages: dict[str, Tensor] = {}
        self._moments: dict[str, list[Tensor]] = {}  # by link: rows as `_combined` reads
        self._single: dict[str, Tensor] = {}
        self._gates: list[Tensor] = []  # rows of [weights, norm]
        self._rows: Tensor | None = None
        self._starts: list[int] = []
        self._parts = 1

    def add_link(self, name: str, y: Tensor, *, backend: str | None) -> None:
        """Add the mean and σ of Y (B, H, N, d), the output of the link `name`, for one micro-batch.

        Y is detached from the autograd graph. `backend` is passed to `rms_scale`.
        """
        self.add_scale(name, rms_scale(y, backend=backend), y.shape[0] * y.shape[2])

    def add_scale(self, name: str, scale: RMSScale, tokens: int) -> None:
        """Add `scale`, the mean and σ of the output Y of the link `name`, for one micro-batch.

        `tokens` is the number of tokens in all images of the micro-batch.
        """
        mean, rms = (value.detach() for value in scale)
        self._single[name] = rms
        count = rms.new_full((len(rms), 1), tokens)
        packed = torch.cat([count, mean, count * rms[:, None].square()], 1)  # (H, 1 + d + 1)
        self._moments.setdefault(name, []).append(packed)

    def add_gate(self, weights: Tensor, norm: Tensor) -> None:
        """Add the gate weights and the norms of one micro-batch, both detached.

        `weights` is (B, S), and `norm` contains the root mean square of M for each image, (B,).
        """
        self._gates.append(torch.cat([weights, norm[:, None]], 1))

    def check_again(self, again: BatchStatistics) -> None:
        """On a CPU, raise RuntimeError if gradient checkpointing repeats an earlier forward pass, not the last one.

        `self` has the statistics of the last forward pass, and `again` has the statistics of the forward pass that
        gradient checkpointing has just repeated. If the repeated pass is an earlier one, its batch is another batch, so
        its gate weights and norms differ from those in `self`.
        """
        (one,), (other,) = self._gates, again._gates
        if one.device.type == "cpu" and (
            one.shape != other.shape or not one.allclose(other, 1e-3, equal_nan=True)
        ):
            raise RuntimeError(
                "gradient checkpointing repeated an earlier forward pass of the neck instead of the last one; expected "
                "one forward pass before each backward pass, or `statistics` whose method `finish` was called"
            )

    def finish(self) -> None:
        """Combine the statistics of all micro-batches of all ranks. Every rank must call this method."""
        self._parts = max(len(self._gates), 1) * ranks.place()[1]
        self.finished = True
        if self._parts == 1:
            self.sigma = self._single
        elif self._moments:
            packed = torch.stack([torch.stack(parts) for parts in self._moments.values()], 1)
            packed = ranks.stack(packed).flatten(0, 1)  # (parts, links, H, 1 + d + 1)
            self.sigma = dict(zip(self._moments, _combined(packed), strict=True))
        if self._gates:
            self._rows, start = ranks.concatenate(torch.cat(self._gates))
            self.norms = self._rows[:, -1]
            for gates in self._gates:
                self._starts.append(start)
                start += len(gates)

    def gate_losses(
        self, weights: Tensor, *, entropy_floor: float, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        """Return L_H and L_B of the whole batch (docs/METHOD.md §4).

        Only the gate weights of the `current` micro-batch get gradients, so the caller calls this method once for each
        micro-batch. The mean of the resulting gradients over all micro-batches and ranks is the gradient of the losses
        of the whole batch.

        Args:
            weights: Gate weights of the current micro-batch, (B, S).
            entropy_floor: H_min, in nats.
            backend: Backend of the operator.
        """
        if self._parts > 1:
            assert self._rows is not None
            rows, start = self._rows[:, :-1], self._starts[self.current]
            fixed = weights.detach()
            live = fixed + self._parts * (weights - fixed)
            weights = torch.cat([rows[:start], live, rows[start + len(weights) :]])
        return gate_losses(weights, entropy_floor=entropy_floor, backend=backend)


def _combined(packed: Tensor) -> Tensor:
    """Combine the moments of all micro-batches by Chan's formula; return σ, (…, H).

    `packed` is (parts, …, H, 1 + d + 1), with one part for each micro-batch of each rank. Along the last axis,
    the first element is the number of tokens, the next d elements are the mean, and the last element is the sum of
    squared deviations from this mean.
    """
    count, mean, squares = packed[..., 0], packed[..., 1:-1], packed[..., -1]
    share = count / count.sum(0)
    whole = (share[..., None] * mean).sum(0)
    spread = (mean - whole).square().sum(-1)
    return (squares.sum(0) / count.sum(0) + (share * spread).sum(0)).sqrt()
