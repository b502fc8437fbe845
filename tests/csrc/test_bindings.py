"""csrc's bindings, emulated, without the tensors that they may do without: each one of them, and all at once."""

import many_columns
import out_of_range
import pytest
import torch
from optional_tensors import ARGUMENTS, absences, check, optional_tensors

from ssl_ib.ops import chunked
from ssl_ib.ops.crossover import INSTEAD

#: The functions of which csrc has kernels.
FUNCTIONS = [name for name in ARGUMENTS if (name.removesuffix("_backward"), "cuda") not in INSTEAD]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_every_binding_is_called_here(csrc):
    """And it takes the same arguments as plain torch, with the same ones among them optional."""
    bindings = {name for name, value in vars(csrc).items() if "torch.Tensor" in (getattr(value, "__doc__", "") or "")}
    assert bindings == set(FUNCTIONS)
    for name in bindings:
        assert optional_tensors(getattr(csrc, name)) == optional_tensors(getattr(chunked, name)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_absent_tensor_is_a_neutral_one(csrc, name, dtype):
    function = getattr(csrc, name)
    for absent in absences(function):
        check(function, name, absent, "cpu", dtype)


@pytest.mark.parametrize("name", [*(name for name in FUNCTIONS if name in out_of_range.GATHERS), "lse"])
def test_an_index_out_of_range_names_nothing(csrc, name):
    if name == "lse":
        out_of_range.check_columns(csrc.lse)
    else:
        out_of_range.check_gather(getattr(csrc, name), name)


def test_sums_over_65536_columns(csrc):
    many_columns.check_answers(csrc.posterior, torch.bfloat16, many_columns.TEMPERATURES[0])


@pytest.mark.slow
@pytest.mark.parametrize("temperature", many_columns.TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
def test_all_sums_over_65536_columns(csrc, dtype, temperature):
    many_columns.check_answers(csrc.posterior, dtype, temperature)
    many_columns.check_gradients(csrc.lse, csrc.lse_backward, csrc.posterior_backward, dtype, temperature)
