"""`ssl-ib-sweep`: what runs, what is skipped, continued or refused, and the files that it leaves."""

import csv
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from harness import PARTS, ROOT, STEPS, TINY, assert_same_run, finished, losses, rows

from ssl_ib.cli.sweep import main
from ssl_ib.errors import UserError
from ssl_ib.sweep import folder, runner


def sweep(out: Path, *arguments: str) -> int:
    return main([TINY, "--plugin", PARTS, "--out", str(out), *arguments])


def table(out: Path) -> list[list[str]]:
    lines = (out / "table.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def records(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "results.csv").open()))


LR = "optim.lr=1e-3,2e-3"
AT = [f"optim.lr_{lr}/seed_{seed}" for seed in (0, 1) for lr in ("0.001", "0.002")]


def test_a_grid_and_its_files(tmp_path, capsys, started):
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", LR, "--seeds", "0,1") == 0
    assert started.runs == AT
    output, errors = capsys.readouterr()
    assert errors == "" and "4 runs (2 points)" in output and "4 of 4 runs are done" in output
    assert "[1/4] optim.lr_0.001 seed 0: knn/top1 0.1000, health/rankme 12.00, minutes 0.5000" in output
    assert {path.name for path in out.iterdir()} == {
        "optim.lr_0.001",
        "optim.lr_0.002",
        "sweep.yaml",
        "results.csv",
        "table.md",
        "plot.png",
    }
    found = records(out)
    assert [(r["optim.lr"], r["seed"], r["status"]) for r in found] == [
        ("0.001", "0", "done"),
        ("0.002", "0", "done"),
        ("0.001", "1", "done"),
        ("0.002", "1", "done"),
    ]
    assert [float(r["knn/top1"]) for r in found] == pytest.approx([0.1, 0.2, 0.2, 0.3])
    assert {(r["untrained/knn/top1"], r["seconds"], r["health/rankme"]) for r in found} == {("0.25", "30.0", "12.0")}
    # The deviation of 0.1 and 0.2 is 0.1 / sqrt(2).
    assert table(out) == [
        ["optim.lr", "knn/top1", "health/rankme", "minutes", "n"],
        ["0.001", "0.1500 ± 0.0707", "12.00 ± 0.00", "0.5000 ± 0.0000", "2"],
        ["0.002", "0.2500 ± 0.0707", "12.00 ± 0.00", "0.5000 ± 0.0000", "2"],
    ]
    assert (out / "table.md").read_text() in output


def test_what_is_done_is_skipped_and_more_is_added(tmp_path, capsys, started):
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", "optim.lr=1e-3") == 0
    assert table(out)[1] == ["0.001", "0.1000", "12.00", "0.5000", "1"]
    assert sweep(out, "--vary", LR) == 0
    assert sweep(out, "--vary", LR, "--seeds", "0,1") == 0
    assert sweep(out, "--vary", LR, "--seeds", "0,1") == 0
    assert started.runs == AT and "4 done before" in capsys.readouterr().out
    assert [row[-1] for row in table(out)[1:]] == ["2", "2"]


def test_another_base_is_refused(tmp_path, capsys, started):
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", LR, "epochs=3") == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert sweep(out, "--vary", LR, "epochs=4", "batch_size=32") == 2
    error = capsys.readouterr().err
    assert "another base" in error and "overrides.epochs: 3 -> 4" in error and "overrides.batch_size: None" in error
    assert main(["simclr_digits", "epochs=3", "--out", str(out), "--vary", LR]) == 2
    assert "recipe: 'tiny' -> 'simclr_digits'" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_of_another_configuration_is_refused(tmp_path, capsys, started):
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", LR) == 0
    config = out / AT[1] / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("epochs: 2", "epochs: 5").replace("device: auto", "device: cpu"))
    assert sweep(out, "--vary", LR) == 2
    error = capsys.readouterr().err
    assert f"{AT[1]}: epochs: 5 -> 2" in error and "device" not in error
    config.unlink()
    assert sweep(out, "--vary", LR) == 2
    assert f"{AT[1]} holds files but no run" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path, capsys, started):
    (tmp_path / "notes.txt").write_text("mine")
    assert sweep(tmp_path, "--vary", LR) == 2
    assert "holds files but no sweep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"] and started.runs == []


def test_one_sweep_at_a_time(tmp_path, capsys, started):
    with (tmp_path / "sweep.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep(tmp_path, "--vary", LR) == 2
        assert "another sweep" in capsys.readouterr().err and started.runs == []
    assert sweep(tmp_path, "--vary", LR) == 0


def test_all_mistakes_at_once_and_nothing_written(tmp_path, capsys, started):
    out = tmp_path / "sweep"
    arguments = ("--vary", "optim.lr=1e-3,fast", "--vary", "seed=1", "--case", "a: epoch=3", "--seeds", "x", "depth=2")
    assert sweep(out, *arguments) == 2
    error = capsys.readouterr().err
    for expected in ("--vary seed", "--seeds", "'fast'", "epoch: unknown key", "depth: unknown key"):
        assert expected in error
    assert not out.exists() and started.runs == []


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "which recipe?"),
        (["epochs=3"], "expected RECIPE first"),
        (["mrcl_digit"], "unknown recipe 'mrcl_digit'; did you mean 'mrcl_digits'"),
        ([TINY, "--jobs", "0"], "--jobs: expected a number above 0, got 0"),
        ([TINY, "--budget-minutes", "-1"], "--budget-minutes: expected a number of at least 0, got -1"),
        ([TINY, "--metric", "loss", "epochs=3"], "--metric: 'epochs=3' is no metric"),
        ([TINY, "seed=1", "--seeds", "0,1"], "seed: is given as an override and by --seeds"),
        ([TINY, "--plugin", "absent_plugin"], "plugin 'absent_plugin' is neither"),
        ([TINY, "--metric", "loss", "mrcl_digits"], "--metric: 'mrcl_digits' is no metric"),
        # What only shows when the parts are built is found before anything runs, too.
        (
            [TINY, "--plugin", PARTS, "--vary", "views.size=16,15"],
            "cannot be cut into patches of 8: use model.backbone_args",
        ),
        ([TINY, "--plugin", PARTS, "--vary", "parallel=none,ddp"], "a sweep gives each run one process"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output, error = capsys.readouterr()
    assert output == "" and expected in error and list(tmp_path.iterdir()) == []


def test_a_failing_point_stops_no_other(tmp_path, capsys, started):
    started.behaviour |= {0.002: "refuse", 0.003: "die"}
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", "optim.lr=1e-3,2e-3,3e-3,4e-3") == 1
    output = capsys.readouterr().out
    log = out / "optim.lr_0.002" / "seed_0.log"
    assert f"optim.lr_0.002 seed 0: failed (exit code 2: ssl-ib-train: this cannot be); see {log}" in output
    assert "optim.lr_0.003 seed 0: failed (killed by SIGKILL: " in output and "2 of 4 runs are done" in output
    assert [record["status"] for record in records(out)] == ["done", "failed", "failed", "done"]
    assert [row[1] for row in table(out)[1:]] == ["0.1000", "-", "-", "0.4000"]
    # Called again, both are tried again; the one that was killed is continued.
    del started.behaviour[0.002]
    assert sweep(out, "--vary", "optim.lr=1e-3,2e-3,3e-3,4e-3") == 0
    assert len(started.runs) == 6 and len(log.read_text().split("threads")) == 3


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_signal_reaches_the_runs(tmp_path, capsys, started, jobs):
    started.behaviour |= {0.001: "hang" if jobs == "2" else "stop_parent", 0.002: "stop_parent"}
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", "optim.lr=1e-3,2e-3,3e-3", "--jobs", jobs) == 128 + signal.SIGTERM
    output = capsys.readouterr().out
    assert len(started.runs) == int(jobs) and (out / AT[0] / "saved").exists()
    assert "continue with the same command: ssl-ib-sweep " in output and "0 of 3 runs are done" in output
    assert [r["status"] for r in records(out)] == ["begun"] * int(jobs) + ["waiting"] * (3 - int(jobs))
    started.behaviour.clear()
    assert sweep(out, "--vary", "optim.lr=1e-3,2e-3,3e-3", "--jobs", jobs) == 0
    assert [r["status"] for r in records(out)] == ["done"] * 3


def test_a_second_interrupt_ends_the_runs_at_once(tmp_path, capsys, ctrl_c, started):
    started.behaviour |= {0.001: "stubborn"}
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", LR) == 130
    assert "interrupted" in capsys.readouterr().err and started.runs == AT[:1]
    with pytest.raises(ProcessLookupError):
        os.kill(int((out / AT[0] / "pid").read_text()), 0)


def test_a_run_that_outlives_its_sweep_keeps_the_folder(tmp_path):
    # As a killed sweep leaves it: it has removed nothing.
    with (tmp_path / "sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        inherited = (lock.fileno(),)
        left = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=inherited)
    with pytest.raises(UserError, match="a run that it left behind"), folder.lock(tmp_path):
        raise AssertionError("the folder was free")
    left.communicate(b"\n")
    with folder.lock(tmp_path):
        pass


def test_importing_the_command_is_light():
    script = "import sys, ssl_ib.cli.sweep\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert not {"matplotlib", "pydantic", "yaml", "timm", "torchvision", "ssl_ib.sweep"} & set(loaded.split())


def test_a_run_with_results_is_done_however_it_ended(tmp_path, started):
    started.behaviour |= {0.001: "done_but_killed"}
    assert sweep(tmp_path, "--vary", LR) == 0
    assert [record["status"] for record in records(tmp_path)] == ["done", "done"]


def test_no_budget_starts_nothing(tmp_path, capsys, started):
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", LR, "--budget-minutes", "0") == 0
    assert started.runs == [] and [r["status"] for r in records(out)] == ["waiting", "waiting"]
    assert "0 of 2 runs are done" in capsys.readouterr().out


def test_the_end_of_the_budget_stops_what_is_running(tmp_path, started):
    started.behaviour |= {0.001: "hang"}
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", LR, "--budget-minutes", "0.01") == 0
    assert started.runs == AT[:1] and [r["status"] for r in records(out)] == ["begun", "waiting"]
    assert sweep(out, "--vary", LR) == 0
    assert [r["status"] for r in records(out)] == ["done", "done"]


@pytest.mark.parametrize(
    "left, durations, expected",
    [
        (None, [9.0], True),
        (0.0, [], False),
        (1.0, [], True),
        (10.0, [5.0, 15.0], True),
        (9.9, [5.0, 15.0], False),
    ],
)
def test_a_run_that_would_not_end_in_time_is_not_started(left, durations, expected):
    assert runner.may_start(left, durations) is expected


def test_runs_at_once_share_the_cores(tmp_path, monkeypatch, started):
    def threads(out):
        return {path.read_text() for path in out.glob("*/*.log")}

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(7))
    assert sweep(tmp_path / "a", "--vary", LR) == 0
    assert sweep(tmp_path / "b", "--vary", LR, "--jobs", "2") == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert sweep(tmp_path / "c", "--vary", LR, "--jobs", "2") == 0
    assert [threads(tmp_path / name) for name in "abc"] == [{"threads None\n"}, {"threads 3\n"}, {"threads 5\n"}]


def test_dry_run(tmp_path, capsys, started):
    out = tmp_path / "sweep"
    assert sweep(out, "--vary", "masker={name: grid, ratio: 0.5},none", "--seeds", "3", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "2 runs (2 points)" in output and started.runs == [] and not out.exists()
    assert f"ssl-ib-train {TINY} 'masker={{name: grid, ratio: 0.5}}' seed=3 --out {out}/masker_" in output


def test_the_commands_of_the_page_are_valid(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("ssl-ib-sweep ")]
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main([*command[1:], "--dry-run"]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert "9 runs (3 points)" in output and "12 runs (4 points)" in output and "4 runs (4 points)" in output


def test_the_folder_is_named_after_the_recipe(tmp_path, monkeypatch, capsys, started):
    monkeypatch.chdir(tmp_path)
    assert main([TINY, "--plugin", PARTS, "--vary", LR]) == 0
    assert Path("sweeps/tiny/table.md").is_file() and "in sweeps/tiny" in capsys.readouterr().out


def test_an_unknown_metric_is_said(tmp_path, capsys, started):
    assert sweep(tmp_path, "--vary", LR, "--metric", "knn/top", "health/rankme") == 0
    assert "no run has the metric 'knn/top'; did you mean 'knn/top1'" in capsys.readouterr().err
    assert table(tmp_path)[0] == ["optim.lr", "health/rankme", "n"]


# --- real runs --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_half_way_is_continued(tmp_path, monkeypatch, capsys):
    """SIGTERM to the sweep, in the middle of its only run; then the same command: the run nothing disturbed."""
    out = tmp_path / "sweep"
    run = out / "optim.lr_0.001" / "seed_0"
    arguments = ("criterion=queued", "eval.linear.enabled=false", "--vary", "optim.lr=1e-3")
    arguments += ("--metric", "knn/top1", "loss/queue", "step")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SSL_IB_TEST_PAUSE", "0.2")

    def stop_half_way():
        for _ in range(3000):
            if (run / "metrics.jsonl").exists() and '"step": 5,' in (run / "metrics.jsonl").read_text():
                break
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_half_way)
    thread.start()
    assert sweep(out, *arguments) == 128 + signal.SIGTERM
    thread.join()
    assert 5 <= losses(run)[-1][0] < 2 * STEPS and not (run / "results.json").exists()
    assert "stopped by SIGTERM at step" in run.with_name("seed_0.log").read_text()
    assert "optim.lr_0.001 seed 0: stopped" in capsys.readouterr().out
    monkeypatch.setenv("SSL_IB_TEST_PAUSE", "0")
    assert sweep(out, *arguments) == 0
    assert_same_run(finished("criterion=queued", "eval.linear.enabled=false", "optim.lr=1e-3"), run)
    knn = rows(run)[-1]["knn/top1"]
    (record,) = records(out)
    assert float(record["knn/top1"]) == knn and float(record["loss/queue"]) == rows(run)[-2]["loss/queue"]
    assert table(out)[1] == ["0.001", f"{knn:.4f}", f"{rows(run)[-2]['loss/queue']:.3f}", f"{2 * STEPS}.00", "1"]


def test_results_json(tmp_path):
    out = finished()
    found = json.loads((out / "results.json").read_text())
    assert list(found) == ["untrained", "raw_pixels", "trained", "chance", "seconds", "step"]
    assert found["trained"]["linear/top1"] == rows(out)[-1]["linear/top1"] and found["step"] == 2 * STEPS
    assert found["untrained"]["knn/top1"] == rows(out)[0]["knn/top1"] and 0 < found["seconds"] < 600
    assert not list(out.glob("*.tmp"))


def test_choosing_without_labels(tmp_path, capsys, started, monkeypatch):
    monkeypatch.setattr("ssl_ib.sweep.plot.draw", lambda report, path: "no plot")
    out, more = tmp_path / "sweep", ["--vary", "optim.lr=1e-3,2e-3,3e-3,4e-3"]
    assert sweep(out, *more, "--choose-by", "helth/rankme") == 2
    error = capsys.readouterr().err
    assert "'helth/rankme' is better is not known; did you mean 'health/rankme'" in error and not out.exists()
    assert sweep(out, *more, "--choose-by", "loss") == 2 and "did you mean 'held_out/loss'" in capsys.readouterr().err
    assert sweep(out, *more, "--choose-by", "knn/top1") == 0
    output = capsys.readouterr().out
    assert "keep optim.lr 0.004 seed 0: the higher the better, knn/top1 0.4000" in output and "with labels" in output
    # Rank is the same for all; called again, with everything done, the answer is there without a run.
    assert sweep(out, *more, "--choose-by", "health/rankme") == 0
    output = capsys.readouterr().out
    assert "4 done before" in output and "do not trust this choice: no spread" in output
    assert sweep(out, *more, "--choose-by", "held_out/loss") == 0
    assert "no finished run has 'held_out/loss'" in capsys.readouterr().err
    for place in out.glob("*/seed_*/results.json"):
        found = json.loads(place.read_text())
        found["trained"]["held_out/loss"] = -found["trained"]["knn/top1"]
        place.write_text(json.dumps(found))
    assert sweep(out, *more, "--choose-by", "held_out/loss") == 0
    output = capsys.readouterr().out
    assert "keep optim.lr 0.004 seed 0: the lower the better, held_out/loss -0.4000, knn/top1 0.4000" in output
    assert "rho of held_out/loss with knn/top1: +1.00 [+1.00, +1.00] over 4 runs of 4 points" in output
    assert "do not trust this choice: only 4 points" in output
