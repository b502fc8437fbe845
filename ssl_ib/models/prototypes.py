"""Unit vectors that features are compared with: DINO's last layer, SwAV's and SVIB's prototypes.

Shapes: N rows, K prototypes, d embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..part import Context, Part

#: Numbers in a temporary tensor.
PIECE = 1 << 20


class Prototypes(Part):
    """K vectors that are learned and used at length 1 (weight normalisation with a fixed gain of 1): weight [K, d].

    With 65,536 of them, normalising in the forward would copy the largest tensor of the loss, and again for its
    gradient. So the weights themselves are of length 1: the gradient loses what points along a vector before the step,
    and the vectors are scaled back after it, both in place. Whoever else changes the weights calls `rescale`; loaded
    ones are scaled if they have another length.

    tangent: whether the gradient loses what points along a vector, as it does where the forward normalises (DINO,
    SVIB). SwAV's code normalises the vectors outside the graph before each step, so their gradient keeps that part: it
    shortens no vector, but it enters the norms and moments of the optimiser.
    """

    def __init__(self, num: int, width: int, tangent: bool = True):
        super().__init__()
        self.tangent = tangent
        self.weight = nn.Parameter(torch.empty(num, width))
        nn.init.normal_(self.weight)
        self.rescale()
        self.register_load_state_dict_post_hook(lambda module, keys: module._loaded())

    def _apply(self, *given, **more) -> Prototypes:
        dtype = self.weight.dtype
        super()._apply(*given, **more)
        if self.weight.dtype != dtype:  # Of length 1 as far as the former type was exact.
            self.rescale()
        return self

    @torch.no_grad()
    def _loaded(self) -> None:
        rows = distributed.local(self.weight)
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        # What a run saved has been scaled: scaling it again would change last bits.
        rows.div_(torch.where((lengths - 1).abs() < 1e-5, 1.0, lengths.clamp_(min=1e-12)).to(rows.dtype))

    @torch.no_grad()
    def rescale(self) -> None:
        """Scales the vectors to length 1, in place."""
        rows = distributed.local(self.weight)
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12))

    def unit(self) -> Tensor:
        """The vectors, of length 1, in float32 at least: [K, d]."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Cosines of unit rows with every prototype, in float32 at least: [N, d] -> [N, K]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Autocast would round them to bfloat16, and a temperature of 0.04 makes errors of some hundredths of that.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.unit().to(dtype))

    @torch.no_grad()
    def before_step(self, ctx: Context) -> None:
        if self.weight.grad is None or not self.tangent:
            return
        # Some at a time, because the product of all with all gradients is the largest tensor once more.
        rows = max(PIECE // self.weight.shape[1], 1)
        weights, gradients = distributed.local(self.weight).split(rows), distributed.local(self.weight.grad).split(rows)
        for weight, gradient in zip(weights, gradients, strict=True):
            gradient.addcmul_(weight, torch.linalg.vecdot(weight, gradient)[:, None], value=-1)

    def after_step(self, ctx: Context) -> None:
        self.rescale()
