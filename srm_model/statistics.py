"""Statistics of one optimiser step over micro-batches and ranks (docs/METHOD.md §3.1, 3.2 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from srm_kernels import RMSScale, gate_losses, rms_scale

from . import ranks


class BatchStatistics:
    """σ of every link, ‖M‖_F and gate weights of every image, over the micro-batches of all ranks.

    One forward pass of each micro-batch adds to it, `finish` combines, and then `sigma`, `norms` and `gate_losses`
    are those of the whole batch. Every rank must add the same number of micro-batches, then finish.
    """

    def __init__(self) -> None:
        self.current = (
            0  # the micro-batch whose gate weights carry gradients, in the order in which they were added
        )
        self.finished = False
        self.sigma: dict[str, Tensor] = {}  # by link, (H,)
        self.norms: Tensor | None = None  # (N,)
        self.median_rms: Tensor | None = None  # M₀ before the batch
        self.averages: dict[str, Tensor] = {}  # σ̄ after it, by link
        self._moments: dict[str, list[Tensor]] = {}  # by link: rows of [count, mean, sum of squares]
        self._single: dict[str, Tensor] = {}
        self._gates: list[Tensor] = []  # rows of [weights, norm]
        self._rows: Tensor | None = None
        self._starts: list[int] = []
        self._parts = 1

    def add_link(self, name: str, y: Tensor, *, backend: str | None) -> None:
        """One micro-batch's Y (B, H, N, d) of a link, detached."""
        self.add_scale(name, rms_scale(y, backend=backend), y.shape[0] * y.shape[2])

    def add_scale(self, name: str, scale: RMSScale, tokens: int) -> None:
        """The same from the statistic of a link's Y over `tokens` tokens."""
        mean, rms = (value.detach() for value in scale)
        self._single[name] = rms
        count = rms.new_full((len(rms), 1), tokens)
        packed = torch.cat([count, mean, count * rms[:, None].square()], 1)  # (H, 1 + d + 1)
        self._moments.setdefault(name, []).append(packed)

    def add_gate(self, weights: Tensor, norm: Tensor) -> None:
        """One micro-batch's gate weights (B, S) and norms (B,), detached."""
        self._gates.append(torch.cat([weights, norm[:, None]], 1))

    def check_again(self, again: BatchStatistics) -> None:
        """RuntimeError, on a CPU, where a pass that is taken again is not of these images."""
        (one,), (other,) = self._gates, again._gates
        if one.device.type == "cpu" and (
            one.shape != other.shape or not one.allclose(other, 1e-3, equal_nan=True)
        ):
            raise RuntimeError(
                "gradient checkpointing takes another pass of the neck again than its last one; expected one training "
                "pass before each backward pass, or finished `statistics`"
            )

    def finish(self) -> None:
        """Combine what was added, on all ranks."""
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
        """Entropy and balance loss of the whole batch, where the `current` micro-batch's weights (B, S) are live.

        Their gradients, averaged over micro-batches and ranks, are those of the whole batch.
        """
        if self._parts > 1:
            assert self._rows is not None
            rows, start = self._rows[:, :-1], self._starts[self.current]
            fixed = weights.detach()
            live = fixed + self._parts * (weights - fixed)
            weights = torch.cat([rows[:start], live, rows[start + len(weights) :]])
        return gate_losses(weights, entropy_floor=entropy_floor, backend=backend)


def _combined(packed: Tensor) -> Tensor:
    """σ of the union of samples, (…, H), from (parts, …, H, [count, mean, sum of squares]), by Chan's formula."""
    count, mean, squares = packed[..., 0], packed[..., 1:-1], packed[..., -1]
    share = count / count.sum(0)
    whole = (share[..., None] * mean).sum(0)
    spread = (mean - whole).square().sum(-1)
    return (squares.sum(0) / count.sum(0) + (share * spread).sum(0)).sqrt()
