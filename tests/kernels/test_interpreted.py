"""Runs the kernels' tests in Triton's interpreter, in processes of their own: `conftest.py` says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import VARIANTS, fits_numpy

TESTS = Path(__file__).resolve().parents[1]
#: The variants that a GPU may have to compile for a module's tests, at 1 to 3 seconds each; and for these modules and
#: those of the ops together.
MOST = {"test_triton_augment.py": 25, "test_triton_gather.py": 135, "test_triton_softmax.py": 225}
MOST_IN_ALL = 450

pytestmark = [
    fits_numpy,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels' tests run compiled, in this process"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on in this process"),
]


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_in_the_interpreter(module, tmp_path):
    """And few variants are launched: on a GPU each is compiled."""
    variants = tmp_path / "variants"
    child = run("-m", "not slow", module, **{VARIANTS: str(variants)})
    assert child.returncode == pytest.ExitCode.OK, child.stdout + child.stderr
    assert 0 < len(set(variants.read_text().splitlines())) <= MOST[module.name]


@pytest.mark.slow
def test_all_pairs_in_the_interpreter(module):
    child = run("-m", "slow", module)
    # A module may have no slow tests.
    fine = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    assert child.returncode in fine, child.stdout + child.stderr


@pytest.mark.slow
def test_the_ops_run_on_the_interpreter_and_all_tests_launch_few_variants(tmp_path):
    variants = tmp_path / "variants"
    for name in MOST:
        run(Path(__file__).with_name(name), **{VARIANTS: str(variants)})
    of_ops = ("-p", "interpreter", TESTS / "ops" / "test_backends.py", "-k", "triton")
    child = run(*of_ops, **{VARIANTS: str(variants), "TRITON_INTERPRET": "1"})
    assert child.returncode == pytest.ExitCode.OK, child.stdout + child.stderr
    assert 0 < len(set(variants.read_text().splitlines())) <= MOST_IN_ALL
