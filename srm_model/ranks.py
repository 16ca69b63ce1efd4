"""Collective operations over a torch.distributed process group. Without a group, there is one rank, rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def place() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: T) -> list[T]:
    """Return the list of the values of all ranks, on every rank. Values are pickled."""
    world = place()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on every rank. If `make` raises ValueError, every rank raises it."""
    rank, world = place()
    if world == 1:
        return make()
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = make()
        except ValueError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise ValueError(box[1])
    value: T = box[0]
    return value


def total(values: Tensor) -> Tensor:
    """Return the sum over all ranks, on every rank."""
    if place()[1] > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def stack(values: Tensor) -> Tensor:
    """Stack the tensors of all ranks: (…) → (ranks, …). All ranks must pass the same shape."""
    world = place()[1]
    if world == 1:
        return values[None]
    found = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(found, values.contiguous())
    return torch.stack(found)


def concatenate(rows: Tensor) -> tuple[Tensor, int]:
    """Concatenate the rows of all ranks; return the result and the index of this rank's first row.

    The number of rows may differ between ranks.
    """
    rank, world = place()
    if world == 1:
        return rows, 0
    counts = stack(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = stack(padded)
    return torch.cat([parts[r, :count] for r, count in enumerate(counts)]), sum(counts[:rank])


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with the tensors of rank 0."""
    if place()[1] > 1:
        for tensor in tensors:
            own = tensor.detach().contiguous()
            dist.broadcast(own, 0)
            tensor.detach().copy_(own)
