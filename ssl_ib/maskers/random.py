"""Random masking: every set of K patches is equally likely (He et al., "Masked Autoencoders", 2022, section 3).

Shapes: B images, K kept patches, L patches.
"""

from __future__ import annotations

from torch import Tensor

from ..config.hints import Ratio
from ..config.registry import register_masker
from ..random import permutation
from .masker import Masker


@register_masker("random")
class RandomMasker(Masker):
    """Hides the share `ratio` of the patches, uniformly at random.

    The kept patches are the first K of a random permutation, as in MAE, but sorted (see `Masker.keep`).
    """

    def __init__(self, ratio: Ratio = 0.75):
        super().__init__(ratio)

    def keep(self, keys: Tensor, grid: tuple[int, int], num_kept: int) -> Tensor:
        return permutation(keys, grid[0] * grid[1])[:, :num_kept].sort(dim=1).values
