"""The processes that read images: one that dies is replaced, one that hangs ends the run, and none needs /dev/shm."""

import multiprocessing
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import assert_same_run, checkpoint, command, environment, finished, train
from PIL import Image

from ssl_ib.data.loader import Loader
from ssl_ib.data.sources.base import Streamed
from ssl_ib.errors import UserError


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """The overrides of a run whose images stream through two workers: 2 epochs of 12 steps."""
    root = tmp_path_factory.mktemp("images")
    for number in range(220):
        folder = root / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    source = f"source={{name: folder, path: {root}, memory_gb: 1e-9}}"
    return ("criterion=queued", source, "workers=2", "batch_size=16")


def workers_of(run) -> list[int]:
    pid = run.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_dead_worker_is_replaced(tmp_path, begin, streamed):
    run = begin(tmp_path / "run", *streamed, pause=0.1)
    run.reach(2)
    first, second = workers_of(run)
    os.kill(second, signal.SIGKILL)
    assert run.code() == 0
    said = run.said()
    assert said.count(f"the loader's worker {second} was ended by signal 9 (Killed)") == 1
    assert said.count("another takes its place") == 1 and str(first) not in said
    assert_same_run(run.out, finished(*streamed))


def test_workers_that_die_one_after_another_end_the_run_which_saves(tmp_path, begin, streamed):
    run = begin(tmp_path / "run", *streamed, pause=0.1)
    run.reach(14)
    for worker in workers_of(run):
        os.kill(worker, signal.SIGKILL)
    assert run.code() == 2
    last = run.said().splitlines()[-1]
    assert "Traceback" not in run.said() and "Another one had died at most 4 batches before" in last
    step = checkpoint(run.out)["step"]
    assert step >= 14 and last.endswith(f"Saved at step {step}; continue with --resume")
    assert train(run.out, *streamed, "--resume") == 0
    assert_same_run(run.out, finished(*streamed))


def test_workers_end_with_their_run(tmp_path, begin, streamed):
    run = begin(tmp_path / "run", *streamed, pause=0.1)
    run.reach(2)
    workers = workers_of(run)
    # As batch systems do: to every process.
    for pid in (*workers, run.process.pid):
        os.kill(pid, signal.SIGTERM)
    assert run.code() == 143 and "the loader's worker" not in run.said()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_the_workers_of_a_killed_run_end(tmp_path, begin, streamed):
    run = begin(tmp_path / "run", *streamed, pause=0.1)
    run.reach(2)
    workers = workers_of(run)
    run.send(signal.SIGKILL)
    run.code()
    for _ in range(1000):
        if not any(_runs(worker) for worker in workers):
            return
        time.sleep(0.01)
    raise AssertionError("they are still there")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_full_shm_is_not_missed(tmp_path, streamed):
    """Containers keep it small: 64 MB are a few batches."""
    mounted = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace here")
    full = 'head -c 4096 /dev/zero > /dev/shm/full && exec "$@"'
    out = tmp_path / "run"
    words = [*mounted, "sh", "-c", full, "sh", *command(out, *streamed)]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(out, finished(*streamed))


def _hang_at(name, asked):
    if asked == name:
        time.sleep(600)
    raise OSError(None, "never read")


def _stop_at(name, asked):
    if asked == name:
        os.kill(os.getpid(), signal.SIGSTOP)
    raise OSError(None, "never read")


def _fail_at(name, asked):
    raise SystemExit(3)


def one_image(read, timeout: float = 600.0) -> Loader:
    """A loader, with one worker, of images of which none can be read."""
    names = [f"{i}.png" for i in range(4)]
    images = Streamed(partial(read, names[0]), names, torch.zeros(4, dtype=torch.int64), ["a"], 32)
    return Loader(images, 4, seed=0, workers=1, timeout=timeout)


@pytest.mark.parametrize("read, state", [(_hang_at, "waiting"), (_stop_at, "stopped")])
def test_a_late_worker_ends_the_run(read, state):
    before = multiprocessing.active_children()
    epoch = one_image(read, timeout=1.0).epoch(0)
    with pytest.raises(
        UserError, match=rf"within worker_timeout=1 seconds; workers: \d+ \({state}\); the batch begins"
    ):
        next(epoch)
    assert multiprocessing.active_children() == before


def test_a_worker_that_an_image_ends_again_and_again_ends_the_run(caplog):
    with pytest.raises(UserError, match="ended by itself with exit code 3.* Another one had died"):
        next(one_image(_fail_at).epoch(0))
    assert caplog.text.count("ended by itself with exit code 3") == 1


def test_a_bug_in_a_worker_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(Streamed, "fetch", lambda *given: 1 / 0)
    with pytest.raises(RuntimeError, match="(?s)a worker has failed:.*ZeroDivisionError"):
        next(one_image(_hang_at).epoch(0))
