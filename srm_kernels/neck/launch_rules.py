"""Launch rules of the fused neck's Triton kernels: tile sizes, numbers of warps and register limits.

The rules depend on shape, dtype and device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..devices import register_limit
from ..parts import padded, power_of_two


class Tile(NamedTuple):
    """How the columns of a map are divided: into `blocks` tiles of `columns` columns."""

    columns: int
    blocks: int


def tile_of(width: int, positions: int) -> Tile:
    """Divide the columns of a map into tiles.

    The number of columns per tile is `width`, rounded up to a power of two, but at most `positions`.
    """
    columns = min(positions, power_of_two(width))
    return Tile(columns, -(-width // columns))


class Strips(NamedTuple):
    """How a row of pooling cells is divided into strips.

    A strip is a group of neighbouring cells that together are at most as wide as one tile. A cell that is
    wider than a tile is a strip of its own, and this strip has several tiles side by side. No cell is divided
    among strips, so the program of a strip computes the complete pooled probabilities P̄ of its cells.

    Attributes:
        cells: Cells per strip.
        strips: Strips per row of cells.
        columns: Map columns per tile.
        across: Number of tiles side by side in one strip.
    """

    cells: int
    strips: int
    columns: int
    across: int


def strips_of(width: int, size: int, positions: int) -> Strips:
    """Divide a row of `size` cells evenly among strips.

    The number of strips is the smallest for which each strip fits in one tile of at most `positions` columns. If a
    single cell does not fit, each cell is a strip.
    """

    def widest(cells: int) -> int:
        starts = range(0, size, cells)
        return max(-(-min(j + cells, size) * width // size) - j * width // size for j in starts)

    fitting = [cells for cells in range(1, size + 1) if widest(cells) <= positions] or [1]
    strips = -(-size // fitting[-1])
    cells = next(cells for cells in fitting if -(-size // cells) == strips)
    columns = min(positions, power_of_two(widest(cells)))
    return Strips(cells, strips, columns, -(-widest(cells) // columns))


def forward_positions(
    rank: int, d: int, dtype: torch.dtype, statistics: bool, capability: tuple[int, int]
) -> int:
    """Return the number of positions of a tile in the forward kernel that uses absorbed queries.

    The docstring of `forward_kernels` explains absorbed queries. The tile is so small that it fits in registers.
    If `statistics` is true, the tile and X [r, d] fit in registers together. The numbers of positions were chosen
    from the register counts that `python -m bench.resources` prints.
    """
    if not statistics:
        return 32 if capability >= (12, 0) else 64
    return 32 if dtype == torch.bfloat16 and not heavy(rank, d) else 16


class TokenTile(NamedTuple):
    """Sizes of a tile [positions, channels] of the tokens T = A F + a.

    Attributes:
        positions: Largest number of positions (tokens) per tile.
        channels: Number of channels of T that one step computes.
        chunk: Number of channels of F that are read at a time.
        warps: Warps per program.
    """

    positions: int
    channels: int
    chunk: int
    warps: int = 8


def token_tile(
    rank: int, d: int, dtype: torch.dtype, statistics: bool, capability: tuple[int, int]
) -> TokenTile:
    """Return a tile that fits in registers.

    A program has 8 warps, with one exception. It has 4 warps if all these conditions hold: `statistics` is
    true, the dtype is bf16, `heavy(rank, d)` is false, and the compute capability is below 9.0. In this case,
    8 warps are too many, because some of them would repeat the work of others. From compute capability 9.0
    on, a program still has 8 warps, because 4 warps spill registers on 9.0 and 12.0.
    """
    large = heavy(rank, d)
    chunk = 16 if dtype == torch.float32 and not (large and capability == (9, 0)) else 32
    wide = dtype == torch.float32 or (statistics and dtype != torch.bfloat16)
    if wide or padded(rank) * padded(d) > 64 * 64:
        return TokenTile(16, 32, chunk)
    if statistics and not large and capability < (9, 0):
        return TokenTile(32, 64, chunk, 4)
    if large or statistics or capability >= (12, 0):
        return TokenTile(32, 32, chunk)
    return TokenTile(64, 64, chunk)


def strip_warps(rank: int, d: int, dtype: torch.dtype, statistics: bool) -> int:
    """Return the number of warps of a program in the forward kernel that uses absorbed queries.

    The docstring of `forward_kernels` explains absorbed queries. A program has 2 warps if `statistics` is true,
    the dtype is bf16 and `heavy(rank, d)` is false. A tile then has 32 positions, and two warps cover the 32 rows
    of a product. More warps would repeat the work of these two. In all other cases, a program has
    `warps(rank, d)` warps.
    """
    return 2 if dtype == torch.bfloat16 and statistics and not heavy(rank, d) else warps(rank, d)


def heavy(rank: int, d: int) -> bool:
    """Return whether [r, d] tiles are larger than in the default neck."""
    return padded(rank) * padded(d) > 64 * 32


POOLED_ELEMENTS = 2048  # elements of a tile of channels and columns for pooling


def warps(rank: int, d: int) -> int:
    """Return the number of warps of a program that holds [positions, r] and [r, d] tiles."""
    return 8 if heavy(rank, d) else 4


def backward_tile(rank: int, d: int, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Return the number of positions of a tile, and the launch options.

    If a tile has as many positions as landmarks, Triton distributes the warps along the positions, so the softmax over
    the landmarks needs no exchange between warps. The default neck has 64 landmarks. In bf16, if `heavy(rank, d)` is
    false, a tile therefore has 64 positions.
    """
    if dtype == torch.bfloat16 and not heavy(rank, d):
        return 64, {"num_warps": 4, "num_stages": 1, **register_limit()}
    if heavy(rank, d):  # without a limit, the compiler spills to run two programs on one multiprocessor
        return 16, {"num_warps": 8, "num_stages": 1, **register_limit()}
    return 16, {"num_warps": 4 if padded(rank) * padded(d) < 64 * 32 else 8, "num_stages": 1}


class SquashTile(NamedTuple):
    """Sizes of a tile: positions, channels, and the length of the inner axis of one matrix product (`chunk`)."""

    positions: int
    channels: int
    chunk: int


def squash_forward_tile(dtype: torch.dtype) -> SquashTile:
    """Return the tile of the forward kernel in `squash_kernels`.

    The tile is so small that the queries Q of all its positions, with up to 256 channels each, stay in registers.
    """
    return SquashTile(32, 32, 16) if dtype == torch.float32 else SquashTile(64, 64, 32)


def squash_backward_tile(dtype: torch.dtype) -> SquashTile:
    """Return the tile of the backward kernel in `squash_kernels`.

    The tile is so small that T and dD of all its positions and channels stay in registers. The docstring of
    `squash_kernels` defines T and D; dD is the gradient of D.
    """
    return SquashTile(64, 64, 16) if dtype == torch.float32 else SquashTile(128, 64, 32)
