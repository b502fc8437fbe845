"""Shared set-up of the tests: few threads, and the folder of real images where there is one."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


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
