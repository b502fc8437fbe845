"""What the operators cost, in floating-point operations, for torch's counter and for `ssl_ib.flops`.

Products alone count, two operations a multiply-add, as torch counts its own operators, and where mathematics needs
them: a gradient's products are its operator's, also where a kernel makes them in the forward pass, and what a kernel
computes once more counts nothing. So every backend costs what the reference does, but for gradients that ask an
operator twice: that of a mixture's marginal, and those of `crops` where its teacher learns. An operator that is not
here (gathers, sums of positives, errors of patches, views) has no product and counts nothing.

Shapes: N rows, M columns or prototypes, d embedding, B images, K kept patches, D width, C channels, p patch side.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..flops import BACKWARD
from . import gather_operators, mixture_operators, softmax_operators  # noqa: F401 (they make the operators)

_ops = torch.ops.ssl_ib


def _by_name(operator: Any, formula: Callable[[SimpleNamespace], int]) -> Callable[..., int]:
    """The formula, of the operator's arguments by their names."""
    names = [argument.name for argument in operator.default._schema.arguments]

    def count(*arguments: Any, out_val: Any = None, **named: Any) -> int:
        return formula(SimpleNamespace(**dict(zip(names, arguments, strict=False)), **named))

    return count


def _counts(operator: Any) -> Callable[[Callable[[SimpleNamespace], int]], Callable[[SimpleNamespace], int]]:
    """Registers the operations of an operator."""

    def register(formula: Callable[[SimpleNamespace], int]) -> Callable[[SimpleNamespace], int]:
        register_flop_formula(operator, get_raw=True)(_by_name(operator, formula))
        return formula

    return register


def _backward(operator: Any) -> Callable[[Callable[[SimpleNamespace], int]], Callable[[SimpleNamespace], int]]:
    """Registers the operations of an operator's backward, by its arguments and which of them need gradients."""

    def register(formula: Callable[[SimpleNamespace], int]) -> Callable[[SimpleNamespace], int]:
        BACKWARD[operator] = _by_name(operator, formula)
        return formula

    return register


def _product(rows: Tensor, cols: Tensor | None) -> int:
    """All rows with all columns (None: the rows), one product [N, d] x [d, M]."""
    return 2 * len(rows) * len(rows if cols is None else cols) * rows.shape[1]


@_counts(_ops.lse)
def _lse(given: SimpleNamespace) -> int:
    return _product(given.rows, given.cols)


@_backward(_ops.lse)
def _of_lse(given: SimpleNamespace) -> int:
    needed = given.rows.requires_grad + (given.rows if given.cols is None else given.cols).requires_grad
    return _product(given.rows, given.cols) * needed


@_counts(_ops.lse_backward)
def _lse_backward(given: SimpleNamespace) -> int:
    # Rows that are the columns have a gradient as both.
    needed = 2 if given.cols is None else given.want_rows + given.want_cols
    return _product(given.rows, given.cols) * needed


@_counts(_ops.lse_strip_backward)
def _lse_strip_backward(given: SimpleNamespace) -> int:
    return _product(given.rows, given.cols) * 2


@_counts(_ops.posterior)
def _posterior(given: SimpleNamespace) -> int:
    # The logits, and the mean prototype.
    return _product(given.t, given.c) * 2


@_backward(_ops.posterior)
def _of_posterior(given: SimpleNamespace) -> int:
    """Of a loss that reads all answers."""
    t, c = given.t.requires_grad, given.c.requires_grad
    # The prototypes have a gradient of the logits and one of the mean; the posterior has one of the mean.
    return _product(given.t, given.c) * (t + 2 * c + ((t or c) and not given.detach_p))


@_counts(_ops.posterior_backward)
def _posterior_backward(given: SimpleNamespace) -> int:
    logits = any(slope is not None for slope in (given.r, given.h, given.a, given.e, given.w))
    needed = given.want_t * logits + given.want_c * (logits + (given.v is not None))
    return _product(given.t, given.c) * (needed + (given.a is not None and (given.want_t or given.want_c)))


@_counts(_ops.add_posterior_backward)
def _add_posterior_backward(given: SimpleNamespace) -> int:
    return _posterior_backward(SimpleNamespace(**{**vars(given), "want_t": False, "want_c": True}))


@_counts(_ops.crops)
def _crops(given: SimpleNamespace) -> int:
    return _product(given.s, given.c) + _posterior(given)


@_backward(_ops.crops)
def _of_crops(given: SimpleNamespace) -> int:
    return _product(given.s, given.c) * (given.s.requires_grad + given.c.requires_grad) + _of_posterior(given)


@_counts(_ops.patch_embed_gather)
def _patch_embed_gather(given: SimpleNamespace) -> int:
    return 2 * given.keep.numel() * given.weight.numel()


@_backward(_ops.patch_embed_gather)
def _of_patch_embed_gather(given: SimpleNamespace) -> int:
    return _patch_embed_gather(given) * (given.images.requires_grad + given.weight.requires_grad)


@_counts(_ops.patch_embed_gather_backward)
def _patch_embed_gather_backward(given: SimpleNamespace) -> int:
    return _patch_embed_gather(given) * (given.want_images + given.want_weight)
