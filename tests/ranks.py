"""How the tests run one function in several processes.

The processes are forked from one server, which has imported what nearly all of them need: importing takes each of them
several seconds otherwise. It starts with the first of them, and ends with the tests.
"""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from ssl_ib import distributed

#: What the server imports. It starts no thread, so that it can be forked.
PRELOADED = ["torch", "torch.distributed", "timm", "ssl_ib.trainer", "ssl_ib.criterions", "ssl_ib.models", "pytest"]
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)

#: With how many processes each criterion is compared with one: two, and among the slow tests an odd number.
RANKS = [2, pytest.param(3, marks=pytest.mark.slow)]


def join(rank: int, ranks: int, port: int) -> None:
    """Makes this process one of a group of them, on one thread."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.initialise("cpu")


def answers_of(work, ranks: int, folder: Path) -> list[dict]:
    """What `work(rank, port, folder)` saved as folder/rank.pt in each of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        # The server has the path of a plain Python process, and not pytest's.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        torch.multiprocessing.start_processes(work, (port, str(folder)), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
