"""`ssl-ib-sweep --launch`: what is submitted, attached to, requeued, passed over or refused."""

import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import PARTS, ROOT, TINY, assert_same_run, finished
from sweep.test_sweep import AT, LR, records, sweep

from ssl_ib.cli.sweep import main
from ssl_ib.record.lock import LOCK, Lock
from ssl_ib.sweep import job, launch

pytest.importorskip("submitit")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No plots, and a look at the jobs ten times a second."""
    monkeypatch.setattr("ssl_ib.sweep.plot.draw", lambda report, path: "no plot")
    monkeypatch.setattr(launch, "POLL", 0.1)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--launch", "slrum"], "--launch: unknown 'slrum'; did you mean 'slurm'"),
        (["--slurm", "time=60"], "--slurm: says how jobs are submitted; give --launch slurm as well"),
        (["--launch", "slurm"], "--slurm time=MINUTES is missing"),
        (["--launch", "slurm", "--slurm", "time=4"], "asked to save 300 seconds before its end"),
        (["--launch", "slurm", "--slurm", "time=1:00:00"], "time: expected a whole number of minutes above 0, got"),
        (["--launch", "slurm", "--slurm", "time=60", "partitoin=gpu"], "'partitoin'; did you mean 'partition'"),
        (["--launch", "slurm", "--slurm", "time=60", "epochs=3"], "its KEY=VALUE stand before --slurm"),
        (
            ["--launch", "slurm", "--slurm", "time=60", "gpu"],
            "--slurm: expected KEY=VALUE, such as time=240, got 'gpu'",
        ),
        (["--launch", "slurm", "--slurm", "time=60", "time=70"], "--slurm time: is given twice"),
        (["--launch", "slurm", "--slurm", "time=60", "nodes=2"], "a run of a sweep is one task on one machine"),
        (["--launch", "slurm", "--slurm", "time=60", "setup=[a"], "--slurm setup: expected a YAML value"),
        (["--launch", "local", "--jobs", "2"], "--jobs is for runs in processes here"),
        (["--launch", "local", "--budget-minutes", "2"], "--budget-minutes is for runs in processes here"),
        (["--launch", "local", "parallel=ddp"], "parallel=ddp is for several processes: give --slurm gpus_per_node=N"),
        (["--launch", "local", "--slurm", "gpus_per_node=2"], "parallel=none is one process, for gpus_per_node=2"),
        (["--launch", "local", "parallel=ddp", "--slurm", "gpus_per_node=3"], "128 images a step cannot be cut into 3"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert main([TINY, "--plugin", PARTS, *arguments]) == 2
    output, error = capsys.readouterr()
    assert output == "" and expected in error and list(tmp_path.iterdir()) == []


def test_without_submitit_or_slurm(tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sweep(out, "--launch", "slurm", "--slurm", "time=60") == 2
    assert "there is no srun here" in capsys.readouterr().err and not out.exists()
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert sweep(out, "--launch", "local") == 2
    assert "pip install 'ssl-ib[slurm]'" in capsys.readouterr().err and not out.exists()


def test_a_dry_run_submits_nothing(tmp_path, capsys):
    out = tmp_path / "sweep"
    more = ("parallel=ddp", "--launch", "slurm", "--slurm", "time=60", "gpus_per_node=2", "partition=gpu", "--dry-run")
    # Where jobs are submitted there is perhaps no GPU.
    assert sweep(out, "device=cuda", "--vary", LR, *more) == 0
    assert "2 runs (2 points)" in (said := capsys.readouterr().out) and not out.exists()
    assert "each a job of --launch slurm with 2 processes" in said


def test_the_command_of_several_processes(monkeypatch, tmp_path, started):
    class Run:
        folder, seed = Path("point") / "seed_0", 0

    monkeypatch.setattr(launch.runner, "command", lambda run, out, plugins: ["python", "-m", "ssl_ib.cli.train", "x"])
    assert launch.command(Run, tmp_path, [], 1) == ["python", "-m", "ssl_ib.cli.train", "x"]
    several = launch.command(Run, tmp_path, [], 4)
    assert several[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert several[6:] == ["-m", "ssl_ib.cli.train", "x"]


def test_debug(tmp_path, capsys, started):
    out = tmp_path / "sweep"
    started.behaviour |= {0.002: "refuse"}
    more = ("--launch", "debug", "--slurm", "partition=gpu")
    assert sweep(out, "--vary", LR, *more) == 1
    output, errors = capsys.readouterr()
    assert "--launch debug does without partition" in errors
    log = out / "optim.lr_0.002" / "seed_0.log"
    assert f"optim.lr_0.002 seed 0: failed (exit code 2: ssl-ib-train: this cannot be); see {log}" in output
    assert "[1/2] optim.lr_0.001 seed 0: knn/top1 0.1000" in output
    del started.behaviour[0.002]
    # The same folder goes on without jobs, and the other way round.
    assert sweep(out, "--vary", LR) == 0
    assert sweep(out, "--vary", "optim.lr=1e-3,2e-3,3e-3", *more) == 0
    assert [record["status"] for record in records(out)] == ["done"] * 3 and len(started.runs) == 4


@pytest.mark.parametrize("more", [(), ("--launch", "debug")])
def test_a_run_that_is_live_elsewhere_is_passed_over(tmp_path, monkeypatch, capsys, started, more):
    monkeypatch.setattr(job, "PATIENCE", 0.0)
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", "optim.lr=3e-3") == 0
    with Lock(out / AT[0], LOCK, "another run"):
        assert sweep(out, "--vary", LR, *more) == 0
        output = capsys.readouterr().out
        assert f"optim.lr_0.001 seed 0: running elsewhere (process {os.getpid()} on host" in output
        assert "1 of 2 runs are done" in output and not (out / AT[0]).with_name("seed_0.log").exists()
    assert sweep(out, "--vary", LR, *more) == 0
    assert [record["status"] for record in records(out)] == ["done"] * 2


def test_a_damaged_record_of_jobs(tmp_path, capsys, started):
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", LR) == 0
    (out / launch.RECORD).write_text('{"a": {"job": 3}}')
    assert sweep(out, "--vary", "optim.lr=3e-3", "--launch", "local") == 2
    assert "jobs.json cannot be read" in capsys.readouterr().err


@contextmanager
def when(reached, act):
    """Does something as soon as something else has come about."""

    def wait():
        for _ in range(30000):
            if reached():
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def stop_watching():
    os.kill(os.getpid(), signal.SIGTERM)


def processes_of(*names: bytes) -> list[int]:
    """The processes whose command holds all these words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if all(name in line for name in names):
            found.append(int(folder.name))
    return found


@pytest.fixture
def slurm(stand_in_of_slurm, monkeypatch) -> Path:
    # So that every look is a new one.
    monkeypatch.setattr("submitit.SlurmJob.watcher.update_if_long_enough", _always)
    return stand_in_of_slurm


def _always(mode):
    from submitit import SlurmJob

    if mode != "cache":
        SlurmJob.watcher.update()


def test_slurm(tmp_path, capsys, started, slurm):
    out = tmp_path / "sweep"
    jobs = ("--launch", "slurm", "--slurm", "time=60", "partition=gpu", "gpus_per_node=1")
    started.behaviour |= {0.001: "hang"}
    with when(lambda: (out / AT[1] / "results.json").exists() and (out / AT[0]).exists(), stop_watching):
        assert sweep(out, "--vary", LR, *jobs) == 128 + signal.SIGTERM
    output, errors = capsys.readouterr()
    assert "submitted 2 jobs: 101_0 to 101_1" in output and "continue with the same command" in output
    assert "go on without this command" in errors or "goes on without this command (1 running)" in errors
    assert "`scancel 101` ends them" in errors
    batch = (slurm / "101.sh").read_text()
    for option in ("array=0-1%2", "requeue", "signal=USR2@300", "time=60", "partition=gpu", "job-name=ssl-ib-sweep"):
        assert f"#SBATCH --{option}\n" in batch
    assert json.loads((out / "jobs.json").read_text()) == {
        AT[0]: {"launcher": "slurm", "job": "101_0"},
        AT[1]: {"launcher": "slurm", "job": "101_1"},
    }

    # Its time is nearly over: Slurm tells every process of the job; and the run is begun again.
    run = str(out / AT[0]).encode()
    (child,) = processes_of(b"child.py", run)
    for pid in (child, int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])):
        os.kill(pid, signal.SIGUSR2)
    assert sweep(out, "--vary", "optim.lr=1e-3,2e-3,3e-3", *jobs) == 0
    output = capsys.readouterr().out
    assert "attached to 1 job of an earlier call" in output and "submitted 1 job: 102" in output
    assert (out / AT[0] / "saved").exists() and (slurm / "101_0").read_text().count("begun") == 2
    assert [record["status"] for record in records(out)] == ["done"] * 3
    assert started.runs == [*AT[:2], "optim.lr_0.003/seed_0"]


@pytest.mark.slow
def test_local(tmp_path, monkeypatch, capsys, started):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "sweep"
    started.behaviour |= {0.001: "hang"}
    # One at a time.
    with when(lambda: (out / AT[0]).exists(), stop_watching):
        assert sweep(out, "--vary", LR, "--launch", "local") == 128 + signal.SIGTERM
    errors = capsys.readouterr().err
    assert "1 job goes on without this command (1 running), and 1 more were not submitted" in errors
    (controller,) = (entry["job"] for entry in json.loads((out / "jobs.json").read_text()).values())

    with when(lambda: (out / AT[1] / "results.json").exists(), lambda: os.kill(int(controller), signal.SIGTERM)):
        assert sweep(out, "--vary", LR, "--launch", "local", "--slurm", "array_parallelism=2") == 0
    output = capsys.readouterr().out
    assert "attached to 1 job of an earlier call (1 running)" in output
    assert "optim.lr_0.001 seed 0: stopped" in output and "1 of 2 runs are done" in output
    assert sweep(out, "--vary", LR, "--launch", "local") == 0
    assert [record["status"] for record in records(out)] == ["done"] * 2


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_requeued_is_the_one_that_nothing_disturbed(tmp_path, monkeypatch, slurm):
    out = tmp_path / "sweep"
    run = out / "optim.lr_0.001" / "seed_0"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SSL_IB_TEST_PAUSE", "0.3")

    def preempt():
        # The stand-in of srun names the same command.
        srun = processes_of(b"slurm.py")
        (submitted,) = (pid for pid in processes_of(b"submitit.core._submit", str(out).encode()) if pid not in srun)
        for pid in (submitted, *processes_of(b"ssl_ib.cli.train", str(run).encode())):
            os.kill(pid, signal.SIGUSR2)

    metrics = run / "metrics.jsonl"
    arguments = ("criterion=queued", "eval.linear.enabled=false", "--vary", "optim.lr=1e-3")
    with when(lambda: metrics.exists() and '"step": 5,' in metrics.read_text(), preempt):
        assert sweep(out, *arguments, "--launch", "slurm", "--slurm", "time=60") == 0
    assert "stopped by SIGTERM at step" in (said := run.with_name("seed_0.log").read_text()) and "resumed" in said
    assert (slurm / "101").read_text().count("begun") == 2
    assert_same_run(finished("criterion=queued", "eval.linear.enabled=false", "optim.lr=1e-3"), run)


@pytest.mark.slow
def test_a_run_of_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "sweep"
    run = str(out / "base" / "seed_0").encode()
    seen = []
    # torchrun and two processes.
    with when(lambda: len(processes_of(b"ssl_ib.cli.train", run)) == 3, lambda: seen.append(3)):
        more = ("parallel=ddp", "device=cpu", "epochs=1", "eval.linear.enabled=false")
        assert sweep(out, *more, "--launch", "local", "--slurm", "gpus_per_node=2") == 0
    assert seen and [record["status"] for record in records(out)] == ["done"]
