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
    gradient. So a run keeps them at length 1: the gradient loses what points along a vector before the step, and the
    vectors are scaled back after it, both in place. Weights that anything else has set are normalised when used, and
    in a compiled graph, which could not ask. Sharded weights have no record of changes: they count as scaled from
    `rescale` to the next step of the optimiser.

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

    def _trust(self) -> None:
        """Takes note that the weights are of length 1."""
        self._shards_scaled = distributed.is_sharded(self.weight)
        self._trusted = None if self._shards_scaled else self._state()

    def _state(self) -> tuple[int, int]:
        """What changes with the weights: a copy of them lives elsewhere."""
        return self.weight.data_ptr(), self.weight._version

    @torch.no_grad()
    def _loaded(self) -> None:
        # What a run saved has been scaled: scaling it again would change last bits.
        lengths = torch.linalg.vector_norm(distributed.local(self.weight).double(), dim=1)
        self._trusted, self._shards_scaled = None, False
        if bool(((lengths - 1).abs() < 1e-5).all()):
            self._trust()

    @torch.no_grad()
    def rescale(self) -> None:
        """Scales the vectors to length 1, in place."""
        rows = distributed.local(self.weight)
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12))
        self._trust()

    def unit(self) -> Tensor:
        """The vectors at length 1, in float32 at least: [K, d]."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        trusted = not torch.compiler.is_compiling() and (self._shards_scaled or self._trusted == self._state())
        return weight if trusted else F.normalize(weight, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Cosines of unit rows with every prototype, in float32 at least: [N, d] -> [N, K]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Autocast would round them to bfloat16, and a temperature of 0.04 makes errors of some hundredths of that.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.unit().to(dtype))

    @torch.no_grad()
    def before_step(self, ctx: Context) -> None:
        self._shards_scaled = False  # The step that comes changes them.
        if self.weight.grad is None or not self.tangent:
            return
        # Some at a time, because the product of all with all gradients is the largest tensor once more.
        rows = max(PIECE // self.weight.shape[1], 1)
        weights, gradients = distributed.local(self.weight).split(rows), distributed.local(self.weight.grad).split(rows)
        for weight, gradient in zip(weights, gradients, strict=True):
            gradient.addcmul_(weight, torch.linalg.vecdot(weight, gradient)[:, None], value=-1)

    def after_step(self, ctx: Context) -> None:
        self.rescale()
