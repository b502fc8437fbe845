"""Which process is named where a run hangs, by what all of them have told; and that real processes end so."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import train
from ranks import PRELOADED

from ssl_ib import distributed, heartbeat
from ssl_ib.cli.exits import exit_code
from ssl_ib.errors import UserError
from ssl_ib.heartbeat import Beat, Heartbeat, hanging, roll_call

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)
HANGING = str(Path(__file__).parent / "recipes" / "hanging.py")


def beat(rank: int, idle: float = 20.0, **more) -> Beat:
    return Beat(rank, "process 1 on host a", idle=idle, **more)


@pytest.mark.parametrize(
    "beats, expected",
    [
        # The others have begun a collective that it has not.
        ([beat(0, begun={"0 cpu": 8}), beat(1, begun={"0 cpu": 7}), beat(2, begun={"0 cpu": 8})], [1]),
        # As long as one gets further, it is only slow.
        ([beat(0, begun={"0 cpu": 8}), beat(1, idle=1.0, begun={"0 cpu": 7})], []),
        # All are at work by themselves, or all wait for the network.
        ([beat(0, begun={"0 cpu": 8}), beat(1, begun={"0 cpu": 8})], []),
        ([beat(0, begun={"0 cpu": 8}), beat(1, begun={"0 cpu": 8}, silent=True)], [1]),
        # One that left does not hang, however long the main one draws figures.
        ([beat(0, begun={"0 cpu": 8}), beat(1, begun={"0 cpu": 7}, left=True, silent=True)], []),
        # 2 waits in its own group for 3, and 0 and 1 wait for them in another.
        (
            [
                beat(0, begun={"a cpu": 5, "x cpu": 9}),
                beat(1, begun={"a cpu": 5, "y cpu": 9}),
                beat(2, begun={"b cpu": 5, "x cpu": 8}),
                beat(3, begun={"b cpu": 4, "y cpu": 8}),
            ],
            [3],
        ),
        # Where it is no clearer, all that are behind.
        ([beat(0, begun={"0 cpu": 8, "0 cuda": 1}), beat(1, begun={"0 cpu": 7, "0 cuda": 2})], [0, 1]),
    ],
)
def test_who_hangs(beats, expected):
    assert [found.rank for found in hanging(beats, 10.0)] == expected


def test_a_single_process_has_no_thread(tmp_path):
    before = threading.active_count()
    with Heartbeat(1.0, tmp_path):
        assert threading.active_count() == before


def test_processes_that_do_not_come_are_named():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    store.set("here_2", "")
    with pytest.raises(UserError, match=r"of 4 processes 2 did not come within process_timeout=0.2 seconds: rank 1, 3"):
        roll_call(store, 0, 4, 0.2)


def spin() -> None:
    while True:
        pass


def _loop(rank: int, port: int, log: Path, how: str, culprit: int) -> None:
    """Collectives in a loop, until one process does not come to them."""
    _become(rank, port, log)
    heartbeat._LAST = 1.0  # There is no torchrun, which would end the others.
    distributed.initialise("cpu")

    def run() -> int:
        with Heartbeat(3.0, log.parent):
            for step in range(1000):
                heartbeat.at(step, "forward")
                if step == 20 and rank == culprit:
                    time.sleep(0.6)  # Longer than a beat.
                    spin() if how == "spin" else os.kill(os.getpid(), signal.SIGSTOP)
                heartbeat.at(step, "backward")
                dist.all_reduce(torch.ones(3))
        return 0

    sys.exit(exit_code("ssl-ib-train", run))


def _train(rank: int, port: int, log: Path, how: str, culprit: int) -> None:
    """A run, the criterion of which hangs."""
    _become(rank, port, log)
    more = (
        "--plugin",
        HANGING,
        "criterion=hanging",
        "criterion.inner=info_nce",
        f"criterion.how={how}",
        f"criterion.rank={culprit}",
        "logger=[]",
    )
    sys.exit(train(log.parent / "run", *more, "parallel=ddp", "device=cpu", "process_timeout=10"))


def _become(rank: int, port: int, log: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = open(file, "w", encoding="utf-8", buffering=1, closefd=False)


def ended(work, folder: Path, cases: list[tuple[str, int]]) -> list[tuple[list[int | None], list[str]]]:
    """Exit codes (None: it was stopped, and could not end) and outputs of two processes a case, all at once."""
    groups = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        for how, culprit in cases:
            place = folder / f"{how}_{culprit}"
            place.mkdir()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            logs = [place / f"{rank}.log" for rank in range(2)]
            group = [_CONTEXT.Process(target=work, args=(rank, port, logs[rank], how, culprit)) for rank in range(2)]
            groups.append((how, culprit, group, logs))
            for process in group:
                process.start()
    found = []
    for how, culprit, group, logs in groups:
        for rank, process in enumerate(group):
            process.join(0 if how == "stop" and rank == culprit else 120)
        found.append(([process.exitcode for process in group], [log.read_text() for log in logs]))
    for _, _, group, _ in groups:
        for process in group:
            process.kill()
            process.join()
    return found


def test_processes_that_hang_are_named(tmp_path):
    cases = [("spin", 1), ("stop", 1), ("stop", 0)]
    (codes, said), (stopped_codes, stopped), (keeper_codes, keeper) = ended(_loop, tmp_path, cases)
    assert codes == [2, 2] and said[1] == ""
    assert said[0].startswith("ssl-ib-train: rank 1 (process ") and said[0].count("\n") == 1
    assert "hangs: it has not got further for" in said[0] and f"in forward at step 20, at {__file__}:" in said[0]
    assert stopped_codes == [2, None] and stopped[1] == "" and stopped[0].count("\n") == 1
    assert "rank 1 (process " in stopped[0] and "gives no sign of life any more" in stopped[0]
    assert "in forward at step 20. Nothing has moved for process_timeout=3 seconds" in stopped[0]
    # The first process keeps the store, without which nobody can ask anything.
    assert keeper_codes == [None, 2] and "rank 0 does not answer any more" in keeper[1] and "at step 20" in keeper[1]
    assert "Traceback" not in "".join([*said, *stopped, *keeper])


@pytest.mark.slow
def test_a_run_that_hangs_in_a_part_is_ended(tmp_path):
    (codes, said), (stopped_codes, stopped) = ended(_train, tmp_path, [("spin", 1), ("stop", 1)])
    assert codes == [2, 2] and stopped_codes == [2, None] and "Traceback" not in "".join([*said, *stopped])
    file = tmp_path / "spin_1" / "run" / "hung_rank_1.txt"
    assert f"in forward at step 5, at {HANGING}:" in said[0] and f"Its stack is in {file}." in said[0]
    assert "in forward at step 5. Nothing has moved" in stopped[0]
    stack = file.read_text()
    assert stack.startswith("rank 1, process ") and 'hanging.py", line' in stack and "in forward" in stack
    assert "continue it with --auto-resume" in said[0] and "rank 1" not in said[1]
