"""A pytest plugin for tests whose Triton kernels run in its interpreter: rounding as compiled kernels round, and a
count of the variants that a GPU would compile.

tests/kernels/conftest.py has it for the kernels' own tests. With `-p interpreter` the tests of the ops have it too:

    cd tests && TRITON_INTERPRET=1 python -m pytest -p interpreter ops/test_backends.py
"""

import importlib
import json
import os
import pkgutil
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version

#: Before 3.7 the interpreter makes an int of an array of one number, which numpy refuses since 2.4.
fits_numpy = pytest.mark.skipif(
    find_spec("triton") is not None
    and Version(version("triton")) < Version("3.7")
    and Version(np.__version__) >= Version("2.4"),
    reason="the interpreter of Triton before 3.7 needs numpy before 2.4",
)
#: The file to add the variants to, a line each; none are counted without it.
VARIANTS = "SSL_IB_TEST_VARIANTS"


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


@pytest.fixture(scope="session", autouse=True)
def variants() -> Iterator[None]:
    """Notes what every launch would compile: its kernel, constants, and the types and alignments of its tensors."""
    if VARIANTS not in os.environ:
        yield
        return
    import ssl_ib_kernels

    seen: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for found in pkgutil.iter_modules(ssl_ib_kernels.__path__, "ssl_ib_kernels."):
            module = importlib.import_module(found.name)
            if hasattr(module, "launch") and not found.name.endswith(".variant"):
                patch.setattr(module, "launch", _counting(module.launch, seen))
        yield
    with Path(os.environ[VARIANTS]).open("a") as file:
        file.writelines(line + "\n" for line in sorted(seen))


#: Whether launches are counted.
_counts = True


@pytest.fixture
def not_compiled() -> Iterator[None]:
    """For a test of many variants that need no GPU: skipped where there is one, and not counted."""
    global _counts
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("many variants to compile, and the interpreter runs them all")
    _counts = False
    yield
    _counts = True


def _counting(launch: Any, seen: set[str]) -> Any:
    def counting(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any) -> None:
        constants = kernel.fn.__annotations__
        parts = {name: value if name in constants else _type(value) for name, value in arguments.items()}
        if _counts:
            seen.add(json.dumps([kernel.fn.__name__, num_warps, num_stages, parts], sort_keys=True))
        launch(kernel, grid, num_warps, num_stages, **arguments)

    return counting


def _type(value: Any) -> Any:
    """What Triton distinguishes of an argument that is no constant: launches exempt integers from specialisation."""
    if isinstance(value, torch.Tensor):
        # Compiled kernels refuse sums that turn from float32 to float64; the interpreter does not.
        assert value.dtype != torch.float64, "a kernel is given float64"
        return [str(value.dtype), value.data_ptr() % 16 == 0]
    return value if value is None else type(value).__name__
