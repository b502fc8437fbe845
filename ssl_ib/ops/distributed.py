"""The softmax ops over the rows of all processes.

Every process calls with its own share of the rows, which need not be as large as the others', and gets the answer for
these. Gradients are those of the sum of all processes' answers: averaged over R processes, as DDP does, a mean over
each process's equal share becomes the gradient of one process with the whole batch.

Shapes: R processes, n rows of this one, N of all, d embedding, K prototypes of this process.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import distributed
from . import contrastive, mixture
from . import softmax_operators as operators
from .products import operands


def info_nce(
    rows: Tensor,
    cols: Tensor | None,
    row_labels: Tensor,
    col_labels: Tensor | None,
    temperature: float,
    self_index: Tensor | None = None,
    shares: tuple[int, ...] | None = None,
) -> Tensor:
    """`ops.info_nce` of this process's rows [n, d] against the columns of all processes: [n].

    cols [m, d] is this process's share of the columns, or None for the rows; labels name groups across processes;
    self_index [n] numbers this process's own columns. shares: how many columns each process has, where the caller knows
    (asking makes a GPU wait).
    With cols None the gradient of the gathered rows is worked out where they live: processes exchange three numbers
    a row, and no gradient of a column. Otherwise the columns' gradients are sent home and added up.
    Raises UserError for arguments that do not fit.
    """
    if distributed.world_size() == 1:
        return contrastive.info_nce(rows, cols, row_labels, col_labels, temperature, self_index)
    columns, labels = (rows, row_labels) if cols is None else (cols, col_labels)
    shares = shares or distributed.shares(len(columns))
    first = sum(shares[: distributed.rank()])
    everyones = distributed.gather_rows(labels, shares)
    if self_index is not None:
        self_index = torch.where(self_index < 0, self_index, self_index + first)
    backend, _, _ = operands("info_nce", rows, cols)
    if cols is not None or backend == "reference":
        gathered = distributed.gather_rows(columns, shares)
        return contrastive.info_nce(rows, gathered, row_labels, everyones, temperature, self_index)
    contrastive.check("info_nce", rows, None, row_labels, None, temperature, None, None)
    row_labels, everyones = contrastive.labels_of_one_kind(row_labels, everyones)
    return _Symmetric.apply(rows, row_labels, everyones, temperature, self_index, shares, first)


class _Symmetric(torch.autograd.Function):
    """InfoNCE whose columns are the rows of all processes."""

    @staticmethod
    def forward(ctx, rows, labels, everyones, temperature, self_index, shares, first) -> Tensor:
        ctx.backend, rows_in, _ = operands("info_nce", rows, None)
        ctx.dtype, ctx.temperature, ctx.shares, ctx.first = rows.dtype, temperature, shares, first
        cols = distributed.gather_rows(rows_in, shares)
        lse, _, positive, count = operators.lse(
            rows_in, cols, temperature, self_index, labels, everyones, False, False, ctx.backend
        )
        ctx.save_for_backward(rows_in, cols, lse, count, self_index, labels, everyones)
        return (lse - positive).masked_fill_(count == 0, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, cols, lse, count, self_index, labels, everyones = ctx.saved_tensors
        grad = grad.masked_fill(count == 0, 0.0)
        # A row pulls at its positives, and the rows whose positive it is pull at it: what these need is gathered.
        numbers = torch.stack([grad, lse, operators.pull_of(-grad, count)], dim=1)
        theirs = [x.contiguous() for x in distributed.gather_rows(numbers, ctx.shares).unbind(dim=1)]
        selves = None if self_index is None else distributed.gather_rows(self_index, ctx.shares)
        mine = [x.contiguous() for x in numbers.unbind(dim=1)]
        d_rows = operators.lse_strip_backward(
            rows, cols, *mine, *theirs, ctx.temperature, self_index, selves, labels, everyones, False, ctx.first,
            ctx.backend,
        )  # fmt: skip
        return d_rows.to(ctx.dtype), *[None] * 6


def gmm_assign(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    tau_s: float,
    tau_t: float,
    detach_p: bool = False,
    shares: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.gmm_assign` of this process's pairs, with the prototypes spread over the processes: both [n].

    student, teacher [n, d]; prototypes [K, d]: this process's, in any number from 1. Their gradient here is the whole
    gradient: such a parameter is not for DDP to average. shares: how many rows each process has, where the caller
    knows.
    Rows go to all processes, and each sends back its prototypes' part of every row's sums.
    Raises UserError for arguments that do not fit.
    """
    if distributed.world_size() == 1:
        return mixture.gmm_assign(student, teacher, prototypes, tau_s, tau_t, detach_p)
    mixture.check_pairs("gmm_assign", student, teacher)
    shares = shares or distributed.shares(len(student))
    students, teachers = distributed.gather_rows(torch.stack([student, teacher], dim=1), shares).unbind(dim=1)
    lse_s = mixture.gmm_lse(students, prototypes, tau_s)
    lse_t, mean, entropy, _, _ = mixture.posterior(teachers, prototypes, tau_t, None, detach_p, False)
    numbers = distributed.exchange_rows(torch.stack([lse_s, lse_t, entropy], dim=1), shares)
    lse_s, lse_t, entropy = numbers.unbind(dim=2)
    # Each process's prototypes are a component of a mixture of mixtures, with these weights.
    log_weight = lse_t.log_softmax(dim=0)
    weight = log_weight.exp()
    fixed = weight.detach() if detach_p else weight
    mean = (fixed[..., None] * distributed.exchange_rows(mean, shares)).sum(dim=0)
    cross_entropy = lse_s.logsumexp(dim=0) - (student * mean).sum(dim=1) / tau_s
    return cross_entropy, (weight * (entropy - log_weight)).sum(dim=0)
