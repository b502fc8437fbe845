"""How the softmax kernels are cut up: block sizes for a device, and the split of the walk over y for few rows.

Shapes: X rows that programs own, Y rows that each walks over, D width of both, S parts that the walk is split into.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from .variant import capability_of

#: Widest piece of an output that a program accumulates: 64 to 128 registers a thread.
WIDEST = 256

#: The partial outputs of a split may take this many bytes.
WORKSPACE = 32 * 2**20

MOST_PARTS = 128


@dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel's launch.

    block_x, block_y: rows of x that a program owns, and rows of y that it meets in a step; block_d: width of the piece
    of an output that it owns; step: width in which logits are summed, block_d where the tiles hold whole rows.
    """

    block_x: int
    block_y: int
    block_d: int
    step: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"BLOCK_X": self.block_x, "BLOCK_Y": self.block_y, "BLOCK_D": self.block_d, "STEP": self.step}


#: (block_x, block_y, num_warps, num_stages) of a kernel, by what its device and operands are.
TABLE: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "softmax_forward": {"hopper": (128, 64, 8, 3), "ampere": (64, 64, 4, 2), "float32": (64, 32, 8, 2)},
    "logsumexp": {"hopper": (128, 128, 8, 2), "ampere": (64, 64, 4, 2), "float32": (64, 32, 8, 2)},
    "marginal": {"hopper": (128, 128, 8, 2), "ampere": (64, 64, 4, 2), "float32": (64, 32, 8, 2)},
    "lse_gradient": {"hopper": (128, 64, 8, 3), "ampere": (64, 64, 4, 2), "float32": (64, 32, 8, 2)},
    "row_gradient": {"hopper": (128, 32, 8, 3), "ampere": (64, 32, 4, 2), "float32": (64, 32, 8, 2)},
    "prototype_gradient": {"hopper": (128, 32, 8, 3), "ampere": (64, 32, 4, 2), "float32": (64, 32, 8, 2)},
}


def tiles(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Tiles:
    """The sizes for operands of `dtype` and `width`; kernel: a name of the table."""
    big = capability_of(device) in (90, 100, 103)
    kind = "float32" if dtype == torch.float32 else "hopper" if big else "ampere"
    block_d = min(WIDEST, max(16, 2 ** math.ceil(math.log2(width))))
    whole = width <= block_d and kind != "float32"
    step = block_d if whole else min(block_d, 32 if kind == "float32" else 64)
    block_x, block_y, num_warps, num_stages = TABLE[kernel][kind]
    return Tiles(block_x, block_y, block_d, step, num_warps, num_stages)


@dataclass(frozen=True)
class Grid:
    """A launch's programs: (blocks of x, pieces of the output, parts), each walking over `steps` blocks of y."""

    blocks: int
    pieces: int
    parts: int
    steps: int

    @property
    def programs(self) -> tuple[int, int, int]:
        return self.blocks, self.pieces, self.parts


def grid(num_x: int, num_y: int, width: int, sizes: Tiles, device: torch.device) -> Grid:
    """The programs for x [num_x, ...] and y [num_y, ...]; width: that of the output, 0 for one number a row."""
    blocks, steps = math.ceil(num_x / sizes.block_x), math.ceil(num_y / sizes.block_y)
    pieces = max(1, math.ceil(width / sizes.block_d))
    most = min(steps, MOST_PARTS, max(1, WORKSPACE // (4 * num_x * max(width, 1))))
    parts = split(blocks * pieces, steps, most, _multiprocessors(device))
    # Parts of equal length may be fewer than asked for: the last would have nothing to do.
    steps = math.ceil(steps / parts)
    return Grid(blocks, pieces, math.ceil(num_y / (steps * sizes.block_y)), steps)


@cache
def split(programs: int, steps: int, most: int, multiprocessors: int) -> int:
    """The fewest parts, up to `most`, whose time is within a tenth of the best.

    Time is counted in steps, one program at a time on a multiprocessor: waves of programs times the steps of each, and
    two more for a program's beginning and end.
    """
    times = [
        math.ceil(programs * parts / multiprocessors) * (math.ceil(steps / parts) + 2) for parts in range(1, most + 1)
    ]
    return next(parts for parts, time in enumerate(times, start=1) if time <= 1.1 * min(times))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
