"""Which implementation of an op runs.

    reference  plain torch, the definition; differentiable twice
    chunked    plain torch in pieces: the memory promise on any device
    triton     `kernels/ssl_ib_kernels`, on a GPU (or on the CPU under Triton's interpreter)
    cuda       `csrc`, on a GPU: built at first use, or with the package; ops that it has no kernel for run in Triton

Every backend but the reference offers the same functions on plain tensors; `operators` makes torch operators of them.
The choice is `use_backend(...)`, or the environment's `SSL_IB_OPS`; "auto" follows the table `crossover.py`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, nearest
from . import crossover, extension

BACKENDS = ("reference", "chunked", "triton", "cuda")

#: Whether the ops look for mistakes that make a GPU wait: indices out of range.
THOROUGH = os.environ.get("SSL_IB_OPS_CHECK") == "1"

_log = logging.getLogger("ssl_ib")


def _checked(name: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise UserError(f"unknown backend of the ops {name!r}{nearest(name, ('auto', *BACKENDS))}")
    return name


#: What `auto` means: the environment's choice, and without one (or with "auto") the table's.
_preferred = _checked(os.environ.get("SSL_IB_OPS", "auto"))
_current = "auto"
_recorders: list[set[tuple[str, str]]] = []
_announced: set[tuple[str, str, str]] = set()


class use_backend:
    """Chooses what the ops run on: "reference", "chunked", "triton", "cuda", or "auto": `SSL_IB_OPS` where it is set,
    else the fastest by measurement (`crossover.py`).

    Called, it holds from then on; as a context manager (`with use_backend("reference"):`) until the block ends.
    A chosen backend that cannot run an op's tensors makes that op raise UserError; "auto" never picks such a one.
    Raises UserError for a backend that does not exist.
    """

    def __init__(self, name: str):
        global _current
        self._before, _current = _current, _checked(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        global _current
        _current = self._before


def wanted() -> str:
    """The choice in force, "auto" where it is left to the table."""
    return _preferred if _current == "auto" else _current


class record:
    """Collects what ran: `with record() as ran:` fills the set `ran` with pairs (function, backend)."""

    def __enter__(self) -> set[tuple[str, str]]:
        self._ran: set[tuple[str, str]] = set()
        _recorders.append(self._ran)
        return self._ran

    def __exit__(self, *exception: object) -> None:
        _recorders[:] = [ran for ran in _recorders if ran is not self._ran]


def ran(function: str, backend: str) -> None:
    """Tells the recorders that `function` runs on `backend`."""
    for recorder in _recorders:
        recorder.add((function, backend))


def why_not(backend: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` cannot run tensors of `dtype` on a device of type `device` ("cpu", "cuda"); None if it can."""
    if backend in ("reference", "chunked"):
        return None
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it runs on a GPU, and the tensors are on the {device} (TRITON_INTERPRET=1 interprets it there)"
        return None
    if device != "cuda":
        return f"it runs on a GPU, and the tensors are on the {device}"
    return extension.why_not()


def automatic(op: str, device: str, dtype: torch.dtype, work: int | None) -> tuple[str, list[str]]:
    """What `auto` takes for an op of size `work` (None: large), and why it passed over what the table prefers."""
    obstacles = []
    for backend in crossover.order(op, device, work):
        reason = why_not(backend, device, dtype) or (_unbuilt() if backend == "cuda" else None)
        if reason is None:
            return backend, obstacles
        obstacles.append(f"{backend}: {reason}")
    raise AssertionError(f"{op}: the table ends with a backend that always runs")


def _unbuilt() -> str | None:
    """Builds csrc if that has not been tried; why it could not be, if so."""
    try:
        extension.load()
    except UserError as error:
        return str(error)
    return None


def choose(op: str, tensor: Tensor, work: int, dtype: torch.dtype | None = None) -> str:
    """The backend that `op` runs on under the current choice.

    tensor: gives the device, and where `dtype` does not, the dtype; work: the op's size, in the unit of its row of the
    table.
    Raises UserError where a backend was asked for that cannot run such tensors.
    While a graph is compiled the answer may be "auto", which its operators resolve whenever they run: the graph then
    depends on no size, and on nothing that is asked of the machine.
    """
    asked = wanted()
    choice = crossover.INSTEAD.get((op, asked), asked)
    if torch.compiler.is_compiling():
        return choice
    device, dtype = tensor.device.type, dtype or tensor.dtype
    if choice != "auto":
        instead = f"{asked} has no such function" if choice != asked else None
        reason = why_not(choice, device, dtype)
        if reason is not None:
            clause = f" ({instead}, so {choice} would run)" if instead else ""
            raise UserError(f"{op}: the backend {asked!r} was asked for and cannot run: {reason}{clause}")
        if instead:
            _say_once(op, device, choice, [instead])
        return choice
    best, obstacles = automatic(op, device, dtype, work)
    _say_once(op, device, best, obstacles)
    return best


def _say_once(op: str, device: str, backend: str, reasons: list[str]) -> None:
    if (op, device, backend) not in _announced:
        _announced.add((op, device, backend))
        _log.info("ops: %s runs on %s%s", op, backend, f" ({'; '.join(reasons)})" if reasons else "")


def autocast(tensor: Tensor) -> Tensor:
    """The tensor as a matrix product under autocast would take it: in autocast's dtype where that is on."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def library(kernel: str, backend: str) -> ModuleType:
    """Where `backend` keeps the functions of a kernel ("token_gather", "lse", ...)."""
    if backend == "chunked":
        return importlib.import_module("..chunked", __name__)
    if backend == "triton":
        return importlib.import_module(f"ssl_ib_kernels.{kernel}")
    return extension.load()


def function(kernel: str, name: str, backend: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Callable:
    """The function `name` of a kernel on `backend` for such tensors (of `dtype`, if given); recorders hear of it.

    Raises UserError where the backend cannot run them. Called, it raises UserError for tensors on several devices, and
    torch's float32 products within it are exact, whatever the user has chosen for products elsewhere (TF32).
    """
    device, dtype = tensor.device.type, dtype or tensor.dtype
    backend = crossover.INSTEAD.get((kernel, backend), backend)
    if backend == "auto":
        backend, _ = automatic(kernel, device, dtype, None)
    reason = why_not(backend, device, dtype)
    if reason is not None:
        raise UserError(f"{kernel}: the backend {backend!r} cannot run: {reason}")
    ran(name, backend)
    return functools.partial(_run, getattr(library(kernel, backend), name))


def _run(raw: Callable, *arguments: Any) -> Any:
    devices = {x.device for x in arguments if isinstance(x, Tensor)}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise UserError(f"{raw.__name__}: expected tensors on one device, got them on {found}")
    on_gpu = any(device.type == "cuda" for device in devices)
    products = torch.backends.cuda.matmul if on_gpu else torch.backends.mkldnn.matmul
    chosen = products.fp32_precision
    if chosen in ("none", "ieee"):
        return raw(*arguments)
    # Until it is what it was, torch refuses to read its older flags (allow_tf32), which nothing in here does.
    products.fp32_precision = "ieee"
    try:
        return raw(*arguments)
    finally:
        products.fp32_precision = chosen


def check_range(op: str, name: str, index: Tensor, low: int, high: int) -> None:
    """Raises UserError unless every number of the integer tensor `index` lies in [low, high).

    Reading the numbers makes a GPU wait, so there it happens only under SSL_IB_OPS_CHECK=1 and for the reference.
    """
    if torch.compiler.is_compiling() or index.numel() == 0:
        return
    if not (index.is_cpu or THOROUGH or wanted() == "reference"):
        return
    smallest, largest = (int(x) for x in index.aminmax())
    if smallest < low or largest >= high:
        raise UserError(f"{op}: expected {name} in [{low}, {high}), got numbers from {smallest} to {largest}")
