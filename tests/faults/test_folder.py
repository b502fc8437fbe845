"""A run's folder is its own from the first look to the end, whatever is done beside it or to it."""

import json
import multiprocessing
import os
import shutil
import signal
import socket

import pytest
from faults.processes import SLOW
from harness import STEPS, assert_same_run, checkpoint, finished, losses, train

from ssl_ib import UserError
from ssl_ib.record.folder import LOCK, lock


def test_nothing_beside_a_live_run_touches_it(tmp_path, begin, capsys):
    out = tmp_path / "run"
    run = begin(out, *SLOW, pause=0.05)
    run.reach(2)
    for more in ([], ["--overwrite"], ["--resume"]):
        assert train(out, *SLOW, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"another run is at work in {out}" in error
        assert f"process {run.process.pid} on host {socket.gethostname()}, since " in error
    # A dry run writes nothing, and asks nobody.
    assert train(out, *SLOW, "--dry-run") == 0
    assert run.code() == 0, run.said()
    assert_same_run(out, finished(*SLOW[:1])) and not (out / LOCK).exists()


def test_two_starts_at_once(tmp_path, begin):
    outs = [tmp_path / "run"] * 3
    runs = [begin(out, *SLOW, pause=0.05) for out in outs]
    codes = sorted(run.code() for run in runs)
    assert codes == [0, 2, 2], [run.said() for run in runs]
    assert_same_run(outs[0], finished(*SLOW[:1]))
    refused = [run.said() for run in runs if run.code() == 2]
    winner = next(run.process.pid for run in runs if run.code() == 0)
    assert all(f"another run is at work in {outs[0]}: process {winner} " in text for text in refused)


def test_a_crash_frees_the_folder_and_is_said(tmp_path, begin, caplog):
    out = tmp_path / "run"
    run = begin(out, *SLOW, pause=0.05)
    run.reach(3)
    run.send(signal.SIGKILL)
    assert run.code() == -signal.SIGKILL and json.loads((out / LOCK).read_text())["process"] == run.process.pid
    assert train(out, *SLOW, "--resume") == 0
    assert f"{out / LOCK} is stale: it was left by process {run.process.pid} on host" in caplog.text
    assert_same_run(out, finished(*SLOW[:1]))


def test_the_workers_of_a_killed_run_do_not_hold_its_folder(tmp_path):
    """A loader's workers live on for some seconds."""
    context = multiprocessing.get_context("fork")
    there = context.Event()
    with lock(tmp_path) as held:
        worker = context.Process(target=lambda: (there.set(), signal.pause()))
        worker.start()
        try:
            assert there.wait(60)
            held.descriptor, former = os.open(os.devnull, os.O_RDONLY), held.descriptor
            os.close(former)  # As the kernel does with a killed process's.
            with lock(tmp_path):
                pass
        finally:
            worker.kill()
            worker.join()


def test_what_a_refused_run_made_is_removed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tmp_path / "a" / "b", "--resume") == 2 and train(tmp_path, "--resume") == 2
    assert train(tmp_path / "a" / "b", "batch_size=100000") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_lock_is_no_way_out_of_the_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="cannot make the folder .*, or lock it"), lock(tmp_path / "run"):
        raise AssertionError("locked")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with lock(tmp_path / "run"):
        assert "Operation not supported; see to it yourself" in caplog.text


@pytest.mark.parametrize("done", ["deleted", "renamed", "replaced"])
def test_a_folder_that_goes_ends_its_run(tmp_path, begin, done):
    out, aside = tmp_path / "run", tmp_path / "aside"
    run = begin(out, *SLOW, pause=0.05)
    run.reach(3)
    out.rename(aside)
    if done == "deleted":
        shutil.rmtree(aside)
    if done == "replaced":
        out.mkdir()
    assert run.code() == 2
    message = [line for line in run.said().splitlines() if line.startswith("ssl-ib-train: ")]
    assert len(message) == 1 and f"{out} was deleted or renamed" in message[0] and "Traceback" not in run.said()
    # Nothing is left under the name, and nothing is written into what lies there now.
    assert not out.exists() if done != "replaced" else not any(out.iterdir())
    if done != "deleted":
        assert 2 <= checkpoint(aside)["step"] < 2 * STEPS
        assert train(aside, *SLOW, "--resume") == 0
        assert losses(aside) == losses(finished(*SLOW[:1]))
