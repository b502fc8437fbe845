"""Where a run's tensors live, and whether there is room for them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import UserError


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that torch does not have."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise UserError(f"device: {name!r} was asked for, but torch sees {there or 'no'} CUDA devices")
    return device


#: Tensors that a run may make while it is built: a ViT-H/14 with its teacher has some thousands.
MOST_TENSORS = 20_000
#: The memory is looked at once for so many bytes that are asked for.
_LOOK = 1 << 26
#: The functions that make a tensor of a size, which is their first argument.
_MAKERS = frozenset("empty zeros ones full rand randn empty_strided".split())


def free_memory(device: torch.device | None = None) -> float:
    """Bytes that this process can still take (default: of the machine's memory, within its limits); inf if unknown."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        with suppress(OSError, ValueError):
            # A container's own limit; "max", which is no number, is none.
            most, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
            free = min(free, max(most - used, 0))
        return free
    return math.inf


def require_memory(size: float, what: str, device: torch.device | None = None) -> None:
    """Raises UserError where `size` bytes are more than is free; what: what takes them, for the message."""
    free = free_memory(device)
    if size > free:
        where = "of memory" if device is None or device.type == "cpu" else f"on {device}"
        raise UserError(f"{what} would take {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB {where} are free")


class Bounded(TorchDispatchMode):
    """While parts are built: tensors that would not fit into memory, or are too many, are refused before they are made.

    Raises UserError in the place that asks for one too many.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count = 0
        self._asked = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _MAKERS and args:
            self._check(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        return func(*args, **kwargs)

    def _check(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._count += 1
        self._asked += math.prod(shape) * dtype.itemsize
        if self._count > MOST_TENSORS:
            raise UserError(
                f"more than {MOST_TENSORS:,} tensors, and it is not built yet: a number of layers, blocks or heads is "
                "far too large"
            )
        if self._asked > _LOOK:
            require_memory(self._asked, f"its weights or buffers (the next of shape {list(shape)})")
            self._asked = 0.0
