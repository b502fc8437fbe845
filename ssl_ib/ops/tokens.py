"""Dropping hidden tokens, and putting mask tokens in their place.

Shapes: B batch, L tokens (one a patch), K kept, P prefix tokens (class token), D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from . import gather_operators as operators
from .backend import check_range, choose, ran
from .chunked.gather import last_place


def check_keep(op: str, keep: Tensor, batch: int, num_tokens: int) -> None:
    """Raises UserError unless keep is an integer [batch, K] of numbers in [0, num_tokens)."""
    if keep.ndim != 2 or len(keep) != batch or keep.dtype not in (torch.int32, torch.int64):
        raise UserError(f"{op}: expected keep to be integers [{batch}, K], got {keep.dtype} {list(keep.shape)}")
    check_range(op, "keep", keep, 0, num_tokens)


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
    backend = choose("token_gather", x, keep.numel() * x.shape[2])
    return _token_gather(x, keep) if backend == "reference" else operators.token_gather(x, keep, backend)


def _token_gather(x: Tensor, keep: Tensor) -> Tensor:
    ran("token_gather", "reference")
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

    latents [B, P+K, D] (P = num_prefix tokens pass through in front), keep int [B, K] with values in [0, L),
    mask_token [D], L = num_tokens, pos [P+L, D] or None -> [B, P+L, D] in the dtype of latents. Where keep names a
    token twice, the later place counts.
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
    backend = choose("token_scatter", latents, len(latents) * (num_prefix + num_tokens) * width)
    run = _token_scatter if backend == "reference" else partial(operators.token_scatter, backend=backend)
    return run(latents, keep, mask_token, num_tokens, pos, num_prefix)


def _token_scatter(
    latents: Tensor, keep: Tensor, mask_token: Tensor, num_tokens: int, pos: Tensor | None, num_prefix: int
) -> Tensor:
    ran("token_scatter", "reference")
    place = last_place(keep, num_tokens)
    if keep.shape[1]:
        visible = latents[:, num_prefix:][batch_rows(keep), place.clamp(min=0)]
        # Float32 parameters must not promote a bfloat16 stream.
        tokens = torch.where((place >= 0)[..., None], visible, mask_token.to(latents.dtype))
    else:
        tokens = mask_token.to(latents.dtype).expand(len(latents), num_tokens, -1)
    full = torch.cat([latents[:, :num_prefix], tokens], dim=1)
    return full if pos is None else full + pos.to(latents.dtype)
