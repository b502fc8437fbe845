"""tools/faults.py, which does faults to runs for hours: two trials of it, and one that has to fail."""

import subprocess
import sys

import pytest
from harness import ROOT, environment


def trials(tmp_path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "faults.py", "--out", tmp_path / "out", *arguments]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_two_trials(tmp_path):
    done = trials(tmp_path, "--trials", "2", "--only", "kill in a save")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| kill in a save | 2 | 2 | 0 |" in done.stdout and done.stdout.count("survived: ") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images", "undisturbed"]


@pytest.mark.slow
def test_what_is_not_the_same_afterwards_has_failed(tmp_path):
    """The undisturbed run is another one: the trial cannot end as it did."""
    assert trials(tmp_path, "--trials", "1", "--only", "folder deleted").returncode == 0
    (log,) = (tmp_path / "out" / "undisturbed").rglob("metrics.jsonl")
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1'))
    done = trials(tmp_path, "--trials", "1", "--only", "folder deleted")
    assert done.returncode == 1 and "| folder deleted | 1 | 0 | 1 |" in done.stdout, done.stdout + done.stderr
    assert "FAILED: folder deleted" in done.stdout and "--seed 0 --trials 1 --only" in done.stdout
    assert (tmp_path / "out" / "trial_0" / "run").is_dir()
