"""A decoder's input in one pass: kept tokens in their places, mask tokens in the others, positions added.

Shapes: B images, L tokens, K kept, P prefix tokens (class token), D width.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import BLOCK_K, DTYPES, PROGRAMS, last_namer, load_token, row_of, row_tile, split, strides
from .variant import Variant, launch, recording

#: A program uses its tile of positions for so many images. Read anew for each, float32 positions would be most of the
#: bytes that pass through the cache: twice a bfloat16 output.
IMAGES = 4


@triton.jit(do_not_specialize=["num_images", "kept", "num_tokens", "num_prefix", "stride_image", "stride_row"])
def token_scatter_kernel(
    x,
    keep,
    mask_token,
    pos,
    out,
    num_images,
    kept,
    num_tokens,
    num_prefix,
    stride_image,
    stride_row,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program writes the same ROWS rows of IMAGES images; its neighbours write them of other images, so that the
    positions that are read at a time are few.
    """
    length = num_prefix + num_tokens
    chunks, groups = tl.cdiv(D, BLOCK_D), tl.cdiv(num_images, IMAGES)
    block = tl.program_id(0) // chunks
    row = block // groups * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < length)[:, None] & (d < D)[None, :]

    shift = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if pos is not None:
        shift += tl.load(pos + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    blank = tl.load(mask_token + d, mask=d < D, other=0.0).to(tl.float32)

    first = block % groups * IMAGES
    for image in range(first, tl.minimum(first + IMAGES, num_images)):
        image = tl.cast(image, tl.int64)
        k = last_namer(keep + image * kept, kept, row - num_prefix, BLOCK_K)
        known = (row < num_prefix) | (k >= 0)
        source = tl.where(row < num_prefix, row, num_prefix + k)
        source = row_of(x, image, source, stride_image, stride_row, UNIT) + d[None, :]
        values = tl.load(source, mask=inside & known[:, None], other=0.0).to(tl.float32)
        values = tl.where(known[:, None], values, blank[None, :]) + shift
        target = out + (image * length + row)[:, None] * D + d[None, :]
        tl.store(target, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["kept", "num_tokens", "num_prefix", "stride_image", "stride_row"])
def latents_gradient_kernel(
    x,
    keep,
    out,
    kept,
    num_tokens,
    num_prefix,
    stride_image,
    stride_row,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program writes ROWS of one image's P+K rows: its token's gradient, or zeros if a later k took the token."""
    length = num_prefix + kept
    chunks, blocks = tl.cdiv(D, BLOCK_D), tl.cdiv(length, ROWS)
    block = tl.program_id(0) // chunks
    image = (block // blocks).to(tl.int64)
    row = block % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < length)[:, None] & (d < D)[None, :]
    keep += image * kept

    named = row >= num_prefix
    token, exists = load_token(keep + row - num_prefix, named & (row < length), num_tokens)
    wins = last_namer(keep, kept, token, BLOCK_K) == row - num_prefix
    source = tl.where(named, num_prefix + token, row)
    source = row_of(x, image, source, stride_image, stride_row, UNIT) + d[None, :]
    values = tl.load(source, mask=inside & (~named | (wins & exists))[:, None], other=0.0)
    tl.store(out + (image * length + row)[:, None] * D + d[None, :], values, mask=inside)


@triton.jit(
    do_not_specialize=["num_images", "kept", "num_tokens", "num_prefix", "images_each", "stride_image", "stride_row"]
)
def parameter_sums_kernel(
    x,
    keep,
    mask_token_sums,
    pos_sums,
    num_images,
    kept,
    num_tokens,
    num_prefix,
    images_each,
    stride_image,
    stride_row,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program sums ROWS rows over images_each images: each row (positions), and the hidden ones (mask token).

    What is not wanted is None. mask_token_sums [parts * blocks of rows, D], pos_sums [parts, P+L, D].
    """
    length = num_prefix + num_tokens
    chunks, blocks = tl.cdiv(D, BLOCK_D), tl.cdiv(length, ROWS)
    block = tl.program_id(0) // chunks
    part = block // blocks
    row = block % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < length)[:, None] & (d < D)[None, :]

    blanks = tl.zeros((ROWS, BLOCK_D), tl.float32)
    places = tl.zeros((ROWS, BLOCK_D), tl.float32)
    first = part * images_each
    for image in range(first, tl.minimum(first + images_each, num_images)):
        image = tl.cast(image, tl.int64)
        wanted = inside
        if mask_token_sums is not None:
            hidden = (row >= num_prefix) & (last_namer(keep + image * kept, kept, row - num_prefix, BLOCK_K) < 0)
            if pos_sums is None:
                wanted = inside & hidden[:, None]
        source = row_of(x, image, row, stride_image, stride_row, UNIT) + d[None, :]
        values = tl.load(source, mask=wanted, other=0.0).to(tl.float32)
        if mask_token_sums is not None:
            blanks += tl.where(hidden[:, None], values, 0.0)
        if pos_sums is not None:
            places += values

    if mask_token_sums is not None:
        tl.store(mask_token_sums + block.to(tl.int64) * D + d, tl.sum(blanks, axis=0), mask=d < D)
    if pos_sums is not None:
        target = pos_sums + (part.to(tl.int64) * length + row)[:, None] * D + d[None, :]
        tl.store(target, places, mask=inside)


def token_scatter(
    latents: Tensor, keep: Tensor, mask_token: Tensor, num_tokens: int, pos: Tensor | None, num_prefix: int
) -> Tensor:
    """latents [B, P+K, D], keep int [B, K], mask_token [D], pos [P+L, D] or None -> [B, P+L, D], latents' dtype.

    Where keep names a token twice, the largest k has it.
    """
    batch, length, width = len(latents), num_prefix + num_tokens, latents.shape[2]
    out = latents.new_empty(batch, length, width)
    if out.numel():
        tile = row_tile(width)
        blocks = triton.cdiv(length, tile["ROWS"]) * triton.cdiv(width, tile["BLOCK_D"])
        launch(
            token_scatter_kernel,
            (blocks * triton.cdiv(batch, IMAGES),),
            keep=keep.contiguous(),
            mask_token=mask_token.contiguous(),
            pos=None if pos is None else pos.contiguous(),
            out=out,
            num_images=batch,
            kept=keep.shape[1],
            num_tokens=num_tokens,
            num_prefix=num_prefix,
            IMAGES=IMAGES,
            BLOCK_K=BLOCK_K,
            **strides(latents),
            **tile,
        )
    return out


def token_scatter_backward(
    grad: Tensor, keep: Tensor, num_prefix: int, want_latents: bool, want_mask_token: bool, want_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [B, P+L, D] -> gradients of latents [B, P+K, D] (grad's dtype), mask_token [D] and pos [P+L, D] (float32).

    A part that is not wanted is empty. Sums over the batch have one order.
    """
    latents = _latents_gradient(grad, keep, num_prefix) if want_latents else grad.new_empty(0)
    mask_token, pos = _parameter_gradients(grad, keep, num_prefix, want_mask_token, want_pos)
    return latents, mask_token, pos


def _latents_gradient(grad: Tensor, keep: Tensor, num_prefix: int) -> Tensor:
    (batch, length, width), kept = grad.shape, keep.shape[1]
    out = grad.new_empty(batch, num_prefix + kept, width)
    if out.numel():
        tile = row_tile(width)
        launch(
            latents_gradient_kernel,
            (batch * triton.cdiv(num_prefix + kept, tile["ROWS"]) * triton.cdiv(width, tile["BLOCK_D"]),),
            keep=keep.contiguous(),
            out=out,
            kept=kept,
            num_tokens=length - num_prefix,
            num_prefix=num_prefix,
            BLOCK_K=BLOCK_K,
            **strides(grad),
            **tile,
        )
    return out


def _parameter_gradients(
    grad: Tensor, keep: Tensor, num_prefix: int, want_mask_token: bool, want_pos: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of mask_token [D] and pos [P+L, D], float32; empty where they are not wanted."""
    batch, length, width = grad.shape
    mask_token_shape, pos_shape = (width,) if want_mask_token else (0,), (length, width) if want_pos else (0,)
    if grad.numel() == 0 or not (want_mask_token or want_pos):
        return tuple(grad.new_zeros(shape, dtype=torch.float32) for shape in (mask_token_shape, pos_shape))
    tile = row_tile(width, 4096 // grad.element_size())
    blocks, chunks = triton.cdiv(length, tile["ROWS"]), triton.cdiv(width, tile["BLOCK_D"])
    parts, each = split(batch, blocks * chunks, PROGRAMS)
    mask_token_sums = grad.new_empty(parts * blocks, *mask_token_shape, dtype=torch.float32)
    pos_sums = grad.new_empty(parts, *pos_shape, dtype=torch.float32)
    launch(
        parameter_sums_kernel,
        (parts * blocks * chunks,),
        keep=keep.contiguous(),
        mask_token_sums=mask_token_sums if want_mask_token else None,
        pos_sums=pos_sums if want_pos else None,
        num_images=batch,
        kept=keep.shape[1],
        num_tokens=length - num_prefix,
        num_prefix=num_prefix,
        images_each=each,
        BLOCK_K=BLOCK_K,
        **strides(grad),
        **tile,
    )
    return mask_token_sums.sum(0), pos_sums.sum(0)


def variants(capability: int) -> list[Variant]:
    """What both compile for the usual decoders, parameters in float32, and learnt or fixed positions."""
    with recording(capability) as listed:
        for dtype, width in product(DTYPES, (512,)):
            latents = torch.empty(2, 50, width, dtype=dtype, device="meta")
            keep = torch.empty(2, 49, dtype=torch.int64, device="meta")
            mask_token, pos = torch.empty(width, device="meta"), torch.empty(197, width, device="meta")
            for shift in (None, pos):
                out = token_scatter(latents, keep, mask_token, 196, shift, 1)
                token_scatter_backward(out, keep, 1, True, True, shift is not None)
    return listed
