"""Several random masks an image, drawn without regard to each other: what orthogonal masks are compared with.

Shapes: B images, N masks an image, K kept patches a mask, L patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.registry import register_masker
from ..random import fold, permutation
from .several import InnerRatio, NumMasks, SeveralMasker


@register_masker("independent")
class IndependentMasker(SeveralMasker):
    """N random masks an image, each hiding the share `ratio`; their visible patches may overlap.

    n_masks: a number, or "complete": max(floor(1 / (1 - ratio)), 2), as many as orthogonal masks would be.
    """

    def __init__(self, ratio: InnerRatio = 0.75, n_masks: NumMasks = "complete"):
        super().__init__(ratio, n_masks)

    def keep(self, keys: Tensor, grid: tuple[int, int], num_kept: int) -> Tensor:
        mask = torch.arange(self.num_masks, device=keys.device)
        order = permutation(fold(keys[:, None], mask).flatten(), grid[0] * grid[1])
        return order[:, :num_kept].sort(dim=1).values.unflatten(0, (len(keys), -1))
