"""A suite over several ranks is the same suite."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from attack_models import Convolutional, Linear, batch, weight

from srm_model import ranks
from srm_model.attacks import MSE, Attack, Suite
from srm_model.config import SRMConfig

CONFIG = SRMConfig(attack_steps=3, attack_restarts=2, attack_queries=20)


class Images:
    """Eleven images: batches of 3, 3, 3 and 2 for two ranks."""

    def __init__(self) -> None:
        self.images = batch(11)
        self.mos = torch.linspace(0, 1, 11).tolist()
        self.names = [f"{number}.png" for number in range(11)]
        self.reads = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        self.reads += 1
        return self.images[index], self.mos[index]


def run(resume=None, dataset=None):
    return Suite.extended(CONFIG).run(
        Convolutional(),
        dataset or Images(),
        norm="linf",
        eps=4 / 255,
        surrogate=Linear(weight(3) * 0.1),
        batch_size=3,
        keep=4,
        resume=resume,
    )


def plain(result):
    examples = [(e.position, e.attack, e.attacked_score, e.attacked.tolist()) for e in result.examples]
    return json.dumps([result.to_dict(), examples])


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    place = Path(folder)
    dataset = Images()
    found = {"whole": plain(run(place / "whole.json", dataset)), "reads": dataset.reads}
    dataset = Images()
    found |= {"resumed": plain(run(place / "half.json", dataset)), "resumed_reads": dataset.reads}
    try:
        run(place / "foreign.json")
    except ValueError as error:
        found["foreign"] = str(error)
    (place / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_ranks_do_the_work_of_one_to_the_bit(tmp_path):
    expected = run(tmp_path / "half.json")
    finished = json.loads((tmp_path / "half.json").read_text())
    del finished["batches"][1]["attacks"]["square_mse"]
    finished["batches"][3] = {"attacks": {}}
    (tmp_path / "half.json").write_text(json.dumps(finished))
    (tmp_path / "foreign.json").write_text("[]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked, so that the ranks need not import torch again.
    mp.start_processes(_rank, args=(2, port, str(tmp_path)), nprocs=2, start_method="fork")
    found_by_rank = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for found in found_by_rank:
        assert found["whole"] == plain(expected)
        assert found["resumed"] == plain(expected)
        assert "foreign.json: not a record of attacks" in found["foreign"]
    # Each read the images of its own two batches, the first one for its shape, and the four examples' clean images.
    assert [found["reads"] for found in found_by_rank] == [6 + 1 + 4, 5 + 1 + 4]
    whole, half = ((tmp_path / name).read_text() for name in ("whole.json", "half.json"))
    assert json.loads(whole) == json.loads(half)
    assert not list(tmp_path.glob(".*"))


def test_one_process_is_rank_0_of_1():
    assert ranks.place() == (0, 1)
    assert ranks.gather("x") == ["x"]
    with pytest.raises(ValueError, match="no"):
        ranks.from_first(lambda: (_ for _ in ()).throw(ValueError("no")))


def test_methods_are_named():
    with pytest.raises(ValueError, match="method='bim': expected one of 'pgd', 'apgd', 'square'"):
        Attack("a", MSE(), method="bim")
