"""The query side of the fused neck in plain PyTorch on a GPU, tile by tile (docs/METHOD.md §1 and 3).

A tile contains the same positions of every image, so a few operations on large tensors process the whole
batch. Like `tiled.py` on a CPU, this module keeps tokens, queries and probabilities of only one tile at a
time in memory. The backward pass computes each tile again. The formulas and dtypes are those of
`reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..options import QuerySides
from ..registration import recording
from . import reference
from .tile_steps import Moments, Workspace, cell_weights, new_results, tiles_of

POSITIONS = 4096  # approximate positions per tile; logits of 8 images, 8 heads and 64 landmarks are then 64 MiB in fp32


def _tiles(m: Tensor, size: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield each tile of a map: the slice of its M positions, and their weights (P², M) in the means of P² cells."""
    height, width = m.shape[2:]
    rows, columns = (cell_weights(length, size, like) for length in (height, width))
    for tile in tiles_of(height, width, POSITIONS):
        weights = torch.kron(rows[:, tile.rows].contiguous(), columns[:, tile.columns].contiguous())
        yield slice(tile.start, tile.stop), weights


def pooled_links(sides: QuerySides) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return P̄, pool(F) and the moments of Y = L X, as the reference does."""
    probabilities, means, spreads = new_results(sides)
    space = Workspace(sides.keys[0])
    for number, m in enumerate(sides.maps):
        links, F = sides.links_to(number), m.flatten(2)
        moments = {link: Moments(sides.xs[link].flatten(0, 1)) for link in links if sides.xs}
        for tile, weights in _tiles(m, sides.size, sides.keys[0]):
            for link in links:
                K = sides.keys[link]
                L = reference.landmark_probabilities(F[..., tile], sides.parameters(link), K, sides)
                probabilities[link, ..., : K.shape[2]] += weights @ L
                if sides.xs:
                    moments[link].add(L.flatten(0, 1), space)
        for link, found in moments.items():
            for into, moment in zip((means, spreads), found.results(), strict=True):
                into[link] = moment.view_as(into[link])
    return probabilities, reference.pooled_maps(sides), means, spreads


def pooled_links_backward(
    grads: Sequence[Tensor], results: Sequence[Tensor], sides: QuerySides
) -> list[Tensor]:
    """Return the gradients of the maps, of all links' parameters A, a, α, w, b and W_Q, and of the keys."""
    maps, keys, wide = sides.maps, sides.keys, sides.keys[0].dtype
    given = [[*sides.parameters(link), K] for link, K in enumerate(keys)]
    parameters = [[t.to(wide) for t in tensors] for tensors in given]
    sums = [[torch.zeros_like(t) for t in tensors] for tensors in parameters]
    dmaps = [torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in maps]
    dmeans = grads[1].split([m.shape[1] for m in maps], -1)
    for number, (m, dmap, dmean) in enumerate(zip(maps, dmaps, dmeans, strict=True)):
        F = m.flatten(2)
        for tile, weights in _tiles(m, sides.size, keys[0]):
            dF = dmean.mT.to(wide) @ weights
            for link in sides.links_to(number):
                dL = weights.mT @ grads[0][link, ..., : keys[link].shape[2]]
                with recording():
                    leaves = [t.detach().requires_grad_() for t in (F[..., tile], *parameters[link])]
                    L = reference.landmark_probabilities(leaves[0], leaves[1:-1], leaves[-1], sides)
                    found = torch.autograd.grad(L, leaves, dL)
                for total, part in zip((dF, *sums[link]), found, strict=True):
                    total += part
            dmap.flatten(2)[..., tile] = dF
    by_link = [
        [total.to(t.dtype) for total, t in zip(*pair, strict=True)] for pair in zip(sums, given, strict=True)
    ]
    dalign, dbias, dquery, *dsquashing, dkeys = zip(*by_link, strict=True)
    return [*dmaps, *dalign, *dbias, *(t for group in dsquashing for t in group), *dquery, *dkeys]
