"""The CUDA C++ kernels on the CPU: the sources built by a plain compiler, with CUDA's execution model emulated."""

import shutil

import pytest

from ssl_ib.ops import extension


@pytest.fixture(scope="session")
def csrc():
    """The emulated module, built once and kept between sessions; skips where there is no C++ compiler."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: c++ is not on the PATH")
    return extension.load_emulated()


@pytest.fixture(params=["forward", "reverse"])
def thread_order(request, csrc):
    """Runs a test in two orders of the emulated threads: what is right in both does not lean on an order."""
    csrc.set_thread_order(request.param)
    yield request.param
    csrc.set_thread_order("forward")
