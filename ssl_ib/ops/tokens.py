"""Dropping hidden tokens, and putting mask tokens in their place.

Shapes: B batch, L tokens (one a patch), K kept, P prefix tokens (class token), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from . import backend
from .backend import check_range, implementation, implements


def check_keep(op: str, keep: Tensor, batch: int, num_tokens: int) -> None:
    """Raises UserError unless keep is an integer [batch, K] of numbers in [0, num_tokens), without repeats in a row.

    Repeats are looked for only under SSL_IB_OPS_CHECK=1.
    """
    if keep.ndim != 2 or len(keep) != batch or keep.dtype not in (torch.int32, torch.int64):
        raise UserError(f"{op}: expected keep to be integers [{batch}, K], got {keep.dtype} {list(keep.shape)}")
    check_range(op, "keep", keep, 0, num_tokens)
    if backend.THOROUGH and (keep.sort(dim=1).values.diff(dim=1) == 0).any():
        raise UserError(f"{op}: expected keep to name a token once a row, got repeats")


def batch_rows(keep: Tensor) -> Tensor:
    """[B, 1]: with keep [B, K], the index of the kept entries of a [B, L, ...] tensor."""
    return torch.arange(len(keep), device=keep.device)[:, None]


def token_gather(x: Tensor, keep: Tensor) -> Tensor:
    """The kept tokens: x [B, L, D], keep int [B, K] with values in [0, L) -> [B, K, D].

    Raises UserError for shapes that do not fit and, on the CPU, for numbers out of range.
    """
    if x.ndim != 3:
        raise UserError(f"token_gather: expected x [B, L, D], got {list(x.shape)}")
    check_keep("token_gather", keep, x.shape[0], x.shape[1])
    return implementation("token_gather")(x, keep)


@implements("token_gather", "reference")
def _token_gather(x: Tensor, keep: Tensor) -> Tensor:
    return x[batch_rows(keep), keep]


def token_scatter(
    latents: Tensor,
    keep: Tensor,
    mask_token: Tensor,
    num_tokens: int,
    pos: Tensor | None = None,
    num_prefix: int = 0,
) -> Tensor:
    """A decoder's input: kept tokens in their places, mask tokens in the others, positions added.

    latents [B, P+K, D] (P = num_prefix tokens pass through in front), keep int [B, K] with values in [0, L) and
    without repeats, mask_token [D], L = num_tokens, pos [P+L, D] or None -> [B, P+L, D] in the dtype of latents.
    Raises UserError for shapes that do not fit and, on the CPU, for numbers out of range.
    """
    width = latents.shape[-1]
    if latents.ndim != 3 or keep.ndim != 2 or latents.shape[1] != num_prefix + keep.shape[1]:
        raise UserError(
            f"token_scatter: expected latents [B, P+K, D] with P = {num_prefix} prefix tokens and keep [B, K], "
            f"got {list(latents.shape)} and {list(keep.shape)}"
        )
    if mask_token.shape != (width,):
        raise UserError(f"token_scatter: expected mask_token [{width}], got {list(mask_token.shape)}")
    if pos is not None and pos.shape != (num_prefix + num_tokens, width):
        raise UserError(f"token_scatter: expected pos [{num_prefix + num_tokens}, {width}], got {list(pos.shape)}")
    check_keep("token_scatter", keep, latents.shape[0], num_tokens)
    return implementation("token_scatter")(latents, keep, mask_token, num_tokens, pos, num_prefix)


@implements("token_scatter", "reference")
def _token_scatter(
    latents: Tensor, keep: Tensor, mask_token: Tensor, num_tokens: int, pos: Tensor | None, num_prefix: int
) -> Tensor:
    batch, _, width = latents.shape
    prefix = torch.arange(num_prefix, device=keep.device).expand(batch, -1)
    places = torch.cat([prefix, keep + num_prefix], dim=1)
    # Float32 parameters must not promote a bfloat16 stream.
    blank = mask_token.to(latents.dtype).expand(batch, num_prefix + num_tokens, width)
    full = blank.index_put((batch_rows(keep), places), latents)
    return full if pos is None else full + pos.to(latents.dtype)
