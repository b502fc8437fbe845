"""Gradient reversal: what lets one backward minimise a loss in some parameters and maximise it in others."""

from __future__ import annotations

import torch
from torch import Tensor


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


def reverse(x: Tensor, factor: float = 1.0) -> Tensor:
    """x itself, whose gradient comes back times -factor (Ganin and Lempitsky, 2015)."""
    return _Reversal.apply(x, factor)
