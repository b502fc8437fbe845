"""MAE's loss: the squared error of the hidden patches (He et al., "Masked Autoencoders", CVPR 2022).

Shapes: B images, N masks an image, L patches, P = p*p*C pixels a patch.
"""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..part import Criterion, RunInfo
from ..registry import register_criterion
from ..types import Batch, Loss, Progress
from .reconstruction import check_hidden, hidden, shown


@register_criterion("mae")
class MAE(Criterion):
    """Squared error, mean over a patch's pixels, then over the hidden patches of all masks and views.

    Reads `reconstruction` [B*N, L, P]. Every mask hides as many patches, so this is also the mean of N MAE losses.

    norm_pix: reconstruct pixels standardised within their patch, MAE's better setting (its table 1d).
    """

    requires = frozenset({"reconstruction"})

    def __init__(self, info: RunInfo, norm_pix: bool = True):
        super().__init__()
        check_hidden("criterion 'mae'", info)
        self.norm_pix = norm_pix

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        errors = [
            ops.masked_patch_mse(pred, view, mask, self.norm_pix)[0]
            for pred, view, mask in zip(outputs["reconstruction"], batch.views, hidden(batch), strict=True)
        ]
        return Loss.weighted(reconstruction=(sum(errors) / len(errors), 1.0))

    def pixels(self, outputs: dict[str, list[Tensor]], batch: Batch) -> list[Tensor] | None:
        """The hidden patches rebuilt (with norm_pix, in the mean and deviation of the view's own), the others given."""
        return shown(outputs, batch, self.norm_pix)
