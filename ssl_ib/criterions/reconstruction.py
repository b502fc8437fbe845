"""What the criterions that compare reconstructions with their views share.

Shapes: B images, N masks an image, L patches, P = p*p*C pixels a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..errors import UserError
from ..part import RunInfo
from ..types import Batch


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


def shown(outputs: dict[str, list[Tensor]], batch: Batch, norm_pix: bool) -> list[Tensor]:
    """For figures, of losses on hidden patches alone: these as they are rebuilt, and the visible ones as they are."""
    found = []
    for pred, view, mask in zip(outputs["reconstruction"], batch.views, hidden(batch), strict=True):
        side = math.isqrt(pred.shape[-1] // view.shape[1])
        patches = ops.patchify(view, side).repeat_interleave(len(pred) // len(view), dim=0)
        found.append(torch.where(mask[..., None], unstandardised(pred, view) if norm_pix else pred, patches))
    return found


def unstandardised(pred: Tensor, view: Tensor) -> Tensor:
    """Patches predicted in units of their own mean and deviation, in the view's: pred [B*N, L, P] -> [B*N, L, P]."""
    side = math.isqrt(pred.shape[-1] // view.shape[1])
    target = ops.patchify(view, side).repeat_interleave(len(pred) // len(view), dim=0)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return pred * (variance + 1e-6).sqrt() + mean
