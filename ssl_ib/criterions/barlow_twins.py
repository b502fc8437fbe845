"""Barlow Twins: the cross-correlation of two views' projections becomes the identity.

Shapes: b images of this process, d embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import distributed
from ..config.hints import NonNegative, Positive
from ..config.registry import register_criterion
from ..part import Criterion
from ..types import Batch, Loss, Progress
from .pair import two_views

#: Added to a column's variance, as batch normalisation does.
EPSILON = 1e-5


def standardise(x: Tensor) -> Tensor:
    """Columns with mean 0 and (biased) variance 1 over the images of all processes, as batch norm: x [..., b, d]."""
    x = x - distributed.all_reduce_mean(x.mean(dim=-2, keepdim=True))
    variance = distributed.all_reduce_mean(x.square().mean(dim=-2, keepdim=True))
    return x * (variance + EPSILON).rsqrt()


@register_criterion("barlow_twins")
class BarlowTwins(Criterion):
    """scale * (sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2), with C [d, d] the views' cross-correlation.

    Reads `projection` [b, d] of two views. Source: Zbontar et al., "Barlow Twins", 2021, equation 1.

    lambd: weight of the redundancy (off-diagonal) term.
    scale: of the whole loss; CIFAR recipes use 0.1.
    """

    requires = frozenset({"projection"})
    num_views = 2

    def __init__(self, lambd: NonNegative = 0.0051, scale: Positive = 1.0):
        super().__init__()
        self.lambd, self.scale = lambd, scale

    def forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch | None = None, progress: Progress | None = None
    ) -> Loss:
        views = torch.stack(two_views(outputs, "projection"))
        views = views.to(torch.promote_types(views.dtype, torch.float32))
        with torch.autocast(views.device.type, enabled=False):
            first, second = standardise(views)
            correlation = distributed.all_reduce_mean(first.T @ second / len(first))
        diagonal = correlation.diagonal()
        invariance = (1 - diagonal).square().sum()
        redundancy = correlation.square().sum() - diagonal.square().sum()
        return Loss.weighted(invariance=(invariance, self.scale), redundancy=(redundancy, self.scale * self.lambd))
