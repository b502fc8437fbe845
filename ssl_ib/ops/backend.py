"""Which implementation of an op runs.

An op is a public function that checks its arguments and calls `implementation(its name)`. Implementations announce
themselves with `@implements(op, backend)`. The choice is `use_backend(...)`, or the environment's `SSL_IB_OPS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError, nearest

#: Fastest first: `auto` takes an op's first one.
BACKENDS = ("reference",)

#: Whether the ops look for mistakes that cost time to find: repeated patches, and on a GPU indices out of range.
THOROUGH = os.environ.get("SSL_IB_OPS_CHECK") == "1"

_implementations: dict[str, dict[str, Callable]] = {}


def implements(op: str, backend: str) -> Callable[[Callable], Callable]:
    """Decorator: this function is what `op` runs on `backend`."""

    def decorate(function: Callable) -> Callable:
        _implementations.setdefault(op, {})[backend] = function
        return function

    return decorate


def _checked(name: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise UserError(f"unknown backend of the ops {name!r}{nearest(name, ('auto', *BACKENDS))}")
    return name


#: What `auto` means: the environment's choice, and without one (or with "auto") the fastest.
_preferred = _checked(os.environ.get("SSL_IB_OPS", "auto"))
_current = "auto"


class use_backend:
    """Chooses what the ops run on: "reference", or "auto" for `SSL_IB_OPS` where it is set and else the fastest.

    Called, it holds from then on; as a context manager (`with use_backend("reference"):`) until the block ends.
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


def _choice(op: str) -> str:
    wanted = _preferred if _current == "auto" else _current
    return next(name for name in BACKENDS if wanted in ("auto", name) and name in _implementations[op])


def implementation(op: str) -> Callable:
    """What `op` runs under the current choice."""
    return _implementations[op][_choice(op)]


def chosen() -> dict[str, str]:
    """The backend of every op under the current choice."""
    return {op: _choice(op) for op in _implementations}


def check_range(op: str, name: str, index: Tensor, low: int, high: int) -> None:
    """Raises UserError unless every number of the integer tensor `index` lies in [low, high).

    Reading the numbers makes a GPU wait, so there it happens only under SSL_IB_OPS_CHECK=1.
    """
    if torch.compiler.is_compiling() or index.numel() == 0 or not (index.is_cpu or THOROUGH):
        return
    smallest, largest = (int(x) for x in index.aminmax())
    if smallest < low or largest >= high:
        raise UserError(f"{op}: expected {name} in [{low}, {high}), got numbers from {smallest} to {largest}")
