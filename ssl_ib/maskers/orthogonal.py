"""Disjoint masks: every image is seen in N parts that share no patch (MI-MAE, section 4.2).

Shapes: B images, N masks an image, K kept patches a mask, L patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.registry import register_masker
from ..random import fold, permutation
from .several import InnerRatio, NumMasks, SeveralMasker


@register_masker("orthogonal")
class OrthogonalMasker(SeveralMasker):
    """N masks an image whose visible patches are disjoint, each hiding the share `ratio`.

    One random permutation of the patches is dealt out, K to a mask. Where it runs out before the masks do (N K > L),
    the mask is topped up from a fresh permutation, without repeating a patch within a mask; where it is not used up
    (N K < L), some patches are seen in no mask. Either is said when the run is built.

    n_masks: a number, or "complete": max(floor(1 / (1 - ratio)), 2).
    Source: Huang et al., "Learning Mask Invariant Mutual Information for Masked Image Modeling", 2025, section 4.2.
    """

    def __init__(self, ratio: InnerRatio = 0.75, n_masks: NumMasks = "complete"):
        super().__init__(ratio, n_masks)

    def keep(self, keys: Tensor, grid: tuple[int, int], num_kept: int) -> Tensor:
        num_patches, needed = grid[0] * grid[1], self.num_masks * num_kept
        dealt = permutation(keys, num_patches)
        while dealt.shape[1] < needed:
            fresh = permutation(fold(keys, dealt.shape[1]), num_patches)
            # The last mask so far holds these already: they go to the end of the fresh permutation, past its rest.
            held = dealt[:, dealt.shape[1] - dealt.shape[1] % num_kept :]
            taken = torch.zeros_like(fresh).scatter_(1, held, 1).gather(1, fresh)
            dealt = torch.cat([dealt, fresh.gather(1, taken.argsort(dim=1, stable=True))], dim=1)
        return dealt[:, :needed].unflatten(1, (self.num_masks, num_kept)).sort(dim=2).values

    def shortfall(self, grid: tuple[int, int]) -> str | None:
        num_patches, num_kept = grid[0] * grid[1], self.num_kept(grid)
        seen = f"{self.num_masks} masks that keep {num_kept} of {num_patches} patches each"
        if self.num_masks * num_kept > num_patches:
            whole = num_patches // num_kept
            return f"{seen} cannot be disjoint: the first {whole} are, and the others are topped up from a new draw"
        if self.num_masks * num_kept < num_patches:
            return f"{seen} are disjoint and together see {self.num_masks * num_kept} of the patches"
        return None
