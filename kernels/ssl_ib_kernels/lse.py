"""Logsumexp of rows . columns / temperature, with InfoNCE's masks, and its gradients, without an N x M tensor.

A row's own column and its group's are left out of the logits where asked for; where not, no kernel code knows of them.

Shapes: N rows, M columns, d width; in the kernels X rows that programs own, Y rows that each walks over, D width.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmax import (
    INFINITY,
    LOG2_E,
    add_product,
    first_unit,
    forward,
    inner_products,
    load_lse,
    load_tile,
    load_vector,
    outside,
    store_tile,
    summed,
)
from .variant import Variant, recording


@triton.jit(do_not_specialize=["X", "Y", "first", "steps"])
def lse_gradient(
    x_pointer,
    y_pointer,
    x_grad_pointer,
    x_lse_pointer,
    y_grad_pointer,
    y_lse_pointer,
    x_self_pointer,
    y_self_pointer,
    x_group_pointer,
    y_group_pointer,
    out_pointer,
    X,
    Y,
    first,
    steps,
    inverse_temperature,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """One part [S, X, D] of the gradient to x: through its own logsumexps, through those of y (x its columns), or both.

    A side whose lse is None has no part in it. first: the number that y_self knows row 0 of x by.
    """
    piece, part = tl.program_id(1), tl.program_id(2)
    x_start = tl.program_id(0) * BLOCK_X
    x_index = x_start + tl.arange(0, BLOCK_X)
    x = load_tile(x_pointer, x_start, X, piece, BLOCK_X, D, BLOCK_D)
    if x_lse_pointer is not None:
        x_lse = load_lse(x_lse_pointer, x_index, X)[:, None]
        x_grad = tl.where(x_lse == INFINITY, 0.0, load_vector(x_grad_pointer, x_index, X, 1))
    x_self = load_vector(x_self_pointer, x_index, X, 1)
    x_group = load_vector(x_group_pointer, x_index, X, 1)
    total = tl.zeros([BLOCK_X, BLOCK_D], dtype=tl.float32)
    unit = first_unit(BLOCK_X, x.dtype)
    start_of_part = part * steps * BLOCK_Y
    for start in range(start_of_part, tl.minimum(start_of_part + steps * BLOCK_Y, Y), BLOCK_Y):
        y_index = start + tl.arange(0, BLOCK_Y)
        y = load_tile(y_pointer, start, Y, piece, BLOCK_Y, D, BLOCK_D)
        products = inner_products(x, y, x_pointer, y_pointer, x_start, start, X, Y, D, STEP)
        logits = products * (inverse_temperature * LOG2_E)
        weights = tl.zeros([BLOCK_X, BLOCK_Y], dtype=tl.float32)
        if x_lse_pointer is not None:
            as_row = tl.exp2(logits + outside(y_index, Y) - x_lse) * x_grad
            if x_self_pointer is not None:
                as_row = tl.where(x_self == y_index[None, :], 0.0, as_row)
            weights += as_row
        if y_lse_pointer is not None:
            y_lse = load_lse(y_lse_pointer, y_index, Y)[None, :]
            y_grad = tl.where(y_lse == INFINITY, 0.0, load_vector(y_grad_pointer, y_index, Y, 0))
            as_column = tl.exp2(logits - y_lse) * y_grad
            if y_self_pointer is not None:
                y_self = load_vector(y_self_pointer, y_index, Y, 0)
                as_column = tl.where(y_self == first + x_index[:, None], 0.0, as_column)
            weights += as_column
        if x_group_pointer is not None:
            weights = tl.where(x_group == load_vector(y_group_pointer, y_index, Y, 0), 0.0, weights)
        total, unit = add_product(total, unit, weights, y)
    total *= (unit * inverse_temperature)[:, None]
    store_tile(out_pointer, total, x_index, X, part, piece, D, BLOCK_D)


def lse(
    rows: Tensor,
    cols: Tensor,
    temperature: float,
    self_index: Tensor | None,
    row_group: Tensor | None,
    col_group: Tensor | None,
    with_mean: bool,
) -> tuple[Tensor, Tensor]:
    """(logsumexp [N], mean column under the softmax [N, d] or empty), both float32, of rows [N, d] and cols [M, d].

    self_index int [N] or None: the column that a row leaves out, -1 for none; row_group int32 [N], col_group int32 [M]
    or None: pairs of equal group are left out, and none without both. A row with nothing left gives -inf and 0.
    """
    return forward(rows, cols, temperature, None, self_index, row_group, col_group, with_mean)[:2]


def lse_backward(
    grad: Tensor,
    lse: Tensor,
    mean: Tensor,
    rows: Tensor,
    cols: Tensor,
    temperature: float,
    self_index: Tensor | None,
    row_group: Tensor | None,
    col_group: Tensor | None,
    want_rows: bool,
    want_cols: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to rows [N, d] and cols [M, d] in their dtype, empty where not wanted; grad float32 [N].

    lse, mean: what the function `lse` gave; without a mean (empty), the rows' gradient walks over the columns again.
    """
    d_rows, d_cols = rows.new_empty(0), cols.new_empty(0)
    if want_rows and mean.shape == rows.shape:
        slope = (grad / temperature).masked_fill(lse == -torch.inf, 0.0)
        d_rows = torch.mul(mean, slope[:, None], out=rows.new_empty(rows.shape))
    elif want_rows:
        sides = {"x": rows, "x_grad": grad, "x_lse": lse, "x_self": self_index, "x_group": row_group}
        d_rows = _gradient(temperature, y=cols, y_group=col_group, **sides)
    if want_cols:
        sides = {"y": rows, "y_grad": grad, "y_lse": lse, "y_self": self_index, "y_group": row_group}
        d_cols = _gradient(temperature, x=cols, x_group=col_group, **sides)
    return d_rows, d_cols


def lse_backward_symmetric(
    rows: Tensor,
    cols: Tensor,
    grad_rows: Tensor,
    lse_rows: Tensor,
    grad_cols: Tensor,
    lse_cols: Tensor,
    temperature: float,
    self_rows: Tensor | None,
    self_cols: Tensor | None,
    row_group: Tensor | None,
    col_group: Tensor | None,
    first: int,
) -> Tensor:
    """The whole gradient [N, d] to rows first .. first + N - 1 of a square problem, whose rows are also its columns.

    cols [M, d]: all of them, so rows == cols[first : first + N]; grad, lse float32 and self int, of the N rows and of
    the M columns as rows. Two matrix products, where the gradients to rows and to columns apart would take four.
    """
    of_rows = {"x": rows, "x_grad": grad_rows, "x_lse": lse_rows, "x_self": self_rows, "x_group": row_group}
    of_cols = {"y": cols, "y_grad": grad_cols, "y_lse": lse_cols, "y_self": self_cols, "y_group": col_group}
    return _gradient(temperature, first, **of_rows, **of_cols)


def _gradient(temperature: float, first: int = 0, **tensors: Tensor | None) -> Tensor:
    x = tensors["x"]
    optional = dict.fromkeys(("x_grad", "x_lse", "x_self", "y_grad", "y_lse", "y_self"))
    return summed(lse_gradient, x.dtype, True, temperature, {"first": first}, **optional | tensors)


def variants(capability: int) -> list[Variant]:
    """What the losses compile: NT-Xent, one way, and siblings left out."""
    widths = ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 256), (torch.float32, 128))
    with recording(capability) as listed:
        for (dtype, width), grouped in product(widths, (False, True)):
            x = torch.empty(20000, width, dtype=dtype, device="meta")
            number = torch.empty(20000, device="meta")
            itself = torch.empty(20000, dtype=torch.int64, device="meta")
            group = torch.empty(20000, dtype=torch.int32, device="meta") if grouped else None
            _, mean = lse(x, x, 0.1, None, group, group, True)
            lse_backward(number, number, mean, x, x, 0.1, None, group, group, True, True)
            lse(x, x, 0.1, itself, group, group, False)
            sides = (number, number, number, number)
            lse_backward_symmetric(x, x, *sides, 0.1, itself, itself, group, group, 0)
    return listed
