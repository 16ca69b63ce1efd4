"""Test that a suite gives the same results on several ranks as in one process."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from attack_models import Convolutional, Linear, batch, weight

from srm_model import ranks
from srm_model.attacks import MSE, Attack, Suite
from srm_model.attacks.suite import Job
from srm_model.config import SRMConfig

pytestmark = pytest.mark.forks

CRAFT = Job.craft
CONFIG = SRMConfig(attack_steps=3, attack_restarts=2, attack_queries=20)


class Images:
    """Eleven images, which two ranks process in batches of 3, 3, 3 and 2."""

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


def _rank(rank: int, world: int, port: int, job: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    job(rank)
    dist.destroy_process_group()


def start(world: int, job: Callable[[int], None]) -> mp.ProcessContext:
    """Start `job(rank)` on `world` ranks. Processes are forked, so that they need not import torch again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return mp.start_processes(_rank, args=(world, port, job), nprocs=world, start_method="fork", join=False)


def test_two_ranks_do_the_work_of_one_to_the_bit(tmp_path):
    expected = run(tmp_path / "one")
    foreign = tmp_path / "foreign" / "batch-000000.safetensors"
    foreign.parent.mkdir()
    foreign.touch()

    def job(rank: int) -> None:
        dataset = Images()
        found = {"whole": plain(run(tmp_path / "two", dataset)), "reads": dataset.reads}
        with pytest.raises(ValueError, match="incomplete record") as caught:
            run(foreign.parent)
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(found | {"foreign": str(caught.value)}))

    start(2, job).join()
    found_by_rank = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for found in found_by_rank:
        assert found["whole"] == plain(expected)
        assert str(foreign) in found["foreign"]
    # Each rank reads its own two batches, the first image for its shape, and the clean images of four examples.
    assert [found["reads"] for found in found_by_rank] == [6 + 1 + 4, 5 + 1 + 4]
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def crafted(log: Path, wait: Callable[[int, str], bool] = lambda number, name: False):
    """Return a replacement for `Job.craft` that logs each call and then waits for as long as `wait` returns True."""

    def craft(self: Job, number: int, attack: Attack, *arguments):
        with log.open("a") as file:
            file.write(f"{number} {attack.name}\n")
        while wait(number, attack.name):
            time.sleep(60)
        return CRAFT(self, number, attack, *arguments)

    return craft


@pytest.mark.parametrize("world", [1, 2, 3])
def test_killed_ranks_leave_all_that_each_had_finished(tmp_path, monkeypatch, world):
    names = [attack.name for attack in Suite.extended(CONFIG).attacks]
    # Rank 0 (batches 0 and 2) finishes only one attack. Rank 1 finishes batch 1 and all but one attack of batch 3.
    stops = {(0, names[1]), (3, names[-1])}
    log, folder = tmp_path / "log", tmp_path / "attacks"
    monkeypatch.setattr(Job, "craft", crafted(log, lambda *where: where in stops))
    killed = start(2, lambda rank: run(folder))
    end = time.monotonic() + 120
    while time.monotonic() < end and not (
        log.exists() and {f"{number} {name}" for number, name in stops} <= set(log.read_text().splitlines())
    ):
        time.sleep(0.05)
    for process in killed.processes:
        process.kill()
    for process in killed.processes:
        process.join()
    log.unlink()
    monkeypatch.setattr(Job, "craft", crafted(log))

    def job(rank: int) -> None:
        (tmp_path / f"rank{rank}.json").write_text(plain(run(folder)))

    start(world, job).join() if world > 1 else job(0)
    left = [f"0 {name}" for name in names[1:]] + [f"2 {name}" for name in names] + [f"3 {names[-1]}"]
    assert sorted(log.read_text().splitlines()) == sorted(left)
    expected = plain(run())
    assert [(tmp_path / f"rank{rank}.json").read_text() for rank in range(world)] == [expected] * world


def test_one_process_is_rank_0_of_1():
    assert ranks.place() == (0, 1)
    assert ranks.gather("x") == ["x"]
    with pytest.raises(ValueError, match="no"):
        ranks.from_first(lambda: (_ for _ in ()).throw(ValueError("no")))


def test_methods_are_named():
    with pytest.raises(ValueError, match="method='bim': expected one of 'pgd', 'apgd', 'square'"):
        Attack("a", MSE(), method="bim")
