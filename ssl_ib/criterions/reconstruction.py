"""What the criterions that compare reconstructions with their views share.

Shapes: B images, N masks an image, L patches, P = p*p*C pixels a patch.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from .. import ops
from ..errors import UserError
from ..part import Criterion, RunInfo
from ..types import Batch, Loss, Progress


def check_hidden(name: str, info: RunInfo) -> None:
    """Raises UserError where the run's masker hides no patch, so that there is nothing to reconstruct."""
    for shape in info.view_shapes:
        grid = info.grid(shape)
        if grid is None:
            continue
        masks = info.masks(grid)
        if masks is None or masks[1] == grid[0] * grid[1]:
            what = "masker=none hides nothing" if masks is None else "its mask ratio hides no patch"
            raise UserError(f"{name} scores hidden patches, and {what}: choose a masker and a ratio above 0")


def hidden(batch: Batch) -> list[Tensor]:
    """The hidden patches of each view: bool [B*N, L]."""
    assert all(masks is not None for masks in batch.masks), "no masks"
    return [masks.mask.flatten(0, 1) for masks in batch.masks]


def own_patches(pred: Tensor, view: Tensor) -> Tensor:
    """The view's patches, once for each mask that was reconstructed: as pred [B*N, L, P]."""
    side = math.isqrt(pred.shape[-1] // view.shape[1])
    return ops.patchify(view, side).repeat_interleave(len(pred) // len(view), dim=0)


def unstandardised(pred: Tensor, view: Tensor) -> Tensor:
    """Patches predicted in units of their own mean and deviation, in the view's: pred [B*N, L, P] -> [B*N, L, P]."""
    variance, mean = torch.var_mean(own_patches(pred, view), dim=-1, keepdim=True)
    return pred * (variance + 1e-6).sqrt() + mean


def standardised_note(norm_pix: bool) -> str:
    """What `unstandardised` takes from the image, for `pixels_note`; empty without norm_pix."""
    return " (with the mean and contrast of the image's own patch)" if norm_pix else ""


class HiddenPatches(Criterion):
    """A loss on the hidden patches alone, the mean of its views'. A subclass says how a view's are scored.

    name:     what a message calls it.
    norm_pix: reconstruct pixels standardised within their patch.
    """

    requires = frozenset({"reconstruction"})

    def __init__(self, name: str, info: RunInfo, norm_pix: bool):
        super().__init__()
        check_hidden(f"criterion {name!r}", info)
        self.norm_pix = norm_pix

    @abstractmethod
    def error(self, pred: Tensor, view: Tensor, mask: Tensor) -> Tensor:
        """One view's: pred [B*N, L, P], view [B, C, H, W], mask bool [B*N, L] -> scalar, in float32 at least."""

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        errors = [
            self.error(pred, view, mask)
            for pred, view, mask in zip(outputs["reconstruction"], batch.views, hidden(batch), strict=True)
        ]
        return Loss.weighted(reconstruction=(sum(errors) / len(errors), 1.0))

    def pixels(self, outputs: dict[str, list[Tensor]], batch: Batch) -> list[Tensor] | None:
        """The hidden patches rebuilt (with norm_pix, in the mean and deviation of the view's own), the others given."""
        return [
            torch.where(mask[..., None], unstandardised(pred, view) if self.norm_pix else pred, own_patches(pred, view))
            for pred, view, mask in zip(outputs["reconstruction"], batch.views, hidden(batch), strict=True)
        ]

    @property
    def pixels_note(self) -> str:
        return f"hidden patches are predicted{standardised_note(self.norm_pix)}, visible ones are pasted"
