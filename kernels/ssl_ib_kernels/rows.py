"""What the kernels of the gather family share: tiles of rows, and finding who names a token.

A kernel that writes token l of an image looks for the k with keep[k] == l itself. So nothing is scattered: no pass of
zeros comes first, each number is written once, and sums have one order.

Shapes: K kept tokens of an image, D width of a row, R rows of a tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: What the kernels compute in float32 and store.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: How many of an image's kept tokens are compared at a time.
BLOCK_K = 64

#: Sums over the batch are split until about so many programs run, a few for each multiprocessor of any GPU. A constant,
#: so that the order of a sum depends on the shapes alone.
PROGRAMS = 1024


def row_tile(width: int, numbers: int = 2048) -> dict[str, int]:
    """Constants and warps of a kernel over rows of `width`: tiles of `numbers`, in whole rows up to 1024."""
    block = min(max(triton.next_power_of_2(width), 128), 1024)
    return {"D": width, "ROWS": numbers // block, "BLOCK_D": block, "num_warps": 4, "num_stages": 1}


def strides(x: Tensor) -> dict[str, Any]:
    """A tensor [B, R, D] as a kernel takes it: x (copied if its last dimension is not contiguous), and its strides.

    Strides come in units of their largest common divisor with 16, which is a constant: vectors of up to 16 numbers can
    then be loaded, without a compilation for every stride.
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    unit = math.gcd(x.stride(0), x.stride(1), 16)
    return {"x": x, "stride_image": x.stride(0) // unit, "stride_row": x.stride(1) // unit, "UNIT": unit}


def split(steps: int, programs: int, wanted: int) -> tuple[int, int]:
    """(parts, steps of each part) of a sum over `steps` by `programs` programs a part, about `wanted` in all."""
    each = triton.cdiv(steps, min(max(wanted // programs, 1), steps))
    return triton.cdiv(steps, each), each


@triton.jit
def row_of(x, image, row, stride_image, stride_row, UNIT: tl.constexpr):
    """Pointers [R, 1] to rows of a tensor that `strides` describes; image int64, row int [R]."""
    return x + (image * stride_image + row.to(tl.int64) * stride_row)[:, None] * UNIT


@triton.jit
def load_token(keep, mask, num_tokens):
    """(what keep names, as int32; whether that is one of num_tokens tokens, and the mask is true)."""
    token = tl.load(keep, mask=mask, other=-1)
    return token.to(tl.int32), (token >= 0) & (token < num_tokens)


@triton.jit
def named_at(keep, k, kept):
    """What keep[k] names, as int32; -1 for what int32 cannot hold."""
    named = tl.load(keep + k, mask=k < kept, other=-1)
    if named.dtype == tl.int64:
        named = tl.where((named < 0) | (named > 0x7FFFFFFF), -1, named)
    return named.to(tl.int32)


@triton.jit
def next_namer(keep, kept, token, after, BLOCK_K: tl.constexpr):
    """The smallest k > after with keep[k] == token, and `kept` where there is none: int32, for token and after [R]."""
    found = tl.zeros_like(token) + kept
    for start in range(0, kept, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        named = named_at(keep, k, kept)
        # What lies behind the kept ones is no smaller than `kept`, so it needs no mask.
        hit = (named[None, :] == token[:, None]) & (k[None, :] > after[:, None])
        found = tl.minimum(found, tl.min(tl.where(hit, k[None, :], kept), axis=1))
    return found


@triton.jit
def last_namer(keep, kept, token, BLOCK_K: tl.constexpr):
    """The largest k with keep[k] == token, and -1 where there is none: int32, for token [R]."""
    found = tl.zeros_like(token) - 1
    for start in range(0, kept, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        named = named_at(keep, k, kept)
        hit = (named[None, :] == token[:, None]) & (k < kept)[None, :]
        found = tl.maximum(found, tl.max(tl.where(hit, k[None, :], -1), axis=1))
    return found
