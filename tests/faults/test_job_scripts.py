"""The scripts for Slurm in the documentation, run by bash with stand-ins for Slurm's commands and the run."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SCRIPTS = {
    f"{page}-{number}": script
    for page in ("reliability.md", "scale.md")
    for number, script in enumerate(re.findall(r"```bash\n(#!/bin/bash\n.*?)```", (DOCS / page).read_text(), re.DOTALL))
}
#: A run that says its process and goes on until it is told what to do; asked to stop, it leaves as a saved run does.
RUN = """#!/bin/bash
trap 'exit 138' USR1
trap 'exit 143' TERM
echo $$ > "$SCRATCH/pid.new"; mv "$SCRATCH/pid.new" "$SCRATCH/pid"
while [ ! -s "$SCRATCH/end" ]; do sleep 0.02; done
exit "$(cat "$SCRATCH/end")"
"""
STAND_INS = {
    "srun": '#!/bin/bash\nexec "$@"\n',
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo node1 || echo "$@" >> "$SCRATCH/requeued"\n',
    "ssl-ib-train": RUN,
    "torchrun": RUN,
}


def test_both_pages_have_scripts():
    assert set(SCRIPTS) == {"reliability.md-0", "reliability.md-1", "scale.md-0"}


@pytest.fixture(params=SCRIPTS.values(), ids=SCRIPTS)
def job(request, tmp_path):
    """Starts the script, and waits until its run has begun."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {"SCRATCH": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    process = subprocess.Popen(
        ["bash", "-c", request.param], env=os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    )
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield process, request.param
    (tmp_path / "end").write_text("0")
    process.wait(30)


@pytest.mark.parametrize("last", [False, True], ids=["in its steps", "at its end"])
def test_a_job_whose_time_is_over_is_requeued_until_the_run_is_done(job, tmp_path, last):
    process, script = job
    # With `B:` Slurm sends the signal to the script alone, else to the run.
    asked = process.pid if "--signal=B:USR1" in script else int((tmp_path / "pid").read_text())
    if last:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "results.json").touch()
        (tmp_path / "end").write_text("0")
    else:
        os.kill(asked, signal.SIGUSR1)
    code = process.wait(30)
    assert (tmp_path / "requeued").exists() == (not last)
    assert code == (0 if last else 143 if "torchrun" in script else 138)


def test_a_run_that_fails_fails_the_job(job, tmp_path):
    process, _ = job
    (tmp_path / "end").write_text("2")
    assert process.wait(30) == 2 and not (tmp_path / "requeued").exists()
