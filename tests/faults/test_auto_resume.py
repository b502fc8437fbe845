"""`--auto-resume` starts where there is nothing and continues where there is a run: a job may be started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.processes import SLOW
from harness import (
    STEPS,
    assert_same_run,
    command,
    environment,
    finished,
    losses,
    rows,
    train,
    wait_for_step,
)

import ssl_ib
from ssl_ib import UserError

AUTO = (*SLOW, "--auto-resume")


def test_starts_continues_and_ends(tmp_path, begin, capsys):
    out = tmp_path / "run"
    run = begin(out, *AUTO, pause=0.05)
    run.reach(4)
    run.send(signal.SIGKILL)
    run.code()
    assert train(out, *AUTO) == 0
    assert "resumed    at step" in capsys.readouterr().out
    assert_same_run(out, finished(*SLOW[:1]))
    before = rows(out)
    # Once more, as a job that is started again after its end: there is nothing left to do.
    assert train(out, *AUTO) == 0 and rows(out) == before


def test_what_is_no_run_stays_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tmp_path, *AUTO) == 2
    assert "is not empty" in capsys.readouterr().err and os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(UserError, match="resume and auto_resume exclude each other"):
        ssl_ib.train("simclr_digits", out=tmp_path, resume=True, auto_resume=True)


def test_a_start_that_was_killed_before_its_first_checkpoint(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.lock").write_text("half a na")
    assert train(out, *AUTO, "epochs=1") == 0
    assert len(losses(out)) == STEPS


@pytest.mark.slow
def test_a_killed_rank_under_torchrun(tmp_path):
    """torchrun starts all again, and the losses are those of processes that nothing disturbed.

    Not with a criterion that keeps something of its own in each process, of which the main one's is saved.
    """
    outs = [tmp_path / "whole", tmp_path / "killed"]
    for out in outs:
        long = ("epochs=6", "eval.every_epochs=6", "checkpoint.every_steps=1", "--auto-resume")
        words = command(out, *long, "parallel=ddp", "batch_size=64", "device=cpu")[2:]
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            + ["--max-restarts", "1", "-m", *words],
            env=environment(),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            if out.name == "killed":
                wait_for_step(out, process, 3)
                os.kill(_rank(process.pid, 1), signal.SIGKILL)
            said = process.communicate(timeout=300)[0]
        finally:
            process.terminate()
        assert process.returncode == 0, said
    assert_same_run(*outs)
    assert "resumed    at step" in said


def _rank(launcher: int, rank: int) -> int:
    """The process of a rank."""
    for _ in range(100):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                mine = f"\nPPid:\t{launcher}\n" in (folder / "status").read_text()
                if mine and f"\0RANK={rank}\0".encode() in b"\0" + (folder / "environ").read_bytes():
                    return int(folder.name)
            except OSError:
                continue
        time.sleep(0.05)
    raise AssertionError("no such rank")
