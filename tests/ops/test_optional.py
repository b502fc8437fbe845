"""The kernel functions without the tensors that they may do without: each one of them, and all at once.

In plain torch here; of csrc's, emulated, and of Triton's the tests stand beside those of the kernels. With a GPU csrc
is tested here too.
"""

import out_of_range
import pytest
import torch
from optional_tensors import ARGUMENTS, absences, check

from ssl_ib.ops import backend, crossover

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = [("cpu", "chunked", dtype) for dtype in DTYPES]
if torch.cuda.is_available():
    RUNS += [("cuda", "cuda", dtype) for dtype in DTYPES]


def test_every_function_is_called_here():
    assert set(backend.library("lse", "chunked").__all__) == set(ARGUMENTS)


@pytest.mark.parametrize(("device", "library", "dtype"), RUNS, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_absent_tensor_is_a_neutral_one(device, library, name, dtype):
    if (name.removesuffix("_backward"), library) in crossover.INSTEAD:
        pytest.skip("csrc has no kernel for it")
    function = getattr(backend.library(name, library), name)
    for absent in absences(function):
        check(function, name, absent, device, dtype)


@pytest.mark.parametrize(("device", "library"), sorted({(device, library) for device, library, _ in RUNS}))
@pytest.mark.parametrize("name", [*out_of_range.GATHERS, "lse"])
def test_an_index_out_of_range_names_nothing(device, library, name):
    if (name.removesuffix("_backward"), library) in crossover.INSTEAD:
        pytest.skip("csrc has no kernel for it")
    function = getattr(backend.library(name, library), name)
    if name == "lse":
        out_of_range.check_columns(function, device)
    else:
        out_of_range.check_gather(function, name, device)
