"""Results of a run of attacks: one file per batch, written by the rank that attacks the batch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from srm_model import ranks
from srm_model.files import atomic_path, check_folder, utf8_path

_FORMAT = "srm-iqa-attacks/3"
_PREFIX = "batch-"


@dataclass
class Batch:
    """Results of one batch."""

    mos: list[float] = field(default_factory=list)  # normalised
    clean: Any = None  # scores of the clean images
    attacks: dict[str, Any] = field(default_factory=dict)  # by name
    examples: dict[int, Tensor] = field(default_factory=dict)  # attacked images to show, by row


class Records:
    """The results of all batches of one run of attacks, stored in a folder if `folder` is given.

    Each file holds the results of one batch and the settings that determine these results.

    Args:
        folder: Folder of the files. With None, no files are written.
        settings: Settings of the run, as JSON values.
        count: Number of batches.

    Raises:
        ValueError: A file is damaged or was written with other settings.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any], count: int) -> None:
        self._folder = None if folder is None else Path(folder)
        self._settings = {"format": _FORMAT, **settings}
        self.batches = [Batch() for _ in range(count)]
        if self._folder is not None:
            for number, batch in ranks.from_first(self._read).items():
                self.batches[number] = batch

    def save(self, number: int) -> None:
        """Write the current results of a batch, atomically."""
        if self._folder is None:
            return
        from safetensors.torch import save_file

        record = {**vars(self.batches[number]), "settings": self._settings}
        tensors = {str(row): image.contiguous() for row, image in record.pop("examples").items()}
        with atomic_path(self._folder / f"{_PREFIX}{number:06d}.safetensors") as path:
            save_file(tensors, path, {"record": json.dumps(record)})

    def share(self, attacks: Iterable[str]) -> list[int]:
        """Return the indices of the batches that this rank must attack.

        Each rank gets a share of the batches that lack the results of at least one of `attacks`.
        """
        rank, world = ranks.place()
        wanted = set(attacks)
        unfinished = [number for number, batch in enumerate(self.batches) if wanted - batch.attacks.keys()]
        return unfinished[rank::world]

    def exchange(self, share: list[int]) -> None:
        """Exchange the results between ranks. `share` has the indices of the batches that this rank attacked."""
        for found in ranks.gather({number: self.batches[number] for number in share}):
            for number, batch in found.items():
                self.batches[number] = batch

    def _read(self) -> dict[int, Batch]:
        assert self._folder is not None
        check_folder(self._folder)
        return {
            int(path.stem.removeprefix(_PREFIX)): self._batch(path)
            for path in self._folder.glob(f"{_PREFIX}[0-9]*.safetensors")
        }

    def _batch(self, path: Path) -> Batch:
        from safetensors import SafetensorError, safe_open

        try:
            with utf8_path(path) as readable, safe_open(readable, "pt") as file:
                record = json.loads(file.metadata()["record"])
                examples = {int(row): file.get_tensor(row) for row in file.keys()}  # noqa: SIM118, no mapping
            settings = dict(record["settings"])
            batch = Batch(record["mos"], record["clean"], record["attacks"], examples)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}: incomplete record of an attacked batch; remove this file to attack the batch again"
            ) from None
        for name, value in self._settings.items():
            if settings.get(name) != value:
                raise ValueError(
                    f"{path}: made with {name} {settings.get(name)!r}; this run has {value!r}; "
                    f"name another folder or remove {path.parent}"
                )
        return batch
