"""How the softmax kernels are cut up: block sizes for a device, and the split of the walk over y for few rows.

Shapes: X rows that programs own, Y rows that each walks over, D width of both, S parts that the walk is split into.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton

from .variant import capability_of

#: The partial outputs of a forward may take this many bytes, those of a gradient half of it: a kept mean of 32 MiB may
#: lie beside them, and all of it shall be 64 MB at most.
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


#: (block_x, block_y, num_warps, num_stages) by kernel, for widths up to 256 in one piece: what fits into the registers
#: and the shared memory of an H100, H200 or B200 ("large"), or of any other GPU ("small": 99 KiB).
WIDE = {
    "large": {
        "logsumexp": (128, 128, 8, 2),
        "softmax_forward": (128, 64, 8, 3),
        "lse_gradient": (128, 64, 8, 3),
        "marginal": (128, 128, 8, 2),
        "row_gradient": (128, 32, 8, 2),
        "prototype_gradient": (128, 32, 8, 3),
    },
    "small": {
        "logsumexp": (64, 64, 8, 2),
        "softmax_forward": (64, 64, 8, 2),
        "lse_gradient": (64, 64, 8, 2),
        "marginal": (64, 64, 8, 2),
        "row_gradient": (64, 32, 8, 2),
    },
}

#: The same for widths up to 128, and for wider rows in pieces of 128.
NARROW = {"large": (128, 64, 8, 3), "small": (128, 32, 8, 2)}
PIECES = {"large": (128, 32, 8, 3), "small": (64, 32, 8, 2)}


#: Triton 3.6 finds no registers for 64 rows of y in `lse_gradient` on Hopper and would spill; 3.9 does.
OLDER_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def tiles(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Tiles:
    """The sizes for operands of `dtype` and `width`; kernel: "logsumexp" is `softmax_forward` without a mean."""
    size = "large" if capability_of(device) in (90, 100, 103) else "small"
    narrow = min(128, max(16, 2 ** math.ceil(math.log2(width))))
    if dtype == torch.float32:
        # Three products of tf32 make one of float32, whose operands take registers: the logits are summed in steps.
        crowded = kernel in ("row_gradient", "prototype_gradient")
        return Tiles(64, 16 if crowded else 32, narrow, min(narrow, 32), 8, 2)
    if kernel in ("positives", "gradient_from_mean"):
        # They read little but labels, and the more rows a program owns the more tiles hold a positive.
        return Tiles(64, 32, narrow, min(narrow, 64), 8, 2)
    if width <= 128:
        block_x, block_y, *launch = NARROW[size]
        return Tiles(block_x, block_y, narrow, narrow, *launch)
    if width > 256 or kernel not in WIDE[size]:
        block_x, block_y, *launch = PIECES[size]
        return Tiles(block_x, block_y, 128, 64, *launch)
    crowded = kernel in ("logsumexp", "softmax_forward") or (kernel == "lse_gradient" and dtype == torch.float16)
    if size == "large" and capability_of(device) != 90 and crowded:
        # On a B200 their larger tiles would spill.
        size = "small"
    block_x, block_y, *launch = WIDE[size][kernel]
    if dtype == torch.float16 and kernel in ("lse_gradient", "row_gradient", "prototype_gradient"):
        # The units of `add_product` take registers.
        block_y = max(16, block_y // 2)
    if kernel == "lse_gradient" and OLDER_TRITON:
        block_y = min(block_y, 32)
    return Tiles(block_x, block_y, 256, 256, *launch)


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


def grid(num_x: int, num_y: int, width: int, sizes: Tiles, device: torch.device, workspace: int = WORKSPACE) -> Grid:
    """The programs for x [num_x, ...] and y [num_y, ...]; width: that of the output, 0 for one number a row.

    workspace: bytes that the parts may take together.
    """
    blocks, steps = math.ceil(num_x / sizes.block_x), math.ceil(num_y / sizes.block_y)
    pieces = max(1, math.ceil(width / sizes.block_d))
    most = min(steps, MOST_PARTS, max(1, workspace // (4 * num_x * max(width, 1))))
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
