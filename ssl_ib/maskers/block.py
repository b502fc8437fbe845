"""Blockwise masking: hides rectangles until enough is hidden (Bao et al., "BEiT", 2022, algorithm 1).

BEiT's images may end up with slightly different numbers of hidden patches. A batch here has one number, so the block
that would hide too much loses its rim. The loop runs over blocks, each drawn for the whole batch at once.

Shapes: B images, K kept patches, L = rows x columns patches.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from ..config.hints import Ratio
from ..config.registry import register_masker
from ..random import fold, uniform
from .masker import Masker

#: Blocks an image may have. What they leave undone (only at ratios near 1) is hidden patch by patch, at random.
MAX_BLOCKS = 64


@register_masker("block")
class BlockMasker(Masker):
    """Hides the share `ratio` of the patches in rectangular blocks.

    A block's area is uniform between the smallest block and what is left to hide, its aspect ratio log-uniform in
    [min_aspect, 1/min_aspect], and its place uniform in the grid.

    min_share: the smallest block, as a share of the grid (BEiT: 16 of 14 x 14 patches).
    """

    def __init__(
        self,
        ratio: Ratio = 0.4,
        min_share: Ratio = 0.08,
        min_aspect: Annotated[float, Interval(gt=0, le=1)] = 0.3,
    ):
        super().__init__(ratio)
        self.min_share, self.min_aspect = min_share, min_aspect

    def keep(self, keys: Tensor, grid: tuple[int, int], num_kept: int) -> Tensor:
        (rows, columns), device = grid, keys.device
        num_patches = rows * columns
        num_hidden = num_patches - num_kept
        smallest = max(1, round(self.min_share * num_patches))
        patch = torch.arange(num_patches, device=device)
        y, x = patch // columns, patch % columns

        # The order in which patches get hidden: those of block t lie in [t, t + 1), its centre first; those that no
        # block reaches come last. The first `num_hidden` of it are the mask, whatever later blocks would add.
        order = MAX_BLOCKS + uniform(fold(keys, MAX_BLOCKS), num_patches).double()
        for t in range(MAX_BLOCKS):
            left_to_hide = num_hidden - (order < t).sum(dim=1, keepdim=True)
            if (left_to_hide <= 0).all():
                break
            # float64, so that devices whose exp and sqrt differ in the last bit still round to the same block.
            area, aspect, top, left = uniform(fold(keys, t), 4).double()[..., None].unbind(dim=1)
            area = smallest + area * (left_to_hide - smallest).clamp(min=0)
            aspect = torch.exp((2 * aspect - 1) * math.log(1 / self.min_aspect))
            height = (area * aspect).sqrt().round().clamp(1, rows)
            width = (area / aspect).sqrt().round().clamp(1, columns)
            top, left = (top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()
            inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
            from_centre = torch.maximum(
                ((y + 0.5 - top) / height - 0.5).abs(),
                ((x + 0.5 - left) / width - 0.5).abs(),
            )
            order = torch.where(inside & (order >= MAX_BLOCKS), t + from_centre, order)
        return order.argsort(dim=1, stable=True)[:, num_hidden:].sort(dim=1).values
