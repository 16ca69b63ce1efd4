"""Choose launch configurations for the Triton kernels of Nyström attention by fixed rules, without autotuning.

The configurations depend on r, d, the dtype and the compute capability of the GPU. The division of tokens
among programs also depends on N_q or N_k, but never on the batch. The sums of an image are therefore computed
in the same order in every batch. The disadvantage is that a small batch cannot use more programs per image than
a large batch, although a small batch needs more programs per image to keep a GPU busy.

The table shows estimated times of the forward pass of the key side, which computes K̃ and X from K and V. The
times are for an RTX 4090 in bf16, with leverage landmarks, r = 64 and d = 32. Each time is the sum over all
launches; the time of a launch is estimated from the instruction counts of the PTX emulator (`bench/ptx`). For
each head of each image, the keys are processed either by one program ("one program" in the table), or by several
programs, one for each part of 256 keys ("parts"). B images with H heads give B·H heads in total:

    keys     one program    parts, B·H = 1    parts, B·H = 64
    1,024    98 µs          44 µs             72 µs
      512    49 µs          44 µs             45 µs

With 512 keys, the division into parts would save at most 5 µs, but it would need four more launches. One
program therefore processes up to 512 keys. The results in `bench/results/simulated` were computed with this
limit. They have rows for 1,024 keys divided into parts, with B·H = 8 and B·H = 64. All other cases of the table
are not in these results. To simulate another limit, change `MOST_KEYS_OF_ONE_PROGRAM`.

All numbers of this module except `MOST_KEYS_OF_ONE_PROGRAM` are based on the registers and shared memory that
`python -m bench.resources` prints. They have not been tuned on a GPU yet. `python -m bench.tune_attention` measures
alternatives on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..devices import MOST_REGISTERS, pipeline_stages, register_limit

RANKS = (1, 128)
WIDTHS = (8, 128)
MOST_KEYS_OF_ONE_PROGRAM = 512  # with more keys, several programs share the key side
LEAST_KEYS_OF_A_PART = 256
LEAST_QUERIES_OF_A_PART = 512
LEAST_QUERIES_OF_A_GRADIENT = 1024  # each part writes 2 r d partial sums, which are read again
MOST_HELD = 64 * 64  # largest r·d for which two tiles, each split into two 32-bit parts, fit in 99 KiB
PIECE = 32  # landmarks in a piece of a tile that is too large
MOST_PARTS = 32  # limit for one head of one image: partial sums need O(r (r + d)) memory and not O(N r)

HALF_RATE = ((8, 6), (8, 9))  # GeForce: bf16 products at half rate are the bottleneck
ROOMY = ((8, 0), (9, 0), (10, 0))  # data-centre GPUs: more shared memory per block


class Configuration(NamedTuple):
    """A launch configuration: tokens per tile, warps per program, pipeline stages and register limit per thread.

    With 8 warps and `registers=None`, the compiler limits the registers so that two programs fit on one multiprocessor.
    This limit can cause register spills.
    """

    block: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Return the options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, **register_limit(self.registers)}


class Division(NamedTuple):
    """How the tokens of one head of one image are divided among `parts` programs; the last can have fewer tokens."""

    tokens: int
    parts: int


def query_forward(rank: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Configuration:
    """Return the configuration of the kernel for Y. A program holds [block, r] probabilities and [block, d] tokens."""
    if _large(rank, d) or _heavy(rank, d, dtype):
        return Configuration(32, 8, 1)
    # Without an explicit limit, the compiler uses at most 128 or 168 registers per thread, and spills.
    limit = None if dtype == torch.bfloat16 else MOST_REGISTERS
    return Configuration(64, 4, pipeline_stages(capability) if capability in ROOMY else 1, limit)


def query_backward(rank: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Configuration:
    """Return the configuration of the kernels for dQ, dX and dK̃.

    The sums dX and dK̃ stay in registers. Each is [r, d], or [PIECE, d] if K̃ and X are read in pieces.
    """
    if _padded(d) <= 32:
        return Configuration(16, 8 if dtype == torch.float32 and _padded(rank) > 32 else 4, 1)
    if _large(rank, d):
        return Configuration(16, 8, 1, MOST_REGISTERS)
    if dtype == torch.float32 and not _heavy(rank, d, dtype):
        return Configuration(16, 8, 1)
    # With a limit of 255 registers, bf16 kernels spill on compute capability 12.0. Without a limit, exact products
    # spill on 8.6.
    limit = MOST_REGISTERS if query_backward_exact(rank, d, dtype, capability) else None
    return Configuration(32, 8, 1, limit)


def query_backward_exact(rank: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Return whether the kernels of `query_backward` must multiply in plain fp32, without tensor cores.

    The result is True where products in three tf32 passes would need more than 99 KiB of shared memory.
    """
    return held(rank, d) and _heavy(rank, d, dtype) and capability not in ROOMY


def key_side(rank: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Configuration:
    """Return the configuration of all kernels of the key side except the kernel for dK and dV (see `key_tokens`)."""
    return Configuration(16 if _large(rank, d) or _heavy(rank, d, dtype) else 32, 8, 1, MOST_REGISTERS)


def key_tokens(rank: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Configuration:
    """Return the configuration of the kernel for dK and dV of a tile of keys."""
    if dtype == torch.bfloat16 and not _large(rank, d):
        # The warps of a program divide the rows of a product in groups of rows. If there are more warps than groups,
        # some warps repeat the work of others. With two warps per program, a few registers spill on compute capability
        # 8.0 and 12.0.
        return Configuration(32, 2 if _padded(d) <= 32 and capability in HALF_RATE else 4, 1)
    return Configuration(16, 4 if _padded(d) <= 32 else 8, 1)


def held(rank: int, d: int) -> bool:
    """Return whether a program holds K̃ and X of one head of one image completely; if not, it reads them in pieces."""
    return _padded(rank) * _padded(d) <= MOST_HELD


def landmarks_of_a_program(rank: int, d: int) -> int:
    """Return how many rows of K̃ and X a program holds at once: all r rows (padded), or PIECE."""
    return _padded(rank) if held(rank, d) else PIECE


def landmarks_of_a_gradient(rank: int, d: int, dtype: torch.dtype) -> int:
    """Return how many rows of the gradient of K̃ a program of the key side sums in registers."""
    rows = landmarks_of_a_program(rank, d)
    return min(PIECE, rows) if _heavy(rank, d, dtype) else rows


def one_launch(keys: int, rank: int, d: int) -> bool:
    """Return whether one program loops over all keys of one head of one image in the forward pass."""
    return keys <= MOST_KEYS_OF_ONE_PROGRAM and not _large(rank, d)


def one_launch_backward(keys: int, rank: int, d: int, dtype: torch.dtype) -> bool:
    """Return whether one program loops over all keys of one head of one image in the backward pass.

    In the backward pass, the steps on r×r matrices leave fewer registers for the loop over the keys than in the
    forward pass. With dtypes other than bf16, the conditions of `one_launch` are therefore not sufficient: r·d, with
    r and d padded, must also be at most 64 · 32.
    """
    return one_launch(keys, rank, d) and not _heavy(rank, d, dtype)


def _large(rank: int, d: int) -> bool:
    """Return whether r or d is above 64; if so, some kernels cannot keep a tile in registers."""
    return _padded(rank) > 64 or _padded(d) > 64


def _heavy(rank: int, d: int, dtype: torch.dtype) -> bool:
    """Return whether tiles are large and products with this dtype use the precision "tf32x3".

    The precision "tf32x3" splits each factor into two 32-bit parts.
    """
    return dtype != torch.bfloat16 and _padded(rank) * _padded(d) > 64 * 32


def divide(tokens: int, block: int, least: int) -> Division:
    """Divide tokens among at most `MOST_PARTS` programs.

    Every program except the last gets the same number of tokens, which is a multiple of `block` and at least
    `least`. The last program gets the remaining tokens.
    """
    share = max(least, -(-tokens // MOST_PARTS))
    share = -(-share // block) * block
    return Division(share, -(-tokens // share))


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
