"""Helpers for tests that need several processes. The processes are forked, so that they need not import torch again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_FORK = multiprocessing.get_context("fork")


def start(function: Callable[..., Any], *arguments: Any) -> Any:
    """Start a process that runs `function`, and return the process.

    The exit code is the result of `function` (0 for None), or 99 after an exception.
    """

    def run() -> None:
        torch.set_num_threads(1)
        try:
            code = function(*arguments) or 0
        except BaseException:
            traceback.print_exc()
            code = 99
        os._exit(code)  # skips the exit handlers of pytest

    process = _FORK.Process(target=run)
    process.start()
    return process


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any, join: bool = True) -> None:
    """Run `function(*arguments)` on every rank; fail unless all ranks succeed.

    Every rank has the environment variables that torchrun sets. With `join`, every rank joins a Gloo process group
    before it calls `function`. Without `join`, `function` must join a process group itself, and a rank succeeds only if
    `function` returns 0 or None.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def one(rank: int) -> Any:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        if not join:
            return function(*arguments)
        dist.init_process_group("gloo")
        function(*arguments)
        dist.destroy_process_group()
        return 0

    processes = [start(one, rank) for rank in range(world)]
    for process in processes:
        process.join(300)  # kernels in Triton's interpreter are slow on a busy machine
    assert [process.exitcode for process in processes] == [0] * world
