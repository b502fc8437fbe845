"""Fixed sine-cosine positions in MAE's layout."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Positions of a grid's patches, row-major: [rows * columns, width] float32 (He et al., CVPR 2022).

    The first half of the dimensions encodes the column and the second the row, each as sines, then cosines, of
    frequencies 10000^(-i / (width/4)). `width` must be divisible by 4.
    """
    rows, columns = grid
    assert width % 4 == 0, f"sine-cosine positions need a width divisible by 4, got {width}"
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def encode(index: Tensor) -> Tensor:
        angle = index.to(torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return torch.cat([encode(column), encode(row)], dim=1).float()
