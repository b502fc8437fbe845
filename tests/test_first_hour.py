"""The first hour of a newcomer with a folder of images, in its small form."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "first_hour.sh"


def first_hour(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment)


def test_the_small_form():
    done = first_hour("--small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and done.stdout.endswith("all steps passed\n")
    assert done.stdout.count("\nok ") > 10


def test_what_it_needs_is_said():
    done = first_hour(SSL_IB_DATA="/nowhere")
    assert (done.returncode, done.stdout) == (2, "") and "--small needs no images" in done.stderr


def test_a_step_that_fails_is_shown(tmp_path):
    # A python that can do nothing: the images are not even made.
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    assert first_hour("--small", PYTHON=str(python)).returncode == 1
