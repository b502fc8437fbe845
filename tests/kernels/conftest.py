"""Triton's kernels run on the GPU where there is one, and else in Triton's interpreter.

The interpreter is chosen when triton is imported, for the whole process, and other tests import triton first (timm
does) or compile with it. So without a GPU a module of kernel tests needs a process of its own: the one in which it is
named on the command line, or else a child that `test_interpreted.py` starts.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from interpreter import not_compiled, rounding, variants  # noqa: F401

#: The modules whose kernels run.
MODULES = ("test_triton_augment.py", "test_triton_gather.py", "test_triton_softmax.py")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED

# Holds for whole folders only: pytest collects what the command line names.
collect_ignore = [] if ON_GPU or INTERPRETED else list(MODULES)


def pytest_configure(config: pytest.Config) -> None:
    named = {Path(argument.split("::")[0]).name for argument in config.args}
    if named.intersection(MODULES) and not ON_GPU:
        assert INTERPRETED or "triton" not in sys.modules, "triton was imported before its tests could choose"
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> Path:
    return Path(__file__).with_name(request.param)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of a kernel's test live."""
    return "cuda" if ON_GPU else "cpu"
