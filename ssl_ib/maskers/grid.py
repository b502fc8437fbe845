"""Grid masking: the visible patches form a regular pattern (He et al., "Masked Autoencoders", 2022, figure 6).

MAE keeps one patch of every 2 x 2. Other ratios keep the K lowest cells of Bayer's ordered-dither matrix (Bayer, "An
optimum method for two-level rendition of continuous-tone pictures", 1973), which spreads any number of points evenly:
a checkerboard at 1/2, MAE's grid at 3/4, one patch of every 4 x 4 at 15/16.

Shapes: B images, K kept patches, L = rows x columns patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.hints import Ratio
from ..config.registry import register_masker
from ..random import randint
from .masker import Masker


def bayer(side: int, device: torch.device) -> Tensor:
    """Bayer's matrix: int64 [s, s] with s the power of two from `side` up; each of 0..s*s-1 occurs once."""
    matrix = torch.zeros(1, 1, dtype=torch.int64, device=device)
    while len(matrix) < side:
        matrix = 4 * matrix
        matrix = torch.cat([torch.cat([matrix, matrix + 2], 1), torch.cat([matrix + 3, matrix + 1], 1)])
    return matrix


@register_masker("grid")
class GridMasker(Masker):
    """Keeps a regular pattern of patches, shifted by a random offset an image (it wraps around), and hides the rest."""

    def __init__(self, ratio: Ratio = 0.75):
        super().__init__(ratio)

    def keep(self, keys: Tensor, grid: tuple[int, int], num_kept: int) -> Tensor:
        rows, columns = grid
        matrix = bayer(max(grid), keys.device)
        offset = randint(keys, 2, len(matrix))
        y = (offset[:, :1] + torch.arange(rows, device=keys.device)) % len(matrix)
        x = (offset[:, 1:] + torch.arange(columns, device=keys.device)) % len(matrix)
        height = matrix[y[:, :, None], x[:, None, :]].flatten(1)
        return height.argsort(dim=1)[:, :num_kept].sort(dim=1).values
