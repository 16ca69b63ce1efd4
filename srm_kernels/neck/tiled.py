"""The query side of the fused neck on a CPU, tile by tile (docs/METHOD.md §1 and 3; section 3.2 of the article).

    T = A F + a   Q = DyT(T) W_Q   L = softmax(Q K̃ᵀ s)   P̄ = pool(L)

A tile has about 512 positions, so its tokens, queries and probabilities stay in the cache. These tensors are
never stored for a whole map. Each tile adds its contribution to P̄. The backward pass computes the tensors of
each tile again. Consecutive linear steps are folded into one weight. The scale s and the normalisation of the
keys are folded into K̃.

Images are computed one by one, so the result of an image has the same bits alone and in a batch. A, a and W_Q
are first rounded to the dtype of F. All computations then use the wide dtype, which is fp64 if F is fp64,
else fp32.

torch computes the products. The other steps are softmax, pooling and tanh. If the C++ library is built, it computes
these steps (`tile_native.py`). Otherwise torch computes these steps (`tile_steps.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ..attention.reference import normalised_key, rms_normalise
from ..checks import wide_dtype
from ..options import QuerySides
from .tile_native import grid_of
from .tile_steps import (
    Affine,
    DyT,
    Folded,
    Grid,
    Moments,
    Tile,
    Workspace,
    fold,
    fold_backward,
    new_results,
    normalise_backward,
    queries_of,
)

POSITIONS = 512  # approximate positions per tile; logits of 8 heads and 64 landmarks in fp32 are then 1 MiB
ALIGNMENT = 64  # bytes; the bits of a library's product can depend on the alignment of its operands


class _Link:
    """One link and the grid of its target.

    A, a and W_Q are rounded to F's dtype. All parameters are then folded (see `Folded`) in the wide dtype, which is
    fp64 if F is fp64, else fp32.
    """

    def __init__(self, sides: QuerySides, number: int, space: Workspace) -> None:
        features, keys = sides.maps[sides.targets[number]], sides.keys[number]
        wide = keys.dtype
        self.features, self.keys, self.scale, self.qk_norm = features, keys, sides.scale, sides.qk_norm
        self.parameters = parameters = sides.parameters(number)
        weight, bias, self.query_weight = (t.to(features.dtype).to(wide) for t in parameters[:3])
        self.align = Affine(weight, bias)
        alpha_weight_bias = tuple(t.to(wide) for t in parameters[3:])
        self.dyt = cast(DyT, alpha_weight_bias) if alpha_weight_bias else None
        self.folded = fold(self.align, self.query_weight, self.dyt)
        self.grid, self.space = _grid(features, sides.size, keys), space

    def landmarks(self, image: int) -> Tensor:
        """Return K̃ (H, r, d), normalised according to `qk_norm`, times the scale."""
        return normalised_key(self.keys[image], self.qk_norm) * self.scale

    def tiles(self, image: int) -> Iterator[tuple[Tile, Tensor]]:
        """Yield every tile of one image, together with F (C_i, M) of the tile in the wide dtype."""
        flat = self.features[image].flatten(1)
        narrow = flat.dtype != self.keys.dtype
        if not narrow and not _is_aligned(flat):
            flat = flat.clone()
        for tile in self.grid.tiles:
            F = flat[:, tile.start : tile.stop]
            yield tile, self.space("features", *F.shape).copy_(F) if narrow else F

    def tokens(self, F: Tensor) -> Tensor:
        """Return tanh(inner(F)) (M, C) or, if the link has no DyT, Fᵀ (M, C_i)."""
        inner = self.folded.inner
        if inner is None:
            return F.mT
        out = self.space("tokens", F.shape[1], len(inner.bias))
        return self.grid.squash_(torch.addmm(inner.bias, F.mT, inner.weight.mT, out=out))

    def queries(self, tokens: Tensor) -> Tensor:
        """Return Q (H, M, d) before its normalisation."""
        return queries_of(tokens, self.folded.outer, self.keys.shape[1], self.space)

    def logits(self, Q: Tensor, K: Tensor) -> Tensor:
        """Return Q Kᵀ (H, M, r)."""
        return torch.bmm(Q, K.mT, out=self.space("logits", *Q.shape[:2], K.shape[1]))

    def normalised(self, Q: Tensor) -> Tensor:
        return rms_normalise(Q) if self.qk_norm == "both" else Q

    def forward(self, image: int, X: Tensor | None) -> tuple[Tensor, Moments | None]:
        """Return P̄ (H, P, P·r) of one image and, if X (H, r, d) is given, the moments of L X."""
        K, P = self.landmarks(image), self.grid.size
        pooled = self.space("pooled", K.shape[0], P, P * K.shape[1]).zero_()
        moments = None if X is None else Moments(X)
        for tile, F in self.tiles(image):
            logits = self.logits(self.normalised(self.queries(self.tokens(F))), K)
            self.grid.pool(logits, tile, pooled, self.space)
            if moments is not None:
                moments.add(logits, self.space)
        return pooled, moments


class _Backward:
    """The gradients of one link's parameters, summed over images and tiles."""

    def __init__(self, link: _Link) -> None:
        self.link = link
        inner, outer = link.folded
        self.inner = None if inner is None else Affine(*map(torch.zeros_like, inner))
        self.outer = Affine(*map(torch.zeros_like, outer))

    def image(self, number: int, dpooled: Tensor, dmap: Tensor) -> Tensor:
        """Backpropagate dP̄ (H, P, P·r) of one image and return dK̃ (H, r, d).

        Add the gradients of the folded weights to `self.inner` and `self.outer`. Add dF (C_i, h·w) to `dmap`.
        """
        link = self.link
        K = link.landmarks(number)
        dkeys = link.space("dkeys", *K.shape).zero_()
        for tile, F in link.tiles(number):
            tokens = link.tokens(F)
            Q = link.queries(tokens)
            normalised = link.normalised(Q)
            dlogits = link.grid.pool_backward(link.logits(normalised, K), tile, dpooled, link.space)
            dkeys.baddbmm_(dlogits.mT, normalised)
            self._tokens(F, tokens, self._queries(dlogits, K, Q), dmap[:, tile.start : tile.stop])
        dkeys = dkeys * link.scale
        return normalise_backward(dkeys, link.keys[number]) if link.qk_norm else dkeys

    def _queries(self, dlogits: Tensor, K: Tensor, Q: Tensor) -> Tensor:
        """Return dQ (M, C), the gradient of Q before its normalisation."""
        H, M, d = Q.shape
        dqueries = self.link.space("dqueries", M, H * d)
        by_heads = dqueries.view(M, H, d).transpose(0, 1)
        torch.bmm(dlogits, K, out=by_heads)
        if self.link.qk_norm == "both":
            by_heads.copy_(normalise_backward(by_heads, Q))
        return dqueries

    def _tokens(self, F: Tensor, tokens: Tensor, dqueries: Tensor, dfeatures: Tensor) -> None:
        """Backpropagate dQ (M, C) of one tile.

        Add the gradients of the folded weights to `self.inner` and `self.outer`. Add dF (C_i, M) to `dfeatures`.
        """
        inner, outer = self.link.folded
        _add(self.outer, dqueries, tokens)
        if inner is None or self.inner is None:
            dfeatures.addmm_(outer.weight.mT, dqueries.mT)
            return
        dtokens = torch.mm(dqueries, outer.weight, out=self.link.space("dtokens", *tokens.shape))
        self.link.grid.squash_backward_(dtokens, tokens)
        _add(self.inner, dtokens, F.mT)
        dfeatures.addmm_(inner.weight.mT, dtokens.mT)

    def parameters(self) -> list[Tensor]:
        """Return the gradients of A, a, W_Q and, with DyT, α, w and b, each in the shape and dtype of its parameter."""
        link = self.link
        found = fold_backward(Folded(self.inner, self.outer), link.align, link.query_weight, link.dyt)
        return [
            grad.reshape(given.shape).to(given.dtype)
            for grad, given in zip(found, link.parameters, strict=True)
        ]


def pooled_links(sides: QuerySides) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return P̄ (links, B, H, P², r), pool(F) (B, P², ΣC_i), and the mean and spread of the rows of Y = L X.

    X is `sides.xs`. The results are described in detail in the docstring of `reference.pooled_links`.
    """
    keys, xs, size = sides.keys, sides.xs, sides.size
    B, H = keys[0].shape[:2]
    probabilities, means, spreads = new_results(sides)
    space = Workspace(keys[0])
    for number in range(len(keys)):
        link = _Link(sides, number, space)
        rank = keys[number].shape[2]
        for image in range(B):
            pooled, moments = link.forward(image, xs[number][image] if xs else None)
            probabilities[number, image, ..., :rank] = pooled.view(H, size * size, rank)
            if moments is not None:
                means[number, image], spreads[number, image] = moments.results()
    grids = [_grid(m, size, keys[0]) for m in sides.maps]
    pooled_maps = [torch.stack([*map(grid.pool_map, m)]) for grid, m in zip(grids, sides.maps, strict=True)]
    return probabilities, torch.cat([m.flatten(2).mT for m in pooled_maps], -1), means, spreads


def pooled_links_backward(
    grads: Sequence[Tensor], results: Sequence[Tensor], sides: QuerySides
) -> list[Tensor]:
    """Return the gradients of the maps, of all links' parameters A, a, α, w, b and W_Q, and of the keys."""
    maps, keys, size = sides.maps, sides.keys, sides.size
    wide = wide_dtype(maps[0].dtype)
    space = Workspace(keys[0])
    links = [_Backward(_Link(sides, number, space)) for number in range(len(keys))]
    dkeys = [torch.zeros(k.shape, dtype=k.dtype, device=k.device) for k in keys]
    dmaps = [torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in maps]
    dmeans = grads[1].split([m.shape[1] for m in maps], -1)
    for number, dmap in enumerate(dmaps):
        grid = _grid(dmap, size, keys[0])
        into_it = sides.links_to(number)
        for image, given in enumerate(dmap):
            in_place = given.dtype == wide and _is_aligned(given)
            whole = given if in_place else space("dmap", *given.shape)
            grid.pool_map_backward(dmeans[number][image], whole)
            for i in into_it:
                dpooled = grads[0][i, image, ..., : keys[i].shape[2]]
                dpooled = dpooled.reshape(len(dpooled), size, -1).contiguous()
                dkeys[i][image] = links[i].image(image, dpooled, whole.flatten(1))
            if not in_place:
                given.copy_(whole)
    dalign, dbias, dquery, *dsquashing = zip(*(link.parameters() for link in links), strict=True)
    return [*dmaps, *dalign, *dbias, *(t for group in dsquashing for t in group), *dquery, *dkeys]


def _add(sums: Affine, grad: Tensor, inputs: Tensor) -> None:
    """Add the gradients of an affine function's weight and bias to `sums`.

    `grad` (M, C) is the gradient of the function's outputs, and `inputs` (M, c) are its inputs. The gradient of the
    weight is `grad`ᵀ · `inputs`; the gradient of the bias is the sum of the rows of `grad`.
    """
    sums.weight.addmm_(grad.mT, inputs)
    sums.bias.add_(grad.sum(0))


def _grid(m: Tensor, size: int, like: Tensor) -> Grid:
    height, width = m.shape[2:]
    return grid_of(height, width, size, POSITIONS, like)


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0
