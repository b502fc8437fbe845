"""Logsumexp of rows . columns / temperature with InfoNCE's positives, and their gradients, without an N x M tensor.

Row n has the logits l[n, m] = rows[n] . cols[m] / temperature of all columns but self[n]. Its positives P(n) are those
of them with its label. What is answered for every row, and what the gradient of these answers is:

    lse[n]      = log sum_m exp l[n, m], over the columns that are no positives where drop says so
    positive[n] = the mean of l[n, m] over P(n), and 0 without positives
    dl[n, m]    = grad[n] exp(l[n, m] - lse[n]) + pull[n] [m in P(n)]

with grad the gradient of lse, and pull that of positive over the number of positives. Without labels no row has
positives, and no kernel code knows of them; the same holds for the self index.

Shapes: N rows, M columns, d width; in the kernels X rows that programs own, Y rows that each walks over, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmax import (
    INFINITY,
    LOG2_E,
    add_product,
    dot,
    first_unit,
    forward,
    inner_products,
    label_range,
    launch_walk,
    load_index,
    load_lse,
    load_tile,
    load_vector,
    meet,
    outside,
    same_label,
    store_tile,
    summed,
)
from .tiling import grid, tiles
from .variant import Variant, recording

#: Rows of y that are looked at together for positives, as many as a product takes at least: a walk's sums leave few
#: registers for more.
FEW: tl.constexpr = tl.constexpr(16)


@triton.jit
def positive_pairs(x_label, x_self, y_label, y_index, Y):
    """[BLOCK_X, BLOCK_Y]: where y is a positive of x; x_self [BLOCK_X, 1]: the y that x does not see, None for none."""
    same = same_label(x_label, y_label, y_index < Y)
    if x_self is not None:
        same = same & (x_self != y_index[None, :])
    return same


@triton.jit(do_not_specialize=["X", "Y", "steps"])
def positives(
    x_pointer,
    y_pointer,
    self_pointer,
    x_label_pointer,
    y_label_pointer,
    out_pointer,
    X,
    Y,
    steps,
    inverse_temperature,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """One part of the sum of every row's positive logits, and of their number: out [S, 2, X]. y is read only where a
    tile holds positives.
    """
    part = tl.program_id(2)
    x_start = tl.program_id(0) * BLOCK_X
    x_index = x_start + tl.arange(0, BLOCK_X)
    x = load_tile(x_pointer, x_start, X, 0, BLOCK_X, D, BLOCK_D)
    total = tl.zeros([BLOCK_X], dtype=tl.float32)
    count = tl.zeros([BLOCK_X], dtype=tl.float32)
    own = load_index(self_pointer, x_index, X, 1)
    x_label = tl.load(x_label_pointer + x_index, mask=x_index < X, other=0)
    low, high = label_range(x_label, x_index < X)
    first = part * steps * BLOCK_Y
    for start in range(first, tl.minimum(first + steps * BLOCK_Y, Y), BLOCK_Y):
        y_index = start + tl.arange(0, BLOCK_Y)
        y_label = tl.load(y_label_pointer + y_index, mask=y_index < Y, other=0)
        if meet(low, high, y_label, y_index < Y):
            same = positive_pairs(x_label, own, y_label, y_index, Y)
            here = tl.sum(same.to(tl.float32), axis=1)
            if tl.max(here, axis=0) > 0:
                y = load_tile(y_pointer, start, Y, 0, BLOCK_Y, D, BLOCK_D)
                products = inner_products(x, y, x_pointer, y_pointer, x_start, start, X, Y, D, STEP)
                total += tl.sum(tl.where(same, products, 0.0), axis=1)
                count += here
    row = tl.cast(part, tl.int64) * (2 * X) + x_index
    tl.store(out_pointer + row, total * inverse_temperature, mask=x_index < X)
    tl.store(out_pointer + row + X, count, mask=x_index < X)


@triton.jit
def add_pull(
    total,
    unit,
    x_pointer,
    y_pointer,
    x_pull_pointer,
    y_pull_pointer,
    x_self_pointer,
    y_self_pointer,
    x_label_pointer,
    y_label_pointer,
    X,
    Y,
    first,
    steps,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds one part of what positives give x to a sum kept as total * unit[:, None]; returns both.

    x[i] gets y[j] where one is a positive of the other, times the pull of the one that it is a positive of.
    """
    piece, part = tl.program_id(1), tl.program_id(2)
    x_index = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    x_label = tl.load(x_label_pointer + x_index, mask=x_index < X, other=0)
    low, high = label_range(x_label, x_index < X)
    start_of_part = part * steps * BLOCK_Y
    for start in range(start_of_part, tl.minimum(start_of_part + steps * BLOCK_Y, Y), FEW):
        y_index = start + tl.arange(0, FEW)
        y_label = tl.load(y_label_pointer + y_index, mask=y_index < Y, other=0)
        if meet(low, high, y_label, y_index < Y):
            same = same_label(x_label, y_label, y_index < Y)
            if tl.max(tl.max(same.to(tl.int32), axis=1), axis=0) > 0:
                weights = tl.zeros([BLOCK_X, FEW], dtype=tl.float32)
                if x_pull_pointer is not None:
                    x_pull = tl.where(same, load_vector(x_pull_pointer, x_index, X, 1), 0.0)
                    if x_self_pointer is not None:
                        x_self = load_index(x_self_pointer, x_index, X, 1)
                        x_pull = tl.where(x_self == y_index[None, :], 0.0, x_pull)
                    weights += x_pull
                if y_pull_pointer is not None:
                    y_pull = tl.where(same, load_vector(y_pull_pointer, y_index, Y, 0), 0.0)
                    if y_self_pointer is not None:
                        y_self = load_index(y_self_pointer, y_index, Y, 0)
                        y_pull = tl.where(y_self == first + x_index[:, None], 0.0, y_pull)
                    weights += y_pull
                y = load_tile(y_pointer, start, Y, piece, FEW, D, BLOCK_D)
                # Positives are few and weigh much: what rounding their weights leaves is added too.
                total, unit = add_product(total, unit, weights, y)
                if y.dtype == tl.bfloat16:
                    total, unit = add_product(total, unit, weights - weights.to(y.dtype).to(tl.float32), y)
    return total, unit


@triton.jit(do_not_specialize=["X", "Y", "first", "steps"])
def lse_gradient(
    x_pointer,
    y_pointer,
    x_grad_pointer,
    x_lse_pointer,
    x_pull_pointer,
    y_grad_pointer,
    y_lse_pointer,
    y_pull_pointer,
    x_self_pointer,
    y_self_pointer,
    x_label_pointer,
    y_label_pointer,
    x_drop_pointer,
    y_drop_pointer,
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
    """One part [S, X, D] of the gradient to x: through its own answers, through those of y (x its columns), or both.

    A side whose lse is None has no part in it, one whose pull is None no gradient of its positives. Pairs of one label
    in x_drop and y_drop are left out of lse. first: the number that y_self knows row 0 of x by.
    """
    piece, part = tl.program_id(1), tl.program_id(2)
    x_start = tl.program_id(0) * BLOCK_X
    x_index = x_start + tl.arange(0, BLOCK_X)
    x = load_tile(x_pointer, x_start, X, piece, BLOCK_X, D, BLOCK_D)
    if x_lse_pointer is not None:
        x_lse = load_lse(x_lse_pointer, x_index, X)[:, None]
        x_grad = tl.where(x_lse == INFINITY, 0.0, load_vector(x_grad_pointer, x_index, X, 1))
    x_self = load_index(x_self_pointer, x_index, X, 1)
    if x_drop_pointer is not None:
        x_label = tl.load(x_drop_pointer + x_index, mask=x_index < X, other=0)
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
                y_self = load_index(y_self_pointer, y_index, Y, 0)
                as_column = tl.where(y_self == first + x_index[:, None], 0.0, as_column)
            weights += as_column
        if x_drop_pointer is not None:
            y_label = tl.load(y_drop_pointer + y_index, mask=y_index < Y, other=0)
            weights = tl.where(x_label[:, None] == y_label[None, :], 0.0, weights)
        total, unit = add_product(total, unit, weights, y)
    if x_label_pointer is not None:
        total, unit = add_pull(
            total, unit, x_pointer, y_pointer, x_pull_pointer, y_pull_pointer, x_self_pointer, y_self_pointer,
            x_label_pointer, y_label_pointer, X, Y, first, steps, D, BLOCK_X, BLOCK_Y, BLOCK_D,
        )  # fmt: skip
    total *= (unit * inverse_temperature)[:, None]
    store_tile(out_pointer, total, x_index, X, part, piece, D, BLOCK_D)


@triton.jit(do_not_specialize=["X", "Y", "steps"])
def gradient_from_mean(
    x_pointer,
    y_pointer,
    x_mean_pointer,
    x_grad_pointer,
    x_lse_pointer,
    x_pull_pointer,
    x_self_pointer,
    x_label_pointer,
    y_label_pointer,
    out_pointer,
    X,
    Y,
    steps,
    inverse_temperature,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """One part [S, X, D] of the gradient to x through its own answers, where the mean of y by its softmax is known:
    (grad mean + pull times the sum of its positives) / temperature. Only tiles that may hold positives are read.
    """
    piece, part = tl.program_id(1), tl.program_id(2)
    x_start = tl.program_id(0) * BLOCK_X
    x_index = x_start + tl.arange(0, BLOCK_X)
    total = tl.zeros([BLOCK_X, BLOCK_D], dtype=tl.float32)
    if x_pull_pointer is not None:
        x_self = load_index(x_self_pointer, x_index, X, 1)
        x_label = tl.load(x_label_pointer + x_index, mask=x_index < X, other=0)
        low, high = label_range(x_label, x_index < X)
        first = part * steps * BLOCK_Y
        for start in range(first, tl.minimum(first + steps * BLOCK_Y, Y), BLOCK_Y):
            y_index = start + tl.arange(0, BLOCK_Y)
            y_label = tl.load(y_label_pointer + y_index, mask=y_index < Y, other=0)
            if meet(low, high, y_label, y_index < Y):
                same = positive_pairs(x_label, x_self, y_label, y_index, Y)
                if tl.max(tl.max(same.to(tl.int32), axis=1), axis=0) > 0:
                    y = load_tile(y_pointer, start, Y, piece, BLOCK_Y, D, BLOCK_D)
                    total = dot(tl.where(same, 1.0, 0.0).to(y.dtype), y, total)
        total *= load_vector(x_pull_pointer, x_index, X, 1)
    if part == 0:
        x_lse = load_lse(x_lse_pointer, x_index, X)[:, None]
        x_grad = tl.where(x_lse == INFINITY, 0.0, load_vector(x_grad_pointer, x_index, X, 1))
        total += load_tile(x_mean_pointer, x_start, X, piece, BLOCK_X, D, BLOCK_D) * x_grad
    store_tile(out_pointer, total * inverse_temperature, x_index, X, part, piece, D, BLOCK_D)


def lse(
    rows: Tensor,
    cols: Tensor,
    temperature: float,
    self_index: Tensor | None,
    row_label: Tensor | None,
    col_label: Tensor | None,
    drop: bool,
    with_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse [N], mean column under the softmax [N, d] or empty, positive [N], number of positives [N]), all float32, of
    rows [N, d] and cols [M, d]; the last two are empty without labels.

    self_index int [N] or None: the column that a row does not see, one out of range for none; row_label [N] and
    col_label [M], both int32 or both int64, or None. drop: positives are left out of lse. A row with nothing left has
    lse -inf and mean 0.
    """
    labels = row_label, col_label
    lse, mean, _ = forward(rows, cols, temperature, None, self_index, *labels if drop else (None, None), with_mean)
    if row_label is None or col_label is None:
        return lse, mean, lse.new_empty(0), lse.new_empty(0)
    return lse, mean, *_positives(rows, cols, temperature, self_index, *labels)


def _positives(
    rows: Tensor, cols: Tensor, temperature: float, self_index: Tensor | None, row_label: Tensor, col_label: Tensor
) -> tuple[Tensor, Tensor]:
    """(mean logit of the positives, 0 where there are none; their number), float32 [N] each."""
    sizes = tiles("positives", rows.dtype, rows.shape[1], rows.device)
    if len(rows) == 0 or len(cols) == 0:
        return torch.zeros(len(rows), device=rows.device), torch.zeros(len(rows), device=rows.device)
    walk = grid(len(rows), len(cols), 0, sizes, rows.device)
    parts = torch.empty(walk.parts, 2, len(rows), device=rows.device)
    tensors = {"self": self_index, "x_label": row_label, "y_label": col_label, "out": parts}
    launch_walk(positives, walk, sizes, temperature, x=rows, y=cols, **tensors)
    total, count = parts.sum(dim=0) if walk.parts > 1 else parts[0]
    return total / count.clamp(min=1), count


def lse_backward(
    grad: Tensor,
    lse: Tensor,
    pull: Tensor | None,
    mean: Tensor,
    rows: Tensor,
    cols: Tensor,
    temperature: float,
    self_index: Tensor | None,
    row_label: Tensor | None,
    col_label: Tensor | None,
    drop: bool,
    want_rows: bool,
    want_cols: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to rows [N, d] and cols [M, d] in their dtype, empty where not wanted.

    grad float32 [N]: the gradient of lse; pull float32 [N] or None: that of positive, over the number of positives;
    lse, mean: what the function `lse` gave. Without a mean (empty) the rows' gradient computes the logits again.
    """
    d_rows, d_cols = rows.new_empty(0), cols.new_empty(0)
    row = {"grad": grad, "lse": lse, "pull": pull, "self": self_index, "label": row_label}
    labelled = row_label is not None and col_label is not None
    if want_rows and mean.shape == rows.shape:
        of_rows = _side("x", row) | {"x_pull": pull if labelled else None, "y_label": col_label, "x_mean": mean}
        # Without a pull no column is read.
        y = cols if of_rows["x_pull"] is not None else cols[:1]
        d_rows = summed(gradient_from_mean, rows.dtype, True, temperature, x=rows, y=y, **of_rows)
    elif want_rows:
        d_rows = _gradient(temperature, drop, x=rows, y=cols, y_label=col_label, **_side("x", row))
    if want_cols:
        d_cols = _gradient(temperature, drop, x=cols, y=rows, x_label=col_label, **_side("y", row))
    return d_rows, d_cols


def lse_backward_symmetric(
    rows: Tensor,
    cols: Tensor,
    grad_rows: Tensor,
    lse_rows: Tensor,
    pull_rows: Tensor | None,
    grad_cols: Tensor,
    lse_cols: Tensor,
    pull_cols: Tensor | None,
    temperature: float,
    self_rows: Tensor | None,
    self_cols: Tensor | None,
    row_label: Tensor | None,
    col_label: Tensor | None,
    drop: bool,
    first: int,
) -> Tensor:
    """The whole gradient [N, d] to rows first .. first + N - 1 of a square problem, whose rows are also its columns.

    cols [M, d]: all of them, so rows == cols[first : first + N]; grad, lse, pull float32 and self int, of the N rows
    and of the M columns as rows. Two matrix products, where the gradients to rows and to columns apart would take four.
    """
    of_rows = {"grad": grad_rows, "lse": lse_rows, "pull": pull_rows, "self": self_rows, "label": row_label}
    of_cols = {"grad": grad_cols, "lse": lse_cols, "pull": pull_cols, "self": self_cols, "label": col_label}
    return _gradient(temperature, drop, first, x=rows, y=cols, **_side("x", of_rows), **_side("y", of_cols))


def _side(name: str, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {f"{name}_{key}": tensor for key, tensor in tensors.items()}


def _gradient(temperature: float, drop: bool, first: int = 0, **tensors: Tensor | None) -> Tensor:
    x = tensors["x"]
    optional = dict.fromkeys(f"{side}_{name}" for side in "xy" for name in ("grad", "lse", "pull", "self"))
    labelled = tensors["x_label"] is not None and tensors["y_label"] is not None
    optional |= {f"{side}_drop": tensors[f"{side}_label"] if drop and labelled else None for side in "xy"}
    if not labelled or all(tensors.get(name) is None for name in ("x_pull", "y_pull")):
        tensors |= dict.fromkeys(("x_pull", "y_pull", "x_label", "y_label"))
    return summed(lse_gradient, x.dtype, True, temperature, {"first": first}, **optional | tensors)


def variants(capability: int) -> list[Variant]:
    """What the losses compile: NT-Xent, one way with and without positives left out, a queue, a mixture."""
    widths = ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 256), (torch.float32, 128))
    with recording(capability) as listed:
        for dtype, width in widths:
            x = torch.empty(20000, width, dtype=dtype, device="meta")
            y = torch.empty(20000, width, dtype=dtype, device="meta")
            number = torch.empty(20000, device="meta")
            itself = torch.empty(20000, dtype=torch.int64, device="meta")
            sides = (number, number, number, number, number, number)
            for label, drop in ((None, False), (itself, False), (itself, True)):
                mean = lse(x, y, 0.1, None, label, label, drop, True)[1]
                pull = None if label is None else number
                lse_backward(number, number, pull, mean, x, y, 0.1, None, label, label, drop, True, True)
                if label is not None:
                    lse(x, x, 0.1, itself, label, label, drop, False)
                    lse_backward_symmetric(x, x, *sides, 0.1, itself, itself, label, label, drop, 0)
    return listed
