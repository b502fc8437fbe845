"""Images cut into patches: embedding only the visible ones, and scoring a reconstruction.

Patches are numbered row by row over the image's grid.

Shapes: B images, C channels, H x W pixels, p patch side, L = (H/p)(W/p) patches, K kept, D width, P prefix tokens,
G reconstructions (several an image, if G > B).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import gather_operators as operators
from .backend import autocast, choose, ran
from .tokens import batch_rows, check_keep


def _grid(op: str, images: Tensor, side: int) -> tuple[int, int]:
    """Patches (rows, columns) of side `side` in images [B, C, H, W]; raises UserError where they do not fit."""
    if images.ndim != 4 or images.shape[2] % side or images.shape[3] % side:
        raise UserError(
            f"{op}: expected images [B, C, H, W] with H and W multiples of the patch side {side}, "
            f"got {list(images.shape)}"
        )
    return images.shape[2] // side, images.shape[3] // side


def _tiles(images: Tensor, side: int) -> Tensor:
    """images [B, C, H, W] seen as [B, H/p, W/p, C, p, p], without a copy."""
    return images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)


def patchify(images: Tensor, side: int) -> Tensor:
    """Pixels of every patch: images [B, C, H, W] -> [B, L, p*p*C], ordered (row, column, channel) as in MAE.

    Raises UserError where H or W is not a multiple of the patch side p.
    """
    _grid("patchify", images, side)
    return _tiles(images, side).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def patch_embed_gather(
    images: Tensor,
    keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    prefix: Tensor | None = None,
) -> Tensor:
    """Embeds the kept patches only: what a strided convolution, positions and a gather would give.

    images [B, C, H, W], keep int [B, K] with values in [0, L), weight [D, C, p, p] and bias [D] or None of the
    convolution, pos [L, D] (without the prefix's), prefix [P, D] or None: tokens to put in front, their positions
    included. Returns [B, P+K, D] in the weight's dtype, or in autocast's where it is on.
    Raises UserError for shapes that do not fit and, on the CPU, for numbers out of range.
    """
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or weight.shape[1] != images.shape[1]:
        raise UserError(
            f"patch_embed_gather: expected weight [D, {images.shape[1]}, p, p] for images {list(images.shape)}, "
            f"got {list(weight.shape)}"
        )
    rows, columns = _grid("patch_embed_gather", images, weight.shape[-1])
    if pos.shape != (rows * columns, len(weight)):
        raise UserError(f"patch_embed_gather: expected pos [{rows * columns}, {len(weight)}], got {list(pos.shape)}")
    check_keep("patch_embed_gather", keep, len(images), rows * columns)
    backend = choose("patch_embed_gather", images, keep.numel() * len(weight))
    if backend == "reference":
        return _patch_embed_gather(images, keep, weight, bias, pos, prefix)
    return operators.patch_embed_gather(images, keep, autocast(weight), bias, pos, prefix, backend)


def _patch_embed_gather(
    images: Tensor, keep: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor, prefix: Tensor | None
) -> Tensor:
    ran("patch_embed_gather", "reference")
    tiles = _tiles(images, weight.shape[-1])
    columns = tiles.shape[2]
    # Indexing the strided view copies the kept patches alone, already in the weight's order (channel, row, column).
    pixels = tiles[batch_rows(keep), keep // columns, keep % columns]
    # The weight's dtype is the stream's: float32 pixels, bias and positions must not promote it.
    pixels, bias = pixels.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    tokens = F.linear(pixels.flatten(0, 1).flatten(1), weight.flatten(1), bias).unflatten(0, keep.shape)
    tokens = tokens + pos.to(tokens.dtype)[keep]
    if prefix is None:
        return tokens
    return torch.cat([prefix.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)


def masked_patch_mse(pred: Tensor, images: Tensor, mask: Tensor, norm_pix: bool = False) -> tuple[Tensor, Tensor]:
    """Squared error of reconstructed patches: (mean over the hidden ones, mean over the visible ones).

    pred [G, L, p*p*C] in `patchify`'s order, images [B, C, H, W], mask bool [G, L], True = hidden. Row g of pred
    reconstructs image g // (G//B). A patch's error is its mean over pixels; a group without patches gives 0.
    norm_pix: targets are standardised within their patch, (x - mean) / sqrt(var + 1e-6) with the unbiased variance
    (He et al., "Masked Autoencoders", 2022). Images are constants: no gradient reaches them.
    Returns two scalars, float32 (float64 for float64 predictions). Raises UserError for shapes that do not fit.
    """
    side = math.isqrt(pred.shape[-1] // images.shape[1])
    if pred.ndim != 3 or side == 0 or side * side * images.shape[1] != pred.shape[-1]:
        raise UserError(
            f"masked_patch_mse: expected pred [G, L, p*p*{images.shape[1]}] for images {list(images.shape)}, "
            f"got {list(pred.shape)}"
        )
    rows, columns = _grid("masked_patch_mse", images, side)
    if pred.shape[1] != rows * columns or pred.shape[0] % len(images):
        raise UserError(
            f"masked_patch_mse: expected pred [G, {rows * columns}, {pred.shape[2]}] with G a multiple of "
            f"{len(images)}, got {list(pred.shape)}"
        )
    if mask.shape != pred.shape[:2] or mask.dtype != torch.bool:
        raise UserError(
            f"masked_patch_mse: expected mask bool {list(pred.shape[:2])}, got {mask.dtype} {list(mask.shape)}"
        )
    backend = choose("masked_patch_mse", pred, pred.numel())
    if backend == "reference":
        return _masked_patch_mse(pred, images, mask, norm_pix)
    return operators.masked_patch_mse(pred, images.detach(), mask, norm_pix, backend).unbind()


def _masked_patch_mse(pred: Tensor, images: Tensor, mask: Tensor, norm_pix: bool) -> tuple[Tensor, Tensor]:
    ran("masked_patch_mse", "reference")
    pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
    target = patchify(images.detach().to(pred.dtype), math.isqrt(pred.shape[-1] // images.shape[1]))
    if norm_pix:
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    pred = pred.unflatten(0, (len(images), -1))
    # One target an image, broadcast over its reconstructions, never repeated.
    error = F.mse_loss(pred, target[:, None].expand_as(pred), reduction="none").mean(dim=-1).flatten(0, 1)

    def mean_over(group: Tensor) -> Tensor:
        return (error * group).sum() / group.sum().clamp(min=1)

    return mean_over(mask), mean_over(~mask)
