"""Runs the kernels' tests in Triton's interpreter, in processes of their own: `conftest.py` says why."""

import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels' tests run compiled, in this process")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on in this process")
@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(module, marker):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marker, str(module)]
    child = subprocess.run(command, capture_output=True, text=True)
    # A module may have no slow tests.
    fine = {pytest.ExitCode.OK} | ({pytest.ExitCode.NO_TESTS_COLLECTED} if marker == "slow" else set())
    assert child.returncode in fine, child.stdout + child.stderr
