"""InfoNCE's positives in plain torch, by sums over the columns of each label: nothing of size N x M.

Row n's positives are the columns of its label but column self_index[n]. Their mean logit is the row's product with the
sum of those columns over their number and the temperature; so is its gradient.

Shapes: N rows, M columns, d embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gather import accumulator, piece, spans


class Groups:
    """Labels as numbers of groups, found by sorting, and without waiting for a GPU.

    rows [N], cols [M]: int32, the group a row's positives are in; a row without any has the number M.
    counts [N]: a row's positives, without itself. own [N]: the column that a row does not see where it is of its label,
    else -1; None where rows see all.
    """

    def __init__(self, row_label: Tensor, col_label: Tensor, self_index: Tensor | None):
        num_cols = len(col_label)
        ordered = col_label.sort().values
        first, after = torch.searchsorted(ordered, row_label), torch.searchsorted(ordered, row_label, right=True)
        self.counts = after - first
        self.rows = first.masked_fill(self.counts == 0, num_cols).int()
        self.cols = torch.searchsorted(ordered, col_label).int()
        self.own = None
        if self_index is not None and num_cols:
            inside = self_index.clamp(0, num_cols - 1).long()
            among = (self_index == inside) & (col_label[inside] == row_label)
            self.own = self_index.masked_fill(~among, -1)
            self.counts = self.counts - among.long()


def mean_logits(groups: Groups, rows: Tensor, cols: Tensor, temperature: float) -> Tensor:
    """Mean logit of every row's positives [N], 0 where there are none."""
    sums = _sums(cols, groups.cols, None, len(cols) + 1)
    out = rows.new_empty(len(rows), dtype=sums.dtype)
    for span in _spans(rows):
        mine = rows[span].to(sums.dtype)
        out[span] = (mine * _others(groups, sums, cols, span)).sum(dim=1)
    return out / (groups.counts.clamp(min=1).to(out.dtype) * temperature)


def pull_rows(d_rows: Tensor, groups: Groups, cols: Tensor, pull: Tensor) -> None:
    """Adds to d_rows [N, d] what their positives give them, of which each has the weight pull [N]."""
    sums = _sums(cols, groups.cols, None, len(cols) + 1)
    for span in _spans(d_rows):
        d_rows[span].addcmul_(_others(groups, sums, cols, span), pull[span, None])


def pull_cols(d_cols: Tensor, groups: Groups, rows: Tensor, pull: Tensor) -> None:
    """Adds to d_cols [M, d] what the rows give them whose positives they are."""
    sums = _sums(rows, groups.rows, pull, len(d_cols) + 1)
    own = None
    if groups.own is not None:
        own = _sums(rows, groups.own.clamp(min=0), pull * (groups.own >= 0), len(d_cols))
    for span in _spans(d_cols):
        d_cols[span] += sums.index_select(0, groups.cols[span])
        if own is not None:
            d_cols[span] -= own[span]


def _spans(x: Tensor):
    return spans(len(x), piece(x) // max(x.shape[1], 1))


def _sums(x: Tensor, group: Tensor, weight: Tensor | None, num_groups: int) -> Tensor:
    """Sum of the rows of each group, each by its weight: [num_groups, d]."""
    sums = x.new_zeros(num_groups, x.shape[1], dtype=accumulator(x.dtype))
    for span in _spans(x):
        some = x[span].to(sums.dtype)
        sums.index_add_(0, group[span], some if weight is None else some * weight[span, None])
    return sums


def _others(groups: Groups, sums: Tensor, cols: Tensor, span: slice) -> Tensor:
    """The sum of each row's group without the column that the row does not see: [rows of the span, d]."""
    others = sums.index_select(0, groups.rows[span])
    if groups.own is not None:
        own = cols.index_select(0, groups.own[span].clamp(min=0)).to(sums.dtype)
        others -= own.mul_((groups.own[span] >= 0)[:, None])
    return others
