"""Triton's kernels run on the GPU where there is one, and else in Triton's interpreter.

The interpreter is chosen when triton is imported, for the whole process, and other tests import triton first (timm
does) or compile with it. So without a GPU a module of kernel tests needs a process of its own: the one in which it is
named on the command line, or else a child that `test_interpreted.py` starts.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

#: The modules whose kernels run.
MODULES = ("test_triton_gather.py", "test_triton_softmax.py")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED

# Holds for whole folders only: pytest collects what the command line names.
collect_ignore = [] if ON_GPU or INTERPRETED else list(MODULES)


def pytest_configure(config: pytest.Config) -> None:
    named = {Path(argument.split("::")[0]).name for argument in config.args}
    if named.intersection(MODULES) and not ON_GPU:
        assert INTERPRETED or "triton" not in sys.modules, "triton was imported before its tests could choose"
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def rounding() -> Iterator[None]:
    """Lets the interpreter round float32 to bfloat16 to the nearest, as compiled kernels do: it truncates."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(numbers: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(numbers, source, target, mode)
        return torch.from_numpy(np.array(numbers, np.float32)).bfloat16().view(torch.uint16).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> Path:
    return Path(__file__).with_name(request.param)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of a kernel's test live."""
    return "cuda" if ON_GPU else "cpu"
