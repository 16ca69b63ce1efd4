"""Work shared by the ranks of a torch.distributed process group; one process without a group is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def place() -> tuple[int, int]:
    """This process's rank and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank; values are pickled."""
    _, world = place()
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; a ValueError there is raised everywhere."""
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
    """The sum over ranks, on every rank."""
    if place()[1] > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def stack(values: Tensor) -> Tensor:
    """Every rank's tensor, (…) → (ranks, …); all of one shape."""
    _, world = place()
    if world == 1:
        return values[None]
    found = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(found, values.contiguous())
    return torch.stack(found)


def concatenate(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of every rank, by rank, and where this rank's begin; ranks may hold different numbers of rows."""
    rank, world = place()
    if world == 1:
        return rows, 0
    counts = stack(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = stack(padded)
    return torch.cat([parts[r, :count] for r, count in enumerate(counts)]), sum(counts[:rank])


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with rank 0's."""
    if place()[1] > 1:
        for tensor in tensors:
            own = tensor.detach().contiguous()
            dist.broadcast(own, 0)
            tensor.detach().copy_(own)
