"""The kept tokens of every image, and the gradient of their choice: copies of whole rows.

Shapes: B images, L tokens, K kept, D width.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import BLOCK_K, DTYPES, load_token, next_namer, row_of, row_tile, strides
from .variant import Variant, launch, recording


@triton.jit(do_not_specialize=["num_rows", "kept", "num_tokens", "stride_image", "stride_row"])
def token_gather_kernel(
    x,
    keep,
    out,
    num_rows,
    kept,
    num_tokens,
    stride_image,
    stride_row,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program copies ROWS rows of the output, counted over the whole batch."""
    chunks = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (d < D)[None, :]

    token, exists = load_token(keep + row, row < num_rows, num_tokens)
    source = row_of(x, (row // kept).to(tl.int64), token, stride_image, stride_row, UNIT) + d[None, :]
    values = tl.load(source, mask=inside & exists[:, None], other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * D + d[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["kept", "num_tokens", "stride_image", "stride_row"])
def token_gather_backward_kernel(
    x,
    keep,
    out,
    kept,
    num_tokens,
    stride_image,
    stride_row,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program writes ROWS tokens of one image: the sum of the rows of x [B, K, D] whose k names the token."""
    chunks, blocks = tl.cdiv(D, BLOCK_D), tl.cdiv(num_tokens, ROWS)
    block = tl.program_id(0) // chunks
    image = (block // blocks).to(tl.int64)
    token = block % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    keep += image * kept

    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    k = next_namer(keep, kept, token, tl.full((ROWS,), -1, tl.int32), BLOCK_K)
    # One turn, unless a token is named twice.
    while tl.min(k, axis=0) < kept:
        source = row_of(x, image, k, stride_image, stride_row, UNIT) + d[None, :]
        total += tl.load(source, mask=(k < kept)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        k = next_namer(keep, kept, token, k, BLOCK_K)

    target = out + (image * num_tokens + token)[:, None] * D + d[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(token < num_tokens)[:, None] & (d < D)[None, :])


def token_gather(x: Tensor, keep: Tensor) -> Tensor:
    """x [B, L, D], keep int [B, K] with values in [0, L) -> [B, K, D]. A value out of range gives zeros."""
    (_, num_tokens, width), (batch, kept) = x.shape, keep.shape
    out = x.new_empty(batch, kept, width)
    if out.numel():
        tile = row_tile(width)
        launch(
            token_gather_kernel,
            (triton.cdiv(batch * kept, tile["ROWS"]) * triton.cdiv(width, tile["BLOCK_D"]),),
            keep=keep.contiguous(),
            out=out,
            num_rows=batch * kept,
            kept=kept,
            num_tokens=num_tokens,
            **strides(x),
            **tile,
        )
    return out


def token_gather_backward(grad: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
    """grad [B, K, D], keep int [B, K] -> [B, L, D]: the gradients of a token named twice are summed in order of k."""
    batch, kept, width = grad.shape
    if kept == 0:
        return grad.new_zeros(batch, num_tokens, width)
    out = grad.new_empty(batch, num_tokens, width)
    if out.numel():
        tile = row_tile(width)
        launch(
            token_gather_backward_kernel,
            (batch * triton.cdiv(num_tokens, tile["ROWS"]) * triton.cdiv(width, tile["BLOCK_D"]),),
            keep=keep.contiguous(),
            out=out,
            kept=kept,
            num_tokens=num_tokens,
            BLOCK_K=BLOCK_K,
            **strides(grad),
            **tile,
        )
    return out


def variants(capability: int) -> list[Variant]:
    """What both compile at the usual widths."""
    with recording(capability) as listed:
        for dtype, width in product(DTYPES, (512, 768)):
            x = torch.empty(2, 196, width, dtype=dtype, device="meta")
            keep = torch.empty(2, 49, dtype=torch.int64, device="meta")
            token_gather_backward(token_gather(x, keep), keep, 196)
    return listed
