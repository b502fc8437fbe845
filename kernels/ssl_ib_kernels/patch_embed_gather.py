"""Embeds the kept patches only: a matrix product that finds its left operand in the images, through the index.

Shapes: B images, C channels, H x W pixels, p patch side, L patches of an image, K kept, M = B*K, D width, P prefix
tokens (class token), Q = C*p*p pixels of a patch, in the weight's order (channel, row, column).
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pixels import first_pixel, layout
from .rows import BLOCK_K, DTYPES, PROGRAMS, load_token, next_namer, row_of, row_tile, split, strides
from .softmax import dot
from .token_gather import token_gather_backward
from .variant import Variant, capability_of, launch, recording


@triton.jit
def pixel_offset(
    q,
    SIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
):
    """From a patch's first pixel to its q-th, in the weight's order."""
    return q // (SIDE * SIDE) * CHANNEL_STRIDE + q // SIDE % SIDE * ROW_STRIDE + q % SIDE * COLUMN_STRIDE


@triton.jit
def halves(x):
    """x [R, N] as its left and its right half."""
    return tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)).split()


@triton.jit
def finish(total, d, image, k, patch, exists, in_batch, bias, pos, prefix, out, kept, num_prefix, D: tl.constexpr):
    """Adds bias and positions to the products of patches and the columns from d on, and stores them."""
    d += tl.arange(0, total.shape[1])
    inside = in_batch[:, None] & (d < D)[None, :]
    total += tl.load(pos + patch[:, None] * D + d[None, :], mask=inside & exists[:, None], other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        # A row that names no patch is zeros.
        total += tl.where(exists[:, None], shift, 0.0)
    first = out + image.to(tl.int64)[:, None] * ((num_prefix + kept) * D) + d[None, :]
    tl.store(first + (num_prefix + k)[:, None] * D, total.to(out.dtype.element_ty), mask=inside)
    # The program that has an image's first patch writes the image's prefix too.
    if prefix is not None:
        for row in range(num_prefix):
            values = tl.load(prefix + row * D + d, mask=d < D, other=0.0).to(out.dtype.element_ty)
            values = tl.broadcast_to(values[None, :], total.shape)
            tl.store(first + row * D, values, mask=inside & (k == 0)[:, None])


@triton.jit(do_not_specialize=["num_rows", "kept", "num_prefix"])
def patch_embed_gather_kernel(
    images,
    keep,
    weight,
    bias,
    pos,
    prefix,
    out,
    num_rows,
    kept,
    num_prefix,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCHES: tl.constexpr,
    IMAGE_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A program embeds BLOCK_M kept patches, counted over the whole batch, into BLOCK_D of the width."""
    chunks = tl.cdiv(D, BLOCK_D)
    m = tl.program_id(0) // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    image, k = m // kept, m % kept
    in_batch = m < num_rows
    patch, exists = load_token(keep + m, in_batch, PATCHES)
    corner = first_pixel(images, image, patch, SIDE, COLUMNS, IMAGE_STRIDE, ROW_STRIDE, COLUMN_STRIDE)

    pixels: tl.constexpr = CHANNELS * SIDE * SIDE
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, pixels, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        offset = pixel_offset(q, SIDE, CHANNEL_STRIDE, ROW_STRIDE, COLUMN_STRIDE)
        a = tl.load(corner[:, None] + offset[None, :], mask=exists[:, None] & (q < pixels)[None, :], other=0.0)
        b = tl.load(weight + d[:, None] * pixels + q[None, :], mask=(d < D)[:, None] & (q < pixels)[None, :], other=0.0)
        total = dot(a.to(b.dtype), tl.trans(b), total)

    # By quarters: positions of a whole tile would not fit into the registers beside it.
    d = tl.program_id(0) % chunks * BLOCK_D
    left, right = halves(total)
    first, second = halves(left)
    third, fourth = halves(right)
    finish(first, d, image, k, patch, exists, in_batch, bias, pos, prefix, out, kept, num_prefix, D)
    d += BLOCK_D // 4
    finish(second, d, image, k, patch, exists, in_batch, bias, pos, prefix, out, kept, num_prefix, D)
    d += BLOCK_D // 4
    finish(third, d, image, k, patch, exists, in_batch, bias, pos, prefix, out, kept, num_prefix, D)
    d += BLOCK_D // 4
    finish(fourth, d, image, k, patch, exists, in_batch, bias, pos, prefix, out, kept, num_prefix, D)


@triton.jit(do_not_specialize=["num_rows", "kept", "num_prefix", "rows_each", "stride_image", "stride_row"])
def weight_gradient_kernel(
    x,
    images,
    keep,
    sums,
    num_rows,
    kept,
    num_prefix,
    rows_each,
    stride_image,
    stride_row,
    UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCHES: tl.constexpr,
    IMAGE_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A program sums BLOCK_D x BLOCK_Q of the weight's gradient over rows_each kept patches; x is the gradient.

    sums [parts, D, Q].
    """
    pixels: tl.constexpr = CHANNELS * SIDE * SIDE
    chunks, blocks = tl.cdiv(pixels, BLOCK_Q), tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0) // chunks
    part = block // blocks
    d = block % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    q = tl.program_id(0) % chunks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offset = pixel_offset(q, SIDE, CHANNEL_STRIDE, ROW_STRIDE, COLUMN_STRIDE)

    total = tl.zeros((BLOCK_D, BLOCK_Q), tl.float32)
    for start in range(part * rows_each, tl.minimum((part + 1) * rows_each, num_rows), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        patch, exists = load_token(keep + m, m < num_rows, PATCHES)
        corner = first_pixel(images, m // kept, patch, SIDE, COLUMNS, IMAGE_STRIDE, ROW_STRIDE, COLUMN_STRIDE)
        row = row_of(x, (m // kept).to(tl.int64), num_prefix + m % kept, stride_image, stride_row, UNIT)
        a = tl.load(row + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(corner[:, None] + offset[None, :], mask=exists[:, None] & (q < pixels)[None, :], other=0.0)
        total = dot(tl.trans(a), b.to(a.dtype), total)

    target = sums + (part.to(tl.int64) * D + d)[:, None] * pixels + q[None, :]
    tl.store(target, total, mask=(d < D)[:, None] & (q < pixels)[None, :])


@triton.jit(
    do_not_specialize=["num_images", "kept", "num_tokens", "num_prefix", "images_each", "stride_image", "stride_row"]
)
def position_sums_kernel(
    x,
    keep,
    sums,
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
    """A program sums, for ROWS patches, the rows of the gradient x that name them, over images_each images.

    sums [parts, L, D].
    """
    chunks, blocks = tl.cdiv(D, BLOCK_D), tl.cdiv(num_tokens, ROWS)
    block = tl.program_id(0) // chunks
    part = block // blocks
    token = block % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)

    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    image = part * images_each
    stop = tl.minimum(image + images_each, num_images)
    k = tl.full((ROWS,), -1, tl.int32)
    while image < stop:
        k = next_namer(keep + image.to(tl.int64) * kept, kept, token, k, BLOCK_K)
        source = row_of(x, image.to(tl.int64), num_prefix + k, stride_image, stride_row, UNIT) + d[None, :]
        total += tl.load(source, mask=(k < kept)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        # The next image once nobody is left who names a patch of the tile.
        done = tl.min(k, axis=0) == kept
        image += done
        k = tl.where(done, -1, k)

    target = sums + (part.to(tl.int64) * num_tokens + token)[:, None] * D + d[None, :]
    tl.store(target, total, mask=(token < num_tokens)[:, None] & (d < D)[None, :])


#: The gathered pixels and their gradients may take this many bytes while the gradient of images is computed.
WORKSPACE = 32 * 2**20

#: Programs that the weight's gradient is split into: each leaves a tile of 64 KiB at most to be summed.
PRODUCT_PROGRAMS = 264

#: (BLOCK_M, BLOCK_D, BLOCK_Q, num_warps, num_stages) of the two products, by what their device and operands are.
TILES = {
    "embed": {"hopper": (128, 256, 64, 8, 3), "ampere": (64, 128, 64, 4, 3), "float32": (64, 64, 32, 8, 2)},
    "weight": {"hopper": (64, 128, 128, 8, 3), "ampere": (32, 128, 128, 8, 3), "float32": (32, 64, 64, 4, 2)},
}


def product_tile(name: str, x: Tensor) -> dict[str, int]:
    """Blocks, warps and stages of the product `name` ("embed" or "weight") with operands like x."""
    big = capability_of(x.device) in (90, 100, 103)
    kind = "float32" if x.dtype == torch.float32 else "hopper" if big else "ampere"
    names = ("BLOCK_M", "BLOCK_D", "BLOCK_Q", "num_warps", "num_stages")
    return dict(zip(names, TILES[name][kind], strict=True))


def patch_embed_gather(
    images: Tensor, keep: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor, prefix: Tensor | None
) -> Tensor:
    """images [B, C, H, W], keep int [B, K], weight [D, C, p, p], bias [D] or None, pos [L, D], prefix [P, D] or None
    -> [B, P+K, D] in the weight's dtype, to which pixels are rounded; all the rest is added in float32. A row of keep
    that is out of range gives zeros.
    """
    (batch, kept), width = keep.shape, len(weight)
    num_prefix = 0 if prefix is None else len(prefix)
    out = weight.new_empty(batch, num_prefix + kept, width)
    if kept == 0 and num_prefix:
        return out.copy_(prefix)
    if out.numel():
        tile = product_tile("embed", weight)
        launch(
            patch_embed_gather_kernel,
            (triton.cdiv(batch * kept, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_D"]),),
            images=images,
            keep=keep.contiguous(),
            weight=weight.contiguous(),
            bias=None if bias is None else bias.contiguous(),
            pos=pos.contiguous(),
            prefix=None if prefix is None else prefix.contiguous(),
            out=out,
            num_rows=batch * kept,
            kept=kept,
            num_prefix=num_prefix,
            D=width,
            **layout(images, weight.shape[-1]),
            **tile,
        )
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
    """grad [B, P+K, D] -> gradients of images [B, C, H, W] (their dtype), weight [D, C, p, p] and pos [L, D] (float32).

    A part that is not wanted is empty. Sums over the batch have one order.
    """
    side = weight.shape[-1]
    num_tokens = (images.shape[2] // side) * (images.shape[3] // side)
    return (
        _images_gradient(grad, images, keep, weight, num_prefix) if want_images else images.new_empty(0),
        _weight_gradient(grad, images, keep, weight, num_prefix) if want_weight else _sums(grad, 0),
        _pos_gradient(grad, keep, num_tokens, num_prefix) if want_pos else _sums(grad, 0),
    )


def _sums(grad: Tensor, *shape: int) -> Tensor:
    return grad.new_empty(shape, dtype=torch.float32)


def _images_gradient(grad: Tensor, images: Tensor, keep: Tensor, weight: Tensor, num_prefix: int) -> Tensor:
    """Some images at a time: the product for kept patches, put in their places like tokens, then cut into rows."""
    (batch, channels, height, width), side = images.shape, weight.shape[-1]
    rows, columns, kept = height // side, width // side, keep.shape[1]
    flat = weight.flatten(1)
    out = images.new_empty(images.shape)
    numbers = kept * len(weight) + (kept + rows * columns) * flat.shape[1]
    each = max(1, WORKSPACE // (numbers * weight.element_size()))
    for start in range(0, batch, each):
        some = slice(start, start + each)
        pixels = grad[some, num_prefix:] @ flat
        patches = token_gather_backward(pixels, keep[some], rows * columns)
        grid = patches.unflatten(2, (channels, side, side)).unflatten(1, (rows, columns))
        tiles = out[some].unflatten(3, (columns, side)).unflatten(2, (rows, side))
        tiles.copy_(grid.permute(0, 3, 1, 4, 2, 5))
    return out


def _weight_gradient(grad: Tensor, images: Tensor, keep: Tensor, weight: Tensor, num_prefix: int) -> Tensor:
    (batch, kept), width = keep.shape, len(weight)
    if batch * kept == 0:
        return _sums(grad, *weight.shape).zero_()
    tile = product_tile("weight", grad)
    programs = triton.cdiv(width, tile["BLOCK_D"]) * triton.cdiv(weight[0].numel(), tile["BLOCK_Q"])
    steps = triton.cdiv(batch * kept, tile["BLOCK_M"])
    parts, each = split(steps, programs, PRODUCT_PROGRAMS)
    sums = _sums(grad, parts, *weight.shape)
    launch(
        weight_gradient_kernel,
        (parts * programs,),
        images=images,
        keep=keep.contiguous(),
        sums=sums,
        num_rows=batch * kept,
        kept=kept,
        num_prefix=num_prefix,
        rows_each=each * tile["BLOCK_M"],
        D=width,
        **strides(grad),
        **layout(images, weight.shape[-1]),
        **tile,
    )
    return sums.sum(0)


def _pos_gradient(grad: Tensor, keep: Tensor, num_tokens: int, num_prefix: int) -> Tensor:
    (batch, kept), width = keep.shape, grad.shape[2]
    if batch * kept == 0:
        return _sums(grad, num_tokens, width).zero_()
    tile = row_tile(width)
    programs = triton.cdiv(num_tokens, tile["ROWS"]) * triton.cdiv(width, tile["BLOCK_D"])
    parts, each = split(batch, programs, PROGRAMS)
    sums = _sums(grad, parts, num_tokens, width)
    launch(
        position_sums_kernel,
        (parts * programs,),
        keep=keep.contiguous(),
        sums=sums,
        num_images=batch,
        kept=kept,
        num_tokens=num_tokens,
        num_prefix=num_prefix,
        images_each=each,
        BLOCK_K=BLOCK_K,
        **strides(grad),
        **tile,
    )
    return sums.sum(0)


def variants(capability: int) -> list[Variant]:
    """What both compile for the usual encoders: images in float32 or in the weight's dtype, parameters in float32."""
    encoders = ((768, 16, 224), (384, 4, 32))  # width, patch side, image side
    with recording(capability) as listed:
        for dtype, (width, side, size) in product(DTYPES, encoders):
            num_tokens = (size // side) ** 2
            keep = torch.empty(2, num_tokens // 4, dtype=torch.int64, device="meta")
            weight = torch.empty(width, 3, side, side, dtype=dtype, device="meta")
            bias, pos = torch.empty(width, device="meta"), torch.empty(num_tokens, width, device="meta")
            for image_dtype in dict.fromkeys((torch.float32, dtype)):
                images = torch.empty(2, 3, size, size, dtype=image_dtype, device="meta")
                out = patch_embed_gather(images, keep, weight, bias, pos, pos[:1])
                patch_embed_gather_backward(out, images, keep, weight, 1, True, True, True)
    return listed
