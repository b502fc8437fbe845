"""SimMIM's loss: the absolute error of the hidden pixels (Xie et al., "SimMIM", CVPR 2022).

Shapes: B images, N masks an image, L patches (SimMIM's mask units), P = p*p*C pixels a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..config.registry import register_criterion
from ..part import RunInfo
from .reconstruction import HiddenPatches


@register_criterion("simmim")
class SimMIM(HiddenPatches):
    """Absolute error, mean over the hidden pixels and their channels, of all masks and views (its equation 1).

    Reads `reconstruction` [B*N, L, P]. Every mask hides as many patches, so this is also the mean of N SimMIM losses.

    norm_pix: reconstruct pixels standardised within their patch, as MAE does.
    """

    def __init__(self, info: RunInfo, norm_pix: bool = False):
        super().__init__("simmim", info, norm_pix)

    def error(self, pred: Tensor, view: Tensor, mask: Tensor) -> Tensor:
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
        target = ops.patchify(view.to(pred.dtype), math.isqrt(pred.shape[-1] // view.shape[1]))
        if self.norm_pix:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        # One target an image, broadcast over its masks, never repeated.
        error = (pred.unflatten(0, (len(view), -1)) - target[:, None]).abs().mean(dim=-1).flatten(0, 1)
        return (error * mask).sum() / mask.sum()
