"""The scripts of docs/scale.md and docs/reliability.md for Slurm, as far as they run on one machine without it."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from harness import PARTS, ROOT, TINY, environment, rows

from ssl_ib.cli import train
from ssl_ib.config.recipe import recipe_names

PAGES = [ROOT / "docs" / name for name in ("scale.md", "reliability.md")]
BLOCKS = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
SCRIPTS = [block for block in BLOCKS if block.startswith("#!/bin/bash")]


def test_the_scripts_are_bash():
    assert len(SCRIPTS) == 3
    for block in BLOCKS:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_what_torchrun_is_given_is_a_command():
    commands = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if " ssl_ib.cli" in line]
    assert len(commands) == 5
    for command in commands:
        words = command.partition("-m ssl_ib.cli.train ")[2].removesuffix("&").split()
        options = train.parser().parse_intermixed_args(words)
        assert options.overrides in (["parallel=ddp"], ["parallel=fsdp"])
        assert options.auto_resume if options.recipe == "RECIPE" else options.recipe in recipe_names()


@pytest.mark.slow
def test_the_script_for_several_machines(tmp_path, stand_in_of_slurm):
    """Two machines, which are this one, with a process each: asked to stop half way, requeued, and done."""
    (script,) = (block for block in SCRIPTS if "--nnodes" in block)
    arguments = f"{TINY} --plugin {PARTS} device=cpu criterion=queued checkpoint.every_steps=1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = script.replace("RECIPE", arguments).replace("--nproc-per-node 8", "--nproc-per-node 1")
    script = script.replace(":29500", f":{port}")
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SCRATCH": str(tmp_path)}
    run = tmp_path / "run"
    for asked in (True, False):
        pause = "0.3" if asked else "0"
        with (tmp_path / "said").open("ab") as said:
            process = subprocess.Popen(
                ["bash", "-c", script],
                env=environment(**job, SSL_IB_TEST_PAUSE=pause),
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        try:
            if asked:
                _reach(run, process, 4)
                process.send_signal(signal.SIGUSR1)
            process.wait(600)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert (stand_in_of_slurm / "7.requeue").exists() and (run / "results.json").exists() is not asked
    said = (tmp_path / "said").read_text()
    assert "stopped by SIGTERM at step" in said and "resumed    at step" in said
    steps = [row["step"] for row in rows(run) if "loss" in row]
    assert steps == list(range(1, 23))


def _reach(run: Path, process: subprocess.Popen, step: int) -> None:
    metrics = run / "metrics.jsonl"
    for _ in range(30000):
        assert process.poll() is None, run.with_name("said").read_text()
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)
    raise AssertionError("the run does not move")
