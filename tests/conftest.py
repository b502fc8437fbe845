"""Shared set-up of the tests: few threads, workers where pytest-xdist is installed, and the folder of real images."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite takes a worker a core, unless the command line says otherwise or pytest-xdist is not there."""
    options = config.option
    if not config.pluginmanager.hasplugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:  # A worker comes here too.
        return
    if options.numprocesses is None and not options.file_or_dir:
        options.numprocesses, options.dist = "logical", "worksteal"


@pytest.fixture(scope="session", autouse=True)
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The folder of the runs that tests only read (harness.py), one for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    folder.mkdir(exist_ok=True)
    os.environ["SSL_IB_FINISHED_RUNS"] = str(folder)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run in the background of a shell script, which has it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of small real sets (`SSL_IB_DATA`, default ../shared/data); skips where it is absent."""
    path = Path(os.environ.get("SSL_IB_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no image data at {path}: set SSL_IB_DATA")
    return path


@pytest.fixture
def stand_in_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what a stand-in of Slurm knows of its jobs; its commands are found first."""
    root = Path(__file__).resolve().parents[1]
    place, commands = tmp_path / "slurm", tmp_path / "bin"
    for folder in (place, commands):
        folder.mkdir()
    for role in ("sbatch", "srun", "sacct", "scontrol"):
        script = commands / role
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -S {root / "tests" / "sweep" / "slurm.py"} {role} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_TEST", str(place))
    monkeypatch.setenv("PYTHONPATH", str(root))
    return place
