"""The kernel functions at their edges: without the tensors that they may do without, each one of them, and all at once;
with indices out of range; over 65,536 columns.

In plain torch here; of csrc's, emulated, and of Triton's the tests stand beside those of the kernels. With a GPU csrc
is tested here too.
"""

import many_columns
import out_of_range
import pytest
import torch
from optional_tensors import ARGUMENTS, absences, check

from ssl_ib.ops import backend, crossover
from ssl_ib.ops.chunked import softmax as chunked_softmax

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


@pytest.mark.parametrize("temperature", many_columns.TEMPERATURES)
@pytest.mark.parametrize(("device", "library", "dtype"), RUNS, ids=lambda x: str(x).removeprefix("torch."))
def test_sums_over_65536_columns(device, library, dtype, temperature):
    functions = backend.library("lse", library)
    many_columns.check_answers(functions.posterior, dtype, temperature, device)
    check = many_columns.check_gradients
    check(functions.lse, functions.lse_backward, functions.posterior_backward, dtype, temperature, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_vectors_need_no_maximum_where_twice_their_inverse_temperature_is_below_87(dtype):
    rows, cols = many_columns.vectors(dtype)
    bounded = {t: chunked_softmax._Logits(rows, cols, t).bounded() for t in (2 / 87, 2 / 90)}
    assert bounded == {2 / 87: True, 2 / 90: False}
    assert not chunked_softmax._Logits(3 * rows, cols, 2 / 87).bounded()
