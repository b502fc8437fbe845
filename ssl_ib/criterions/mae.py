"""MAE's loss: the squared error of the hidden patches (He et al., "Masked Autoencoders", CVPR 2022).

Shapes: B images, N masks an image, L patches, P = p*p*C pixels a patch.
"""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..config.registry import register_criterion
from ..part import RunInfo
from .reconstruction import HiddenPatches


@register_criterion("mae")
class MAE(HiddenPatches):
    """Squared error, mean over a patch's pixels, then over the hidden patches of all masks and views.

    Reads `reconstruction` [B*N, L, P]. Every mask hides as many patches, so this is also the mean of N MAE losses.

    norm_pix: reconstruct pixels standardised within their patch, MAE's better setting (its table 1d).
    """

    def __init__(self, info: RunInfo, norm_pix: bool = True):
        super().__init__("mae", info, norm_pix)

    def error(self, pred: Tensor, view: Tensor, mask: Tensor) -> Tensor:
        return ops.masked_patch_mse(pred, view, mask, self.norm_pix)[0]
