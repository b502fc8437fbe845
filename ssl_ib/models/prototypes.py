"""Unit vectors that features are compared with: DINO's last layer, SwAV's and SVIB's prototypes.

Shapes: N rows, K prototypes, d embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """K vectors that are learned and used at length 1 (weight normalisation with a fixed gain of 1): weight [K, d]."""

    def __init__(self, num: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num, width))
        nn.init.normal_(self.weight)
        with torch.no_grad():
            self.weight.copy_(self.unit())

    def unit(self) -> Tensor:
        """The vectors at length 1, in float32 at least: [K, d]."""
        return F.normalize(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Cosines of unit rows with every prototype, in float32 at least: [N, d] -> [N, K]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Autocast would round them to bfloat16, and a temperature of 0.04 makes errors of some hundredths of that.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.unit().to(dtype))
