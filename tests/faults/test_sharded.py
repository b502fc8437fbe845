"""Sharded runs, as a user starts them: killed at any place, and continued by another number of processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import ROOT, STEPS, command, environment, evaluations, losses, rows, train, wait_for_step
from test_auto_resume import _rank

from ssl_ib.record.weights import read_file

#: Nothing that goes by the process: batch norm of its own rows.
SAME = ("model.projector_norm=false", "model.projector_layers=1", "batch_size=96", "device=cpu")
#: Seconds, for a busy machine.
WAIT = 600
LONG = (*SAME, "epochs=3", "eval.every_epochs=3", "checkpoint.every_steps=2", "--auto-resume")


@pytest.fixture
def begun() -> Iterator[list[subprocess.Popen]]:
    """What `torchrun` has begun; those still there at the end are ended, with all of their processes."""
    found: list[subprocess.Popen] = []
    yield found
    for process in found:
        process.terminate()  # A launcher that is killed leaves its processes behind.
        process.communicate()


def torchrun(begun, out: Path, ranks: int, script: list[str] | None = None) -> subprocess.Popen:
    words = command(out, *LONG, "parallel=fsdp")[2:]
    words = ["-m", *words] if script is None else [*script, *words[1:]]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [*launcher, *words],
        env=environment(),
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begun.append(process)
    return process


def assert_like_one_process(out: Path, folder: Path) -> None:
    """Every step is there once, and losses and weights are those of one process that nothing disturbed."""
    one = folder / "one"
    assert train(one, *LONG) == 0
    assert [step for step, _ in losses(out)] == [step for step, _ in losses(one)]
    theirs, ours = (torch.tensor([loss for _, loss in losses(place)]) for place in (one, out))
    # Of float32: sums in another order, and what some 40 steps of AdamW make of it.
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    assert len(evaluations(out)) == len(evaluations(one))


@pytest.mark.slow
def test_a_killed_rank_and_three_processes_and_then_one(begun, tmp_path):
    out = tmp_path / "run"
    first = torchrun(begun, out, 2)
    wait_for_step(out, first, 6)
    os.kill(_rank(first.pid, 1), signal.SIGKILL)
    first.communicate(timeout=WAIT)
    second = torchrun(begun, out, 3)
    wait_for_step(out, second, STEPS + 8)
    second.terminate()
    said = second.communicate(timeout=WAIT)[0]
    assert "resumed    at step" in said
    # One process reads the shards, and writes a file again.
    assert (out / "checkpoints" / "last").is_dir()
    assert train(out, *LONG) == 0
    assert (out / "checkpoints" / "last.pt").is_file() and not (out / "checkpoints" / "last").exists()
    assert_like_one_process(out, tmp_path)


@pytest.mark.slow
def test_a_killed_launcher(begun, tmp_path):
    """Its processes go on without it, and keep others from their folder; stopped, they have saved themselves."""
    out = tmp_path / "run"
    first = torchrun(begun, out, 2)
    wait_for_step(out, first, 2)
    ranks = [_rank(first.pid, rank) for rank in (0, 1)]
    reached = len(losses(out))
    first.kill()
    first.wait()
    wait_for_step(out, Alive(ranks[0]), reached + 1)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)  # So that the others find them there.
    second = torchrun(begun, out, 3)
    said = second.communicate(timeout=WAIT)[0]
    assert second.returncode != 0 and f"process {ranks[0]} on host" in said
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)
    for pid in ranks:
        while Alive(pid).poll() is None:
            time.sleep(0.1)
    third = torchrun(begun, out, 3)
    said = third.communicate(timeout=WAIT)[0]
    assert third.returncode == 0 and "resumed    at step" in said
    assert_like_one_process(out, tmp_path)


class Alive:
    """A process that is no child of this one."""

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        return None if Path(f"/proc/{self.pid}").exists() else 0

    def communicate(self) -> str:
        return "it has ended"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "after", "last"])
def test_a_kill_within_a_save(begun, place, tmp_path):
    out = tmp_path / "run"
    script = [str(ROOT / "tests" / "faults" / "dies_in_save.py"), place]
    process = torchrun(begun, out, 2, script=script)
    process.communicate(timeout=WAIT)
    assert process.returncode != 0 and not (out / "results.json").exists()
    # The one before is whole.
    saved = read_file(out / "checkpoints" / "last")
    assert saved["step"] == 2
    process = torchrun(begun, out, 3)
    said = process.communicate(timeout=WAIT)[0]
    assert process.returncode == 0, said
    assert "resumed    at step" in said and rows(out)
    assert not list((out / "checkpoints").glob("*.tmp"))
    assert_like_one_process(out, tmp_path)
