"""How the Triton kernels of Nyström attention are launched: one readable rule on shape and device, no tuning.

How tokens are divided among programs depends on N_q or N_k alone, never on the batch: sums are then taken in the same
order whatever stands beside a sample. `python -m bench.tune_attention` measures the alternatives on a GPU and prints
the table that the numbers below should be taken from; they were chosen by registers and shared memory so far, as
`python -m bench.resources` prints them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime import launch_device, pipeline_stages

RANKS = (1, 128)
WIDTHS = (8, 128)
MOST_KEYS_OF_ONE_PROGRAM = 1024  # above, the key side is divided among programs
LEAST_KEYS_OF_A_PART = 512
LEAST_QUERIES_OF_A_PART = 512
LEAST_QUERIES_OF_A_GRADIENT = 1024  # a part more writes 2 r d partial sums, and is read again
MOST_HELD = 64 * 64  # numbers of an [r, d] tile that fit in 99 KiB in parts of 32 bits, beside a second one
PIECE = 32  # landmarks of a larger tile that are read at once
MOST_REGISTERS = 255
MOST_PARTS = 32  # of one (b, h), so that partial sums take O(r (r + d)) and not O(N r)


HALF_RATE = ((8, 6), (8, 9))  # GeForce: bf16 products at half rate limit a kernel first
ROOMY = ((8, 0), (9, 0), (10, 0))  # data-centre cards: more shared memory a block


class Configuration(NamedTuple):
    """Tokens of a tile, warps of a program, depth of the software pipeline, and registers a thread may have.

    Where the compiler is left to choose among 8 warps' registers, it may spill some to let two programs share a
    multiprocessor.
    """

    block: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


class Division(NamedTuple):
    """Tokens of each of `parts` programs that share one (b, h); the last may have fewer."""

    tokens: int
    parts: int


def query_forward(rank: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Configuration:
    """Y: a tile of [block, r] probabilities and [block, d] tokens."""
    if _large(rank, d) or _heavy(rank, d, dtype):
        return Configuration(32, 8, 1)
    # Without a limit the compiler stops at 128 or 168 registers, and spills.
    limit = None if dtype == torch.bfloat16 else MOST_REGISTERS
    return Configuration(64, 4, pipeline_stages(capability) if capability in ROOMY else 1, limit)


def query_backward(rank: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Configuration:
    """dQ, and the sums dX and dK̃, [r, d] each or a piece of them, that stay in registers."""
    if _padded(d) <= 32:
        return Configuration(16, 8 if dtype == torch.float32 and _padded(rank) > 32 else 4, 1)
    if _large(rank, d):
        return Configuration(16, 8, 1, MOST_REGISTERS)
    if dtype == torch.float32 and not _heavy(rank, d, dtype):
        return Configuration(16, 8, 1)
    # Given more, the compiler spills in bf16 on 12.0; given no limit, exact products on 8.6.
    limit = MOST_REGISTERS if query_backward_exact(rank, d, dtype, capability) else None
    return Configuration(32, 8, 1, limit)


def query_backward_exact(rank: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether its products are taken without tensor cores: three passes would not fit in 99 KiB."""
    return held(rank, d) and _heavy(rank, d, dtype) and capability not in ROOMY


def key_side(rank: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Configuration:
    """Everything that holds an r×r matrix, forward and backward."""
    return Configuration(16 if _large(rank, d) or _heavy(rank, d, dtype) else 32, 8, 1, MOST_REGISTERS)


def key_tokens(rank: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Configuration:
    """dK and dV of a tile of keys."""
    if dtype == torch.bfloat16 and not _large(rank, d):
        # More warps than a tile has rows of products repeat them; two spill a few registers on 8.0 and 12.0.
        return Configuration(32, 2 if _padded(d) <= 32 and capability in HALF_RATE else 4, 1)
    return Configuration(16, 4 if _padded(d) <= 32 else 8, 1)


def held(rank: int, d: int) -> bool:
    """Whether a program holds K̃ and X of a (b, h) whole; larger ones are read, or divided, a piece at a time."""
    return _padded(rank) * _padded(d) <= MOST_HELD


def landmarks_of_a_program(rank: int, d: int) -> int:
    """Rows of K̃ and X that a program holds at once: all of them, or a piece."""
    return _padded(rank) if held(rank, d) else PIECE


def landmarks_of_a_gradient(rank: int, d: int, dtype: torch.dtype) -> int:
    """The same where the gradient of the landmarks is summed over parts of the keys, in registers."""
    rows = landmarks_of_a_program(rank, d)
    return min(PIECE, rows) if _heavy(rank, d, dtype) else rows


def one_launch(keys: int, rank: int, d: int) -> bool:
    """Whether one program walks over all keys of a (b, h) in the forward pass."""
    return keys <= MOST_KEYS_OF_ONE_PROGRAM and not _large(rank, d)


def one_launch_backward(keys: int, rank: int, d: int, dtype: torch.dtype) -> bool:
    """The same in the backward pass, whose r×r part leaves fewer registers for the walk."""
    return one_launch(keys, rank, d) and not _heavy(rank, d, dtype)


def _large(rank: int, d: int) -> bool:
    """Tiles beyond those that must not spill."""
    return _padded(rank) > 64 or _padded(d) > 64


def _heavy(rank: int, d: int, dtype: torch.dtype) -> bool:
    """Products in tf32, whose factors are held in two parts of 32 bits each, over the largest tiles."""
    return dtype != torch.bfloat16 and _padded(rank) * _padded(d) > 64 * 32


def divide(tokens: int, block: int, least: int) -> Division:
    """Programs for `tokens`, `least` or more to each, a whole number of tiles, at most `MOST_PARTS` of them."""
    share = max(least, -(-tokens // MOST_PARTS))
    share = -(-share // block) * block
    return Division(share, -(-tokens // share))


def capability(tensor: Tensor) -> tuple[int, int]:
    """Return the compute capability that launches on the tensor are compiled for."""
    return launch_device(tensor).capability


def stages(tensor: Tensor) -> int:
    """Return the stages of the software pipeline for launches on the tensor."""
    return pipeline_stages(capability(tensor))


def _padded(size: int) -> int:
    """The tile that holds `size` entries: a power of two, 16 or more."""
    return max(16, 1 << (size - 1).bit_length())
