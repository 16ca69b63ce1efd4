"""Divide an epoch into batches, and divide each batch among processes and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_batches(
    count: int, batch_size: int, *, seed: int, epoch: int, processes: int = 1
) -> list[list[int]]:
    """Shuffle the images for an epoch and split them into batches; return the image indices of each batch.

    The shuffled order depends only on `count`, `seed` and `epoch`. Batches with fewer images than there are processes
    are dropped. A last batch with only one image is also dropped, unless `batch_size` is 1 or there is no other batch.

    Raises:
        ValueError: No batch is left.
    """
    order = np.random.default_rng((seed, epoch)).permutation(count).tolist()
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1 < batch_size:
        batches.pop()
    batches = [batch for batch in batches if len(batch) >= processes]
    if not batches:
        raise ValueError(
            f"{count} images in batches of {batch_size}: no batch has an image for each of {processes} processes; "
            "expected more images, larger batches or fewer processes"
        )
    return batches


def deal(batch: Sequence[int], *, accumulate: int, rank: int, processes: int) -> list[list[int]]:
    """Split a batch into micro-batches; return the images of process `rank` in each micro-batch.

    Every process gets at least one image of each micro-batch. A batch with too few images for `accumulate`
    micro-batches is therefore split into fewer micro-batches.
    """
    pieces = min(accumulate, len(batch) // processes)
    return [_piece(_piece(batch, number, pieces), rank, processes) for number in range(pieces)]


def _piece(items: Sequence[int], number: int, pieces: int) -> list[int]:
    start, end = (len(items) * i // pieces for i in (number, number + 1))
    return list(items[start:end])
