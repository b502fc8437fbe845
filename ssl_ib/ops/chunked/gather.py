"""Masked gather and scatter in plain torch.

Rows of tokens and of pixels move as whole rows of a flat matrix, with one index a row: no index is repeated over a
width. What must be computed on the way (pixels to embed, targets of a reconstruction) exists for a few images at a
time.

Shapes: B images, L patches, K kept, D width, P prefix tokens, C channels, p patch side, G reconstructions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

#: Numbers held at once: 8 MiB of float32 where a cache is to hold them, 32 MiB where a GPU is to be kept busy.
CPU_PIECE, GPU_PIECE = 1 << 21, 1 << 23


def piece(tensor: Tensor) -> int:
    """How many numbers a temporary of this tensor's device may have."""
    return CPU_PIECE if tensor.is_cpu else GPU_PIECE


def spans(count: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover range(count)."""
    step = max(step, 1)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _inside(keep: Tensor, num_tokens: int) -> tuple[Tensor, Tensor | None]:
    """keep [B, K] with its numbers brought into [0, L), and which were not there [B, K]; None where all were."""
    if torch.compiler.is_compiling():
        # Of the functions here the reference uses some, and a graph cannot ask.
        return keep, None
    outside = (keep < 0) | (keep >= num_tokens)
    # Asking would make a GPU wait.
    if keep.is_cpu and not outside.any():
        return keep, None
    return keep.clamp(0, max(num_tokens - 1, 0)), outside


def _flat(keep: Tensor, rows: int, first: int = 0, outside: Tensor | None = None) -> Tensor:
    """keep [B, K]: numbers of the kept rows in a [B * rows, ...] matrix, `first` rows of each image skipped.

    What lies outside gets the number of the row behind all.
    """
    start = torch.arange(len(keep), device=keep.device)[:, None] * rows + first
    index = keep + start
    return (index if outside is None else index.masked_fill_(outside, len(keep) * rows)).flatten()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of numbers of `dtype` are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def token_gather(x: Tensor, keep: Tensor) -> Tensor:
    batch, num_tokens, width = x.shape
    keep, outside = _inside(keep, num_tokens)
    out = x.reshape(batch * num_tokens, width).index_select(0, _flat(keep, num_tokens))
    out = out.view(batch, keep.shape[1], width)
    return out if outside is None else out.masked_fill_(outside[..., None], 0.0)


def token_gather_backward(grad: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
    batch, kept, width = grad.shape
    keep, outside = _inside(keep, num_tokens)
    # What names no token goes to a row behind all.
    out = grad.new_zeros(batch * num_tokens + (outside is not None), width)
    out.index_add_(0, _flat(keep, num_tokens, 0, outside), grad.reshape(batch * kept, width))
    return out[: batch * num_tokens].view(batch, num_tokens, width)


def last_place(keep: Tensor, num_tokens: int) -> Tensor:
    """The inverse of keep [B, K]: [B, L], where a token stands in its row of keep (the last place), -1 if nowhere."""
    places = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    inside, outside = _inside(keep.long(), num_tokens)
    if outside is not None:
        inside = inside.masked_fill(outside, num_tokens)
    empty = torch.full((len(keep), num_tokens + (outside is not None)), -1, device=keep.device)
    return empty.scatter_reduce(1, inside, places, "amax")[:, :num_tokens]


def _deciding_places(keep: Tensor, num_tokens: int) -> Tensor | None:
    """[B, K]: of the places that name the same token the last; None where it is known that none is named twice."""
    deciding = last_place(keep, num_tokens).gather(1, _inside(keep.long(), num_tokens)[0])
    # Asking would make a GPU wait.
    if keep.is_cpu and torch.equal(deciding, torch.arange(keep.shape[1]).expand_as(keep)):
        return None
    return deciding


def token_scatter(
    latents: Tensor, keep: Tensor, mask_token: Tensor, num_tokens: int, pos: Tensor | None, num_prefix: int
) -> Tensor:
    batch, _, width = latents.shape
    total = num_prefix + num_tokens
    blank = mask_token.to(latents.dtype).expand(total, width)
    if pos is not None:
        pos = pos.to(latents.dtype)
        blank = blank + pos
    inside, outside = _inside(keep, num_tokens)
    # What names no token goes to a row behind all.
    rows_of_all = latents.new_empty(batch * total + (outside is not None), width)
    out = rows_of_all[: batch * total].view(batch, total, width)
    out[:, num_prefix:] = blank[num_prefix:]
    out[:, :num_prefix] = latents[:, :num_prefix]
    visible = latents[:, num_prefix:]
    if pos is not None:
        out[:, :num_prefix] += pos[:num_prefix]
        visible = visible + pos[num_prefix:].index_select(0, inside.flatten()).view_as(visible)
    deciding = _deciding_places(keep, num_tokens)
    if deciding is not None:
        # Rows are written in no certain order, so all that go to one place are made the same.
        visible = token_gather(visible, deciding)
    rows = visible.reshape(-1, width)
    rows_of_all.index_copy_(0, _flat(inside, total, num_prefix, outside), rows)
    return out


def token_scatter_backward(
    grad: Tensor, keep: Tensor, num_prefix: int, want_latents: bool, want_mask_token: bool, want_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, total, width = grad.shape
    num_tokens, kept = total - num_prefix, keep.shape[1]
    dtype = accumulator(grad.dtype)
    latents = mask_token = pos = grad.new_empty(0)
    if want_latents:
        latents = grad.new_empty(batch, num_prefix + kept, width)
        latents[:, :num_prefix] = grad[:, :num_prefix]
        inside, outside = _inside(keep, num_tokens)
        rows = grad.reshape(batch * total, width).index_select(0, _flat(inside, total, num_prefix))
        latents[:, num_prefix:] = rows.view(batch, kept, width)
        if outside is not None:
            latents[:, num_prefix:].masked_fill_(outside[..., None], 0.0)
        deciding = _deciding_places(keep, num_tokens)
        if deciding is not None:
            latents[:, num_prefix:] *= (deciding == torch.arange(kept, device=keep.device))[..., None]
    if want_pos or want_mask_token:
        everywhere = grad.sum(dim=0, dtype=dtype)
        if want_pos:
            pos = everywhere
    if want_mask_token:
        hidden = (last_place(keep, num_tokens) < 0).flatten()
        mask_token = grad.new_zeros(width, dtype=dtype)
        for span in spans(batch, piece(grad) // max(num_tokens * width, 1)):
            tokens = grad[span, num_prefix:].to(dtype).reshape(-1, width)
            mask_token += hidden[span.start * num_tokens : span.stop * num_tokens].to(dtype) @ tokens
    return latents, mask_token, pos


def _pixel_rows(images: Tensor, keep: Tensor, side: int) -> Tensor:
    """[B * K * C * p]: which rows of `images` seen as [.., p] hold the kept patches, in the order (channel, row)."""
    batch, channels, height, width = images.shape
    columns = width // side
    line = torch.arange(side, device=keep.device) * columns
    channel = torch.arange(channels, device=keep.device) * (height * columns)
    corner = keep // columns * (side * columns) + keep % columns
    start = torch.arange(batch, device=keep.device) * (channels * height * columns)
    index = (corner + start[:, None])[..., None, None] + channel[:, None] + line
    return index.flatten()


def _pixels(images: Tensor, keep: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """The kept patches [B * K, C * p * p], in the order of a convolution's weight."""
    rows = images.reshape(-1, side).index_select(0, _pixel_rows(images, keep, side))
    return rows.view(keep.numel(), images.shape[1] * side * side).to(dtype)


def patch_embed_gather(
    images: Tensor, keep: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor, prefix: Tensor | None
) -> Tensor:
    batch, kept = keep.shape
    num_prefix = 0 if prefix is None else len(prefix)
    flat = weight.flatten(1)
    out = weight.new_empty(batch, num_prefix + kept, len(weight))
    if prefix is not None:
        out[:, :num_prefix] = prefix
    offset = pos.to(accumulator(weight.dtype))
    offset = (offset if bias is None else offset + bias).to(weight.dtype)
    keep, outside = _inside(keep, len(pos))
    for span in spans(batch, piece(images) // max(kept * max(flat.shape), 1)):
        pixels = _pixels(images[span], keep[span], weight.shape[-1], weight.dtype)
        tokens = offset.index_select(0, keep[span].flatten()).addmm_(pixels, flat.T)
        out[span, num_prefix:] = tokens.view(span.stop - span.start, kept, len(weight))
    if outside is not None:
        out[:, num_prefix:].masked_fill_(outside[..., None], 0.0)
    return out


def patch_embed_gather_backward(
    grad: Tensor,
    images: Tensor,
    keep: Tensor,
    weight: Tensor,
    num_prefix: int,
    want_images: bool,
    want_weight: bool,
    want_pos: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kept = keep.shape
    channels, side = weight.shape[1], weight.shape[-1]
    num_patches = images.shape[2] * images.shape[3] // side**2
    dtype = accumulator(grad.dtype)
    flat = weight.flatten(1).to(dtype)
    d_images = d_weight = d_pos = grad.new_empty(0)
    if want_images:
        d_images = torch.zeros_like(images, dtype=dtype, memory_format=torch.contiguous_format)
    if want_weight:
        d_weight = torch.zeros_like(flat)
    if want_pos:
        d_pos = grad.new_zeros(num_patches, len(weight), dtype=dtype)
    keep, outside = _inside(keep, num_patches)
    for span in spans(batch, piece(images) // max(kept * max(flat.shape), 1)):
        tokens = grad[span, num_prefix:].reshape(-1, len(weight)).to(dtype)
        if outside is not None:
            tokens = tokens.masked_fill(outside[span].reshape(-1, 1), 0.0)
        if want_weight:
            d_weight.addmm_(tokens.T, _pixels(images[span], keep[span], side, weight.dtype).to(dtype))
        if want_pos:
            d_pos.index_add_(0, keep[span].flatten(), tokens)
        if want_images:
            rows = (tokens @ flat).view(-1, side)
            d_images[span].view(-1, side).index_add_(0, _pixel_rows(images[span], keep[span], side), rows)
    return d_images.to(images.dtype), d_weight.view(-1, channels, side, side) if want_weight else d_weight, d_pos


def _errors(pred: Tensor, images: Tensor, norm_pix: bool) -> Iterator[tuple[slice, Tensor]]:
    """Prediction minus target, some images at a time: (rows of pred, [rows, L, p*p*C])."""
    batch, channels, height, width = images.shape
    group, num_patches, pixels = len(pred) // max(batch, 1), pred.shape[1], pred.shape[2]
    side, dtype = math.isqrt(pixels // channels), accumulator(pred.dtype)
    for span in spans(batch, piece(pred) // max(group * num_patches * pixels, 1)):
        # With the channels last a patch is `side` runs of pixels in memory, which copy far faster than single ones.
        lines = images[span].to(dtype).permute(0, 2, 3, 1).contiguous()
        lines = lines.view(-1, height // side, side, width // side, side * channels)
        target = lines.transpose(2, 3).reshape(-1, 1, num_patches, pixels)
        if norm_pix:
            # Several times as fast as torch.var_mean over such short rows.
            target -= target.mean(dim=-1, keepdim=True)
            deviation = torch.linalg.vector_norm(target, dim=-1, keepdim=True)
            target /= (deviation.square_().div_(pixels - 1) + 1e-6).sqrt_()
        rows = slice(span.start * group, span.stop * group)
        yield rows, (pred[rows].view(-1, group, num_patches, pixels) - target).flatten(0, 1)


def masked_patch_mse(pred: Tensor, images: Tensor, mask: Tensor, norm_pix: bool) -> Tensor:
    sums = pred.new_zeros(2, dtype=accumulator(pred.dtype))
    for rows, error in _errors(pred.contiguous(), images, norm_pix):
        patches = error.square_().mean(dim=-1)
        sums[0] += (patches * mask[rows]).sum()
        sums[1] += (patches * ~mask[rows]).sum()
    return sums


def masked_patch_mse_backward(scale: Tensor, pred: Tensor, images: Tensor, mask: Tensor, norm_pix: bool) -> Tensor:
    out = torch.empty_like(pred, memory_format=torch.contiguous_format)
    for rows, error in _errors(pred.contiguous(), images, norm_pix):
        out[rows] = error.mul_(torch.where(mask[rows], scale[0], scale[1])[..., None])
    return out
