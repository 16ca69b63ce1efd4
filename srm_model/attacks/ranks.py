"""Work shared by the ranks of a torch.distributed process group; one process without a group is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

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
