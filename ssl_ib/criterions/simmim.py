"""SimMIM's loss: the absolute error of the hidden pixels (Xie et al., "SimMIM", CVPR 2022).

Shapes: B images, N masks an image, L patches (SimMIM's mask units), P = p*p*C pixels a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..part import Criterion, RunInfo
from ..registry import register_criterion
from ..types import Batch, Loss, Progress
from .reconstruction import check_hidden, hidden, shown


@register_criterion("simmim")
class SimMIM(Criterion):
    """Absolute error, mean over the hidden pixels and their channels, of all masks and views (its equation 1).

    Reads `reconstruction` [B*N, L, P]. Every mask hides as many patches, so this is also the mean of N SimMIM losses.

    norm_pix: reconstruct pixels standardised within their patch, as MAE does.
    """

    requires = frozenset({"reconstruction"})

    def __init__(self, info: RunInfo, norm_pix: bool = False):
        super().__init__()
        check_hidden("criterion 'simmim'", info)
        self.norm_pix = norm_pix

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        errors = [
            self._error(pred, view, mask)
            for pred, view, mask in zip(outputs["reconstruction"], batch.views, hidden(batch), strict=True)
        ]
        return Loss.weighted(reconstruction=(sum(errors) / len(errors), 1.0))

    def _error(self, pred: Tensor, view: Tensor, mask: Tensor) -> Tensor:
        """One view's: pred [B*N, L, P], view [B, C, H, W], mask bool [B*N, L] -> scalar, in float32 at least."""
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
        target = ops.patchify(view.to(pred.dtype), math.isqrt(pred.shape[-1] // view.shape[1]))
        if self.norm_pix:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        # One target an image, broadcast over its masks, never repeated.
        error = (pred.unflatten(0, (len(view), -1)) - target[:, None]).abs().mean(dim=-1).flatten(0, 1)
        return (error * mask).sum() / mask.sum()

    def pixels(self, outputs: dict[str, list[Tensor]], batch: Batch) -> list[Tensor] | None:
        """The hidden patches rebuilt (with norm_pix, in the mean and deviation of the view's own), the others given."""
        return shown(outputs, batch, self.norm_pix)
