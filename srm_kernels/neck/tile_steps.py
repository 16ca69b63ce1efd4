"""The steps that compute a tile of the fused neck in plain PyTorch (docs/METHOD.md §1 and 3).

`tiled.py` uses all functions and classes of this module; `batched.py` uses a few of them. In `tiled.py`, a tile is a
range of M positions of one image. Tokens are (M, C); logits and probabilities are (H, M, r).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.reference import NORM_FLOOR
from ..options import QuerySides
from ..pool.reference import adaptive_pool

DyT = tuple[Tensor, Tensor, Tensor]  # α, w and b


class Affine(NamedTuple):
    """The affine function x → weight x + bias."""

    weight: Tensor
    bias: Tensor


class Folded(NamedTuple):
    """The folded weights of a link's queries, in fp32 or fp64.

    `inner` and `outer` are affine functions. With DyT, Q = outer(tanh(inner(F))). Without DyT, `inner` is None, and
    Q = outer(F).
    """

    inner: Affine | None  # αA (C, C_i) and αa
    outer: Affine  # W_Q diag(w) (C, C) and W_Q b, or W_Q A (C, C_i) and W_Q a


class Tile(NamedTuple):
    """The positions from `start` to `stop` − 1 of a map: whole rows, or a part of one row."""

    start: int
    stop: int
    rows: slice
    columns: slice


class Workspace:
    """Named memory that all tiles reuse."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.held = like, dict[str, Tensor]()

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return a contiguous tensor with the given shape and undefined values, in the memory called `name`."""
        count = math.prod(shape)
        held = self.held.get(name)
        if held is None or held.numel() < count:
            held = self.held[name] = self.like.new_empty(count)
        return held[:count].view(shape)


class Grid:
    """The P×P cells of a map, and its tiles."""

    def __init__(self, height: int, width: int, size: int, positions: int, like: Tensor) -> None:
        self.height, self.width, self.size = height, width, size
        self.rows, self.columns = (cell_weights(length, size, like) for length in (height, width))
        self.tiles = tiles_of(height, width, positions)

    def pool(self, logits: Tensor, tile: Tile, into: Tensor, space: Workspace) -> None:
        """Replace logits (H, M, r) by probabilities, and add the tile's contribution to `into`.

        `into` is (H, P, P·r), the cell means of the probabilities.
        """
        H, _, r = logits.shape
        rows, columns = self.rows[:, tile.rows], self.columns[:, tile.columns]
        (P, height), width = rows.shape, columns.shape[1]
        probabilities = torch.softmax(logits, -1, out=logits).view(H * height, width, r)
        across = space("across", H * height, P, r)
        torch.bmm(columns.expand(H * height, P, width), probabilities, out=across)
        into.baddbmm_(rows.expand(H, P, height), across.view(H, height, P * r))

    def pool_backward(self, logits: Tensor, tile: Tile, grad: Tensor, space: Workspace) -> Tensor:
        """Return the gradient of a tile's logits (H, M, r).

        `grad` (H, P, P·r) is the gradient of the cell means of the probabilities. The logits are overwritten.
        """
        H, _, r = logits.shape
        rows, columns = self.rows[:, tile.rows], self.columns[:, tile.columns]
        (P, height), width = rows.shape, columns.shape[1]
        across = torch.bmm(rows.mT.expand(H, height, P), grad, out=space("across", H, height, P * r))
        found = space("dlogits", *logits.shape)
        by_rows = found.view(H * height, width, r)
        torch.bmm(columns.mT.expand(H * height, width, P), across.view(H * height, P, r), out=by_rows)
        probabilities = torch.softmax(logits, -1, out=logits)
        softmax_backward = torch.ops.aten._softmax_backward_data.out
        softmax_backward(found, probabilities, -1, found.dtype, grad_input=found)
        return found

    def pool_map(self, image: Tensor) -> Tensor:
        """Return the cell means (C, P, P) of a map (C, h, w), in the map's dtype."""
        return adaptive_pool(image, self.size)

    def pool_map_backward(self, grad: Tensor, out: Tensor) -> None:
        """Write the gradient of a map to `out` (C, h, w), from `grad`, the gradient of its cell means (P², C)."""
        cells = grad.mT.unflatten(-1, (self.size, self.size)).to(out.dtype).contiguous()
        torch.matmul(self.rows.mT @ cells, self.columns, out=out)

    def squash_(self, tokens: Tensor) -> Tensor:
        """Apply tanh in place."""
        return tokens.tanh_()

    def squash_backward_(self, grad: Tensor, tokens: Tensor) -> None:
        """Replace `grad`, the gradient of tokens = tanh(z), by the gradient of z."""
        torch.ops.aten.tanh_backward.grad_input(grad, tokens, grad_input=grad)


def tiles_of(height: int, width: int, positions: int) -> list[Tile]:
    """Return tiles of about the same size with at most `positions` positions."""
    across = -(-width // -(-width // positions))
    down = max(1, positions // width)
    down = -(-height // -(-height // down))
    return [
        Tile(
            top * width + left,
            (min(top + down, height) - 1) * width + min(left + across, width),
            slice(top, min(top + down, height)),
            slice(left, min(left + across, width)),
        )
        for top in range(0, height, down)
        for left in range(0, width, across)
    ]


def cell_weights(length: int, size: int, like: Tensor) -> Tensor:
    """Return the (P, length) matrix that averages an axis over the cells of adaptive average pooling."""
    cells, positions = (
        torch.arange(size, device=like.device)[:, None],
        torch.arange(length, device=like.device),
    )
    starts, stops = cells * length // size, -(-(cells + 1) * length // size)
    inside = ((starts <= positions) & (positions < stops)).to(like.dtype)
    return inside / (stops - starts)


def new_results(sides: QuerySides) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate P̄ (L, B, H, P², r) and the moments of Y = L X, which are the mean and Σ‖y − mean‖².

    P̄ is filled with zeros. The moments are not initialised.
    """
    keys = sides.keys
    B, H, _, d = keys[0].shape
    most = max(k.shape[2] for k in keys)
    shape = (len(keys), B, H) if sides.xs else (0,)
    probabilities = keys[0].new_zeros((len(keys), B, H, sides.size * sides.size, most))
    return probabilities, keys[0].new_empty((*shape, d) if sides.xs else shape), keys[0].new_empty(shape)


def fold(align: Affine, query_weight: Tensor, dyt: DyT | None) -> Folded:
    """Fold A, a and W_Q, and with DyT also α, w and b, into the weights of `Folded`.

    All arguments and results are fp32, or all are fp64.
    """
    if dyt is None:
        return Folded(None, Affine(query_weight @ align.weight, query_weight @ align.bias))
    alpha, weight, bias = dyt
    inner = Affine(alpha * align.weight, alpha * align.bias)
    return Folded(inner, Affine(query_weight * weight, query_weight @ bias))


def fold_backward(grads: Folded, align: Affine, query_weight: Tensor, dyt: DyT | None) -> list[Tensor]:
    """Return the gradients of A, a and W_Q, and with DyT also of α, w and b.

    `grads` has the gradients of the folded weights.
    """
    douter, dbias = grads.outer
    if dyt is None:
        dquery = douter @ align.weight.mT + dbias.outer(align.bias)
        return [query_weight.mT @ douter, query_weight.mT @ dbias, dquery]
    assert grads.inner is not None
    alpha, weight, bias = dyt
    dalpha = sum((grad * given).sum() for grad, given in zip(grads.inner, align, strict=True))
    assert isinstance(dalpha, Tensor)
    return [
        *(alpha * grad for grad in grads.inner),
        douter * weight + dbias.outer(bias),
        *(dalpha, (douter * query_weight).sum(0), query_weight.mT @ dbias),
    ]


def queries_of(tokens: Tensor, outer: Affine, heads: int, space: Workspace) -> Tensor:
    """Return Q (H, M, d), a view of (M, C)."""
    out = space("queries", tokens.shape[0], outer.weight.shape[0])
    return (
        torch.addmm(outer.bias, tokens, outer.weight.mT, out=out).unflatten(-1, (heads, -1)).transpose(0, 1)
    )


def normalise_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x from `grad`, the gradient of the normalised rows x·√d/(‖x‖ + 1e-6)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    along = (x * grad).sum(-1, keepdim=True) / (norm * (norm + NORM_FLOOR))
    along = along.masked_fill(norm == 0, 0)  # the derivative of the norm at 0 is 0, as in torch
    return (x.shape[-1] ** 0.5 / (norm + NORM_FLOOR)) * (grad - x * along)


class Moments:
    """Accumulate the mean (H, d) and Σ‖y − mean‖² (H,) of Y = L X over the tiles of an image.

    Two steps avoid cancellation when the mean of Y is large. First, `add` computes L (X − c), where c is the
    mean of X over the landmarks. Each row of L sums to 1, so L (X − c) = Y − c, and `results` adds c to the
    mean of Y − c. Second, `add` computes the mean and Σ‖y − mean‖² of its tile alone, and then merges both
    values with those of the earlier tiles.
    """

    def __init__(self, X: Tensor) -> None:
        self.centre = X.mean(-2, keepdim=True)
        self.X, self.count = X - self.centre, 0
        self.mean, self.spread = torch.zeros_like(X[:, 0]), torch.zeros_like(X[:, 0, 0])

    def add(self, probabilities: Tensor, space: Workspace) -> None:
        """Add the probabilities L (H, M, r) of a tile."""
        H, M, _ = probabilities.shape
        Y = torch.bmm(probabilities, self.X, out=space("outputs", H, M, self.X.shape[-1]))
        mean = Y.mean(1)
        apart, count = mean - self.mean, self.count + M
        within = Y.sub_(mean[:, None]).square_().sum((1, 2))
        self.spread += within + apart.square().sum(-1) * (self.count * M / count)
        self.mean += apart * (M / count)
        self.count = count

    def results(self) -> tuple[Tensor, Tensor]:
        """Return the mean of Y (H, d) and Σ‖y − mean‖² (H,) over all tiles that were added."""
        return self.mean + self.centre[:, 0], self.spread
