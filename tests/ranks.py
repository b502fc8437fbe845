"""How the tests run one function in several processes. Each of them imports this file, so it imports little."""

import os
import socket
from pathlib import Path

import torch

from ssl_ib import distributed


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
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
