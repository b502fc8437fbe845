"""What the maskers share: a ratio, the number of patches it keeps, and the way from kept patches to `Masks`.

A masker is called as `masker(keys, grid)` and draws from `ssl_ib.random` alone, so the mask of an image depends on its
key and not on the batch around it.

Shapes: B images, K kept patches an image, L = rows x columns patches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from ..config.hints import Ratio
from ..errors import UserError
from ..types import Masks


class Masker(ABC):
    """A masker that hides the share `ratio` of the patches of every image: one mask an image, one K a batch."""

    def __init__(self, ratio: Ratio):
        self.ratio = ratio

    def num_kept(self, grid: tuple[int, int]) -> int:
        """K = floor(L (1 - ratio)), as in MAE. Raises UserError where the ratio leaves no patch visible."""
        rows, columns = grid
        # 100 x (1 - 0.9) is 9.999999999999998 in floating point, and means 10.
        kept = math.floor(rows * columns * (1 - self.ratio) + 1e-6)
        if kept < 1:
            raise UserError(
                f"mask ratio {self.ratio} on a grid of {rows} x {columns} patches keeps {kept} of them: "
                f"expected at least 1 (a ratio of at most {1 - 1 / (rows * columns):.4g}), "
                "or smaller patches (backbone_args.patch_size of the model)"
            )
        return kept

    def check(self, grid: tuple[int, int]) -> None:
        """Raises UserError where the masker cannot serve this grid; costs nothing, so call it before training."""
        self.num_kept(grid)

    @abstractmethod
    def keep(self, keys: Tensor, grid: tuple[int, int], num_kept: int) -> Tensor:
        """The visible patches: keys int64 [B] -> int64 [B, K], row-major numbers without repeats, ascending.

        Ascending, because an encoder that knows positions does not care, a gather reads memory in order, and a ratio
        of 0 then gives the unmasked sequence itself: the plain method, bit for bit.
        """

    def __call__(self, keys: Tensor, grid: tuple[int, int]) -> Masks:
        """One mask an image: keys int64 [B], grid (rows, columns) -> keep [B, 1, K], mask [B, 1, L]."""
        return Masks.from_keep(self.keep(keys, grid, self.num_kept(grid)), grid[0] * grid[1])
