"""The public ops, forward and backward, on kernels that need a GPU: Triton's interpreted, csrc's emulated."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import fits_numpy

ROOT = Path(__file__).resolve().parents[2]


def small_shapes(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "small_shapes.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@fits_numpy
def test_triton_interpreted():
    child = small_shapes("chunked", "triton", "--device", "cpu", TRITON_INTERPRET="1")
    assert child.returncode == 0 and "wrong: 0" in child.stdout, child.stdout + child.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: c++ is not on the PATH")
def test_csrc_emulated():
    child = small_shapes("cuda", "--device", "cpu", "--emulate")
    assert child.returncode == 0 and "wrong: 0" in child.stdout, child.stdout + child.stderr
