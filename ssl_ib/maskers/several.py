"""What the maskers of several masks an image share: how many masks there are, and what they leave out.

Shapes: B images, N masks an image, K kept patches a mask, L patches.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from typing import Annotated, Literal

from annotated_types import Ge, Interval
from torch import Tensor

from .masker import Masker

_logger = logging.getLogger(__name__)

#: A ratio that hides something and keeps something, a precondition of masks that differ.
InnerRatio = Annotated[float, Interval(gt=0, lt=1)]
#: At least two masks, or as many as the ratio has room for.
NumMasks = Annotated[int, Ge(2)] | Literal["complete"]


class SeveralMasker(Masker):
    """N masks an image, each of which hides the share `ratio` of the patches.

    n_masks: "complete" for as many as disjoint visible sets have room, max(floor(1 / (1 - ratio)), 2), or a number
        (Huang et al., "Learning Mask Invariant Mutual Information for Masked Image Modeling", 2025, figure 2, whose
        fixed number is 4).
    """

    def __init__(self, ratio: InnerRatio, n_masks: NumMasks):
        super().__init__(ratio)
        self.n_masks = n_masks

    @property
    def num_masks(self) -> int:
        """N."""
        return max(math.floor(1 / (1 - self.ratio) + 1e-6), 2) if self.n_masks == "complete" else self.n_masks

    @abstractmethod
    def keep(self, keys: Tensor, grid: tuple[int, int], num_kept: int) -> Tensor:
        """The visible patches of every mask: keys int64 [B] -> int64 [B, N, K], each row ascending, no repeats."""

    def check(self, grid: tuple[int, int]) -> None:
        super().check(grid)
        shortfall = self.shortfall(grid)
        if shortfall:
            _logger.warning("masker: %s", shortfall)

    def shortfall(self, grid: tuple[int, int]) -> str | None:
        """In what the visible sets cannot be disjoint, or together not all of the image; None where they are both."""
        return None
