"""Squared error of reconstructed patches, hidden and visible apart; targets are read from the images, never stored.

Shapes: B images, C channels, H x W pixels, p patch side, L patches of an image, N masks of an image, G = B*N
reconstructions, Q = p*p*C pixels of a patch, in the order (row, column, channel), R patches of a tile.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pixels import first_pixel, layout
from .rows import DTYPES, row_of, strides
from .variant import Variant, launch, recording


@triton.jit(do_not_specialize=["num_patches", "num_masks", "stride_image", "stride_row"])
def masked_patch_mse_kernel(
    x,
    images,
    mask,
    sums,
    scale,
    out,
    num_patches,
    num_masks,
    stride_image,
    stride_row,
    UNIT: tl.constexpr,
    NORM_PIX: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCHES: tl.constexpr,
    IMAGE_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A program takes ROWS patches, counted over the whole batch, and all their reconstructions x.

    With sums [programs, 2] it sums the patches' errors, hidden and visible; with scale [2] and out it writes gradients.
    """
    pixels: tl.constexpr = CHANNELS * SIDE * SIDE
    patch = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = tl.arange(0, BLOCK_Q)
    exists = patch < num_patches
    inside = exists[:, None] & (q < pixels)[None, :]
    image, patch = patch // PATCHES, patch % PATCHES

    corner = first_pixel(images, image, patch, SIDE, COLUMNS, IMAGE_STRIDE, ROW_STRIDE, COLUMN_STRIDE)
    offset = q // (SIDE * CHANNELS) * ROW_STRIDE + q // CHANNELS % SIDE * COLUMN_STRIDE + q % CHANNELS * CHANNEL_STRIDE
    target = tl.load(corner[:, None] + offset[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM_PIX:
        target = tl.where(inside, target - (tl.sum(target, axis=1) / pixels)[:, None], 0.0)
        variance = tl.sum(target * target, axis=1) / (pixels - 1)
        target = target / tl.sqrt(variance + 1e-6)[:, None]

    hidden_sum = tl.zeros((ROWS,), tl.float32)
    visible_sum = tl.zeros((ROWS,), tl.float32)
    for n in range(num_masks):
        group = image.to(tl.int64) * num_masks + n
        hidden = tl.load(mask + group * PATCHES + patch, mask=exists, other=0) != 0
        source = row_of(x, group, patch, stride_image, stride_row, UNIT) + q[None, :]
        difference = tl.load(source, mask=inside, other=0.0).to(tl.float32) - target
        if sums is not None:
            error = tl.sum(difference * difference, axis=1) / pixels
            hidden_sum += tl.where(hidden, error, 0.0)
            visible_sum += tl.where(hidden, 0.0, error)
        else:
            gradient = tl.where(hidden, tl.load(scale), tl.load(scale + 1))[:, None] * difference
            row = out + (group * PATCHES + patch)[:, None] * pixels + q[None, :]
            tl.store(row, gradient.to(out.dtype.element_ty), mask=inside)

    if sums is not None:
        place = sums + tl.program_id(0).to(tl.int64) * 2
        tl.store(place, tl.sum(hidden_sum, axis=0))
        tl.store(place + 1, tl.sum(visible_sum, axis=0))


def patch_tile(pixels: int) -> dict[str, int]:
    """Blocks and warps: whole patches, 4096 pixels or more, 32 a thread."""
    block = triton.next_power_of_2(pixels)
    return {
        "ROWS": max(1, 4096 // block),
        "BLOCK_Q": block,
        "num_warps": min(max(4, block // 1024), 16),
        "num_stages": 1,
    }


def masked_patch_mse(pred: Tensor, images: Tensor, mask: Tensor, norm_pix: bool) -> Tensor:
    """pred [G, L, p*p*C], images [B, C, H, W], mask bool [G, L], True = hidden -> [2] float32, summed over the hidden
    patches and over the visible ones: a patch's mean squared error. Row g of pred reconstructs image g // (G//B).

    norm_pix: targets are standardised within their patch, with the unbiased variance.
    """
    if pred.numel() == 0:
        return pred.new_zeros(2, dtype=torch.float32)
    programs, arguments = _launch_of(pred, images, mask, norm_pix)
    sums = pred.new_empty(programs, 2, dtype=torch.float32)
    launch(masked_patch_mse_kernel, (programs,), sums=sums, scale=None, out=None, **arguments)
    return sums.sum(0)


def masked_patch_mse_backward(scale: Tensor, pred: Tensor, images: Tensor, mask: Tensor, norm_pix: bool) -> Tensor:
    """scale [2] float32, of hidden and of visible patches -> scale * (pred - target), as pred [G, L, p*p*C]."""
    out = pred.new_empty(pred.shape)
    if out.numel():
        programs, arguments = _launch_of(pred, images, mask, norm_pix)
        launch(masked_patch_mse_kernel, (programs,), sums=None, scale=scale.contiguous(), out=out, **arguments)
    return out


def _launch_of(pred: Tensor, images: Tensor, mask: Tensor, norm_pix: bool) -> tuple[int, dict[str, Any]]:
    """How many programs, and what both directions pass to them."""
    batch, channels = images.shape[:2]
    num_patches = batch * pred.shape[1]
    tile = patch_tile(pred.shape[2])
    return triton.cdiv(num_patches, tile["ROWS"]), {
        "images": images,
        "mask": mask.contiguous(),
        "num_patches": num_patches,
        "num_masks": len(pred) // batch,
        "NORM_PIX": norm_pix,
        **strides(pred),
        **layout(images, math.isqrt(pred.shape[2] // channels)),
        **tile,
    }


def variants(capability: int) -> list[Variant]:
    """What both directions compile for the usual patches, pixels as they are and standardised."""
    with recording(capability) as listed:
        for dtype, (side, size), norm_pix in product(DTYPES, ((16, 224), (4, 32)), (False, True)):
            images = torch.empty(2, 3, size, size, device="meta")
            pred = torch.empty(2, (size // side) ** 2, 3 * side**2, dtype=dtype, device="meta")
            mask = torch.empty(pred.shape[:2], dtype=torch.bool, device="meta")
            scale = masked_patch_mse(pred, images, mask, norm_pix)
            masked_patch_mse_backward(scale, pred, images, mask, norm_pix)
    return listed
