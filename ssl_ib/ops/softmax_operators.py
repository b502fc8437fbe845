"""The softmax kernels as torch operators: fake tensors and gradients for every backend but the reference.

`lse` serves InfoNCE and the Gaussian mixture's log-normaliser alike. The mean logit of the positives, which needs no
softmax, is an operator of plain torch, the same for every backend.

Shapes: N rows, M columns, d embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from .backend import function
from .chunked.gather import accumulator, piece, spans
from .gather_operators import apart


@custom_op(
    "ssl_ib::lse",
    mutates_args=(),
    schema="(Tensor rows, Tensor? cols, float temperature, Tensor? self_index, Tensor? row_group, Tensor? col_group, "
    "bool with_mean, str backend) -> (Tensor, Tensor)",
)
def lse(rows, cols, temperature, self_index, row_group, col_group, with_mean, backend):
    """Logsumexp of every row [N], and its mean column [N, d] (empty if not wanted); cols=None are the rows."""
    if cols is None:
        cols, col_group = rows, row_group
    kernel = function("lse", "lse", backend, rows)
    return apart(kernel(rows, cols, temperature, self_index, row_group, col_group, with_mean), (True, with_mean))


@lse.register_fake
def _(rows, cols, temperature, self_index, row_group, col_group, with_mean, backend):
    dtype = accumulator(rows.dtype)
    return rows.new_empty(rows.shape[0], dtype=dtype), rows.new_empty(rows.shape if with_mean else (0,), dtype=dtype)


@custom_op(
    "ssl_ib::lse_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor lse, Tensor mean, Tensor rows, Tensor? cols, float temperature, Tensor? self_index, "
    "Tensor? row_group, Tensor? col_group, bool want_rows, bool want_cols, str backend) -> (Tensor, Tensor)",
)
def lse_backward(
    grad, lse, mean, rows, cols, temperature, self_index, row_group, col_group, want_rows, want_cols, backend
):
    masks = self_index, row_group, col_group
    if cols is not None:
        kernel = function("lse", "lse_backward", backend, rows)
        wanted = want_rows, want_cols
        return apart(kernel(grad, lse, mean, rows, cols, temperature, *masks, *wanted), wanted)
    kernel = function("lse", "lse_backward_symmetric", backend, rows)
    sides, groups = (grad, lse, grad, lse), (row_group, row_group)
    d_rows = kernel(rows, rows, *sides, temperature, self_index, self_index, *groups, 0)
    return d_rows, rows.new_empty(0)


@lse_backward.register_fake
def _(grad, lse, mean, rows, cols, temperature, self_index, row_group, col_group, want_rows, want_cols, backend):
    return (
        rows.new_empty(rows.shape if want_rows else (0,)),
        rows.new_empty((0,) if cols is None or not want_cols else cols.shape),
    )


def _save_lse(ctx, inputs, output):
    rows, cols, ctx.temperature, self_index, row_group, col_group, _, ctx.backend = inputs
    ctx.save_for_backward(*output, rows, cols, self_index, row_group, col_group)
    ctx.mark_non_differentiable(output[1])


def _lse_gradient(ctx, grad, _):
    answer, mean, rows, cols, self_index, row_group, col_group = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    d_rows, d_cols = lse_backward(
        grad, answer, mean, rows, cols, ctx.temperature, self_index, row_group, col_group, *wanted, ctx.backend
    )
    return (d_rows if wanted[0] else None, d_cols if wanted[1] else None, *[None] * 6)


lse.register_autograd(_lse_gradient, setup_context=_save_lse)


@custom_op(
    "ssl_ib::lse_strip_backward",
    mutates_args=(),
    schema="(Tensor rows, Tensor cols, Tensor grad_rows, Tensor lse_rows, Tensor grad_cols, Tensor lse_cols, "
    "float temperature, Tensor? self_rows, Tensor? self_cols, Tensor? row_group, Tensor? col_group, int first, "
    "str backend) -> Tensor",
)
def lse_strip_backward(
    rows, cols, grad_rows, lse_rows, grad_cols, lse_cols, temperature, self_rows, self_cols, row_group, col_group,
    first, backend,
):  # fmt: skip
    """Gradient to some rows of a symmetric problem whose other rows are elsewhere: [N, d]."""
    kernel = function("lse", "lse_backward_symmetric", backend, rows)
    sides, selves, groups = (grad_rows, lse_rows, grad_cols, lse_cols), (self_rows, self_cols), (row_group, col_group)
    return kernel(rows, cols, *sides, temperature, *selves, *groups, first)


@lse_strip_backward.register_fake
def _(rows, cols, grad_rows, lse_rows, grad_cols, lse_cols, temperature, self_rows, self_cols, row_group, col_group,
      first, backend):  # fmt: skip
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@custom_op(
    "ssl_ib::positives",
    mutates_args=(),
    schema="(Tensor rows, Tensor? cols, Tensor row_group, Tensor col_group, Tensor counts, Tensor? self_index, "
    "float temperature) -> Tensor",
)
def positives(rows, cols, row_group, col_group, counts, self_index, temperature):
    """Mean logit of every row's positives [N].

    row_group [N]: in [0, M), the group a row belongs to, or M for none; col_group [M]: in [0, M); counts [N]: columns
    of a row's group but its own; self_index [N]: the column that is the row itself where that is in its group, else -1.
    """
    columns = rows if cols is None else cols
    sums = _group_sums(columns, col_group, len(columns) + 1)
    out = rows.new_empty(len(rows), dtype=sums.dtype)
    for span in spans(len(rows), piece(rows) // max(rows.shape[1], 1)):
        mine = rows[span].to(sums.dtype)
        others = _others(sums, columns, row_group[span], None if self_index is None else self_index[span])
        out[span] = (mine * others).sum(dim=1)
    return out / (counts.clamp(min=1).to(out.dtype) * temperature)


def _group_sums(x: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum of the rows of each group: [num_groups, d]."""
    sums = x.new_zeros(num_groups, x.shape[1], dtype=accumulator(x.dtype))
    for span in spans(len(x), piece(x) // max(x.shape[1], 1)):
        sums.index_add_(0, group[span], x[span].to(sums.dtype))
    return sums


def _others(sums: Tensor, x: Tensor, group: Tensor, self_index: Tensor | None) -> Tensor:
    """The group's sum without the row's own part."""
    others = sums.index_select(0, group)
    if self_index is not None:
        own = x.index_select(0, self_index.clamp(min=0)).to(sums.dtype)
        others -= own.mul_((self_index >= 0)[:, None])
    return others


@positives.register_fake
def _(rows, cols, row_group, col_group, counts, self_index, temperature):
    return rows.new_empty(rows.shape[0], dtype=accumulator(rows.dtype))


@custom_op(
    "ssl_ib::positives_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor? cols, Tensor row_group, Tensor col_group, Tensor counts, "
    "Tensor? self_index, float temperature, bool want_rows, bool want_cols) -> (Tensor, Tensor)",
)
def positives_backward(grad, rows, cols, row_group, col_group, counts, self_index, temperature, want_rows, want_cols):
    columns = rows if cols is None else cols
    slope = grad / (counts.clamp(min=1).to(grad.dtype) * temperature)
    num_groups = len(columns) + 1
    step = piece(rows) // max(rows.shape[1], 1)
    d_rows = rows.new_empty(rows.shape if want_rows else (0,))
    d_cols = rows.new_empty(columns.shape if want_cols else (0,))
    if want_rows:
        sums = _group_sums(columns, col_group, num_groups)
        for span in spans(len(rows), step):
            others = _others(sums, columns, row_group[span], None if self_index is None else self_index[span])
            d_rows[span] = others.mul_(slope[span, None])
    if want_cols:
        sums = rows.new_zeros(num_groups, rows.shape[1], dtype=slope.dtype)
        for span in spans(len(rows), step):
            sums.index_add_(0, row_group[span], rows[span] * slope[span, None])
        own = None
        if self_index is not None:
            own = torch.zeros_like(sums)
            for span in spans(len(rows), step):
                mine = self_index[span]
                weighted = rows[span] * (slope[span] * (mine >= 0))[:, None]
                own.index_add_(0, mine.clamp(min=0), weighted)
        for span in spans(len(columns), step):
            part = sums.index_select(0, col_group[span])
            d_cols[span] = part if own is None else part - own[span]
    return d_rows, d_cols


@positives_backward.register_fake
def _(grad, rows, cols, row_group, col_group, counts, self_index, temperature, want_rows, want_cols):
    columns = rows if cols is None else cols
    return rows.new_empty(rows.shape if want_rows else (0,)), rows.new_empty(columns.shape if want_cols else (0,))


def _save_positives(ctx, inputs, output):
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _positives_gradient(ctx, grad):
    cols = ctx.saved_tensors[1]
    want_rows = ctx.needs_input_grad[0]
    want_cols = want_rows if cols is None else ctx.needs_input_grad[1]
    d_rows, d_cols = positives_backward(grad, *ctx.saved_tensors, ctx.temperature, want_rows, want_cols)
    if cols is None:
        return (d_rows + d_cols if want_rows else None, *[None] * 6)
    return (d_rows if want_rows else None, d_cols if want_cols else None, *[None] * 5)


positives.register_autograd(_positives_gradient, setup_context=_save_positives)
