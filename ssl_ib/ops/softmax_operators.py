"""The softmax kernels as torch operators: fake tensors and gradients for every backend but the reference.

`lse` serves InfoNCE and the Gaussian mixture's log-normaliser alike. `own_logits`, one product a row, is plain torch
for every backend.

Shapes: N rows, M columns, d embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from .backend import function
from .chunked.gather import accumulator, spans
from .gather_operators import apart


@custom_op(
    "ssl_ib::lse",
    mutates_args=(),
    schema="(Tensor rows, Tensor? cols, float temperature, Tensor? self_index, Tensor? row_label, Tensor? col_label, "
    "bool drop, bool with_mean, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def lse(rows, cols, temperature, self_index, row_label, col_label, drop, with_mean, backend):
    """Of every row: logsumexp [N], mean column [N, d] (empty if not wanted), mean logit of its positives [N], and their
    number [N] (both empty without labels). cols=None are the rows, and then col_label is not looked at.

    Positives are the columns of the row's label but column self_index; drop leaves them out of the logsumexp.
    """
    if cols is None:
        cols, col_label = rows, row_label
    kernel = function("lse", "lse", backend, rows)
    labelled = row_label is not None and col_label is not None
    answers = kernel(rows, cols, temperature, self_index, row_label, col_label, drop, with_mean)
    return apart(answers, (True, with_mean, labelled, labelled))


@lse.register_fake
def _(rows, cols, temperature, self_index, row_label, col_label, drop, with_mean, backend):
    dtype = accumulator(rows.dtype)
    labelled = row_label is not None and (cols is None or col_label is not None)
    labels = (rows.shape[0],) if labelled else (0,)
    return (
        rows.new_empty(rows.shape[0], dtype=dtype),
        rows.new_empty(rows.shape if with_mean else (0,), dtype=dtype),
        rows.new_empty(labels, dtype=dtype),
        rows.new_empty(labels, dtype=dtype),
    )


@custom_op(
    "ssl_ib::lse_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor lse, Tensor? pull, Tensor mean, Tensor rows, Tensor? cols, float temperature, "
    "Tensor? self_index, Tensor? row_label, Tensor? col_label, bool drop, bool want_rows, bool want_cols, str backend) "
    "-> (Tensor, Tensor)",
)
def lse_backward(
    grad, lse, pull, mean, rows, cols, temperature, self_index, row_label, col_label, drop, want_rows, want_cols,
    backend,
):  # fmt: skip
    """Gradients to rows and cols; pull [N]: the gradient of the positives' mean logit, over their number."""
    if cols is not None:
        kernel = function("lse", "lse_backward", backend, rows)
        masks, wanted = (self_index, row_label, col_label, drop), (want_rows, want_cols)
        return apart(kernel(grad, lse, pull, mean, rows, cols, temperature, *masks, *wanted), wanted)
    kernel = function("lse", "lse_backward_symmetric", backend, rows)
    side = grad, lse, pull
    d_rows = kernel(
        rows, rows, *side, *side, temperature, self_index, self_index, row_label, row_label, drop, 0
    )  # fmt: skip
    return d_rows, rows.new_empty(0)


@lse_backward.register_fake
def _(grad, lse, pull, mean, rows, cols, temperature, self_index, row_label, col_label, drop, want_rows, want_cols,
      backend):  # fmt: skip
    return (
        rows.new_empty(rows.shape if want_rows else (0,)),
        rows.new_empty((0,) if cols is None or not want_cols else cols.shape),
    )


def _save_lse(ctx, inputs, output):
    rows, cols, ctx.temperature, self_index, row_label, col_label, ctx.drop, _, ctx.backend = inputs
    answer, mean, _, count = output
    ctx.save_for_backward(answer, mean, count, rows, cols, self_index, row_label, col_label)
    ctx.mark_non_differentiable(mean, count)
    ctx.set_materialize_grads(False)


def pull_of(d_positive: Tensor, count: Tensor) -> Tensor:
    """What the gradient d_positive [N] of the positives' mean logits gives each of the count [N] logits."""
    return d_positive / count.clamp(min=1)


def _lse_gradient(ctx, grad, d_mean, d_positive, d_count):
    answer, mean, count, rows, cols, self_index, row_label, col_label = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    grad = torch.zeros_like(answer) if grad is None else grad
    pull = None if d_positive is None else pull_of(d_positive, count)
    d_rows, d_cols = lse_backward(
        grad, answer, pull, mean, rows, cols, ctx.temperature, self_index, row_label, col_label,
        ctx.drop, *wanted, ctx.backend,
    )  # fmt: skip
    return (d_rows if wanted[0] else None, d_cols if wanted[1] else None, *[None] * 7)


lse.register_autograd(_lse_gradient, setup_context=_save_lse)


@custom_op(
    "ssl_ib::lse_strip_backward",
    mutates_args=(),
    schema="(Tensor rows, Tensor cols, Tensor grad_rows, Tensor lse_rows, Tensor? pull_rows, Tensor grad_cols, "
    "Tensor lse_cols, Tensor? pull_cols, float temperature, Tensor? self_rows, Tensor? self_cols, Tensor? row_label, "
    "Tensor? col_label, bool drop, int first, str backend) -> Tensor",
)
def lse_strip_backward(
    rows, cols, grad_rows, lse_rows, pull_rows, grad_cols, lse_cols, pull_cols, temperature, self_rows, self_cols,
    row_label, col_label, drop, first, backend,
):  # fmt: skip
    """Gradient to some rows of a symmetric problem whose other rows are elsewhere: [N, d]."""
    kernel = function("lse", "lse_backward_symmetric", backend, rows)
    sides = grad_rows, lse_rows, pull_rows, grad_cols, lse_cols, pull_cols
    return kernel(rows, cols, *sides, temperature, self_rows, self_cols, row_label, col_label, drop, first)


@lse_strip_backward.register_fake
def _(rows, cols, grad_rows, lse_rows, pull_rows, grad_cols, lse_cols, pull_cols, temperature, self_rows, self_cols,
      row_label, col_label, drop, first, backend):  # fmt: skip
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


#: Numbers that `own_logits` holds at once: 4 MiB of float32.
_OWN = 1 << 20


@custom_op("ssl_ib::own_logits", mutates_args=(), schema="(Tensor rows, Tensor own, float temperature) -> Tensor")
def own_logits(rows, own, temperature):
    """Each row's product with its own column, over the temperature: rows [N, d], own [N, d] -> [N]."""
    out = rows.new_empty(len(rows), dtype=accumulator(rows.dtype))
    for span in spans(len(rows), _OWN // max(rows.shape[1], 1)):
        torch.sum(rows[span].to(out.dtype) * own[span], dim=1, out=out[span])
    return out.div_(temperature)


@own_logits.register_fake
def _(rows, own, temperature):
    return rows.new_empty(rows.shape[0], dtype=accumulator(rows.dtype))


@custom_op(
    "ssl_ib::own_logits_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor own, float temperature, bool want_rows, bool want_own) "
    "-> (Tensor, Tensor)",
)
def own_logits_backward(grad, rows, own, temperature, want_rows, want_own):
    slope = (grad / temperature)[:, None]

    def scaled(x, like):
        # Computed in the dtype of the slope, and rounded as it is written.
        return torch.mul(x, slope, out=torch.empty_like(like, memory_format=torch.contiguous_format))

    return scaled(own, rows) if want_rows else rows.new_empty(0), scaled(rows, own) if want_own else own.new_empty(0)


@own_logits_backward.register_fake
def _(grad, rows, own, temperature, want_rows, want_own):
    return rows.new_empty(rows.shape if want_rows else (0,)), own.new_empty(own.shape if want_own else (0,))


def _save_own_logits(ctx, inputs, output):
    rows, own, ctx.temperature = inputs
    ctx.save_for_backward(rows, own)


def _own_logits_gradient(ctx, grad):
    wanted = ctx.needs_input_grad[:2]
    both = own_logits_backward(grad, *ctx.saved_tensors, ctx.temperature, *wanted)
    return (*(x if want else None for x, want in zip(both, wanted, strict=True)), None)


own_logits.register_autograd(_own_logits_gradient, setup_context=_save_own_logits)
