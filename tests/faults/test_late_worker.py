"""A worker that stops or hangs ends the run in one message, and is ended itself."""

import os
import signal
import time
from functools import partial

import pytest
import torch

from ssl_ib.data.loader import Loader
from ssl_ib.data.sources.base import Streamed
from ssl_ib.errors import UserError


def _hang_at(name, asked):
    if asked == name:
        time.sleep(600)
    raise OSError(None, "never read")


def _stop_at(name, asked):
    if asked == name:
        os.kill(os.getpid(), signal.SIGSTOP)
    raise OSError(None, "never read")


@pytest.mark.parametrize("read, state", [(_hang_at, "waiting"), (_stop_at, "stopped")])
def test_a_late_worker_ends_the_run(read, state):
    names = [f"{i}.png" for i in range(4)]
    labels = torch.zeros(4, dtype=torch.int64)
    images = [Streamed(partial(read, name), names, labels, ["a"], 32) for name in names]
    loader = Loader(images[0], 4, seed=0, workers=1, timeout=1.0)
    with pytest.raises(
        UserError, match=rf"within worker_timeout=1 seconds; workers: \d+ \({state}\); the batch begins"
    ):
        next(loader.epoch(0))
    workers = loader._fetched._iterator._workers
    for worker in workers:
        worker.join(10)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL]
