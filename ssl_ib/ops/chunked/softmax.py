"""Softmax over the products of rows with columns, in plain torch: the N x M logits exist a tile at a time.

The logits are kept in base 2, l2 = log2(e) rows . cols / temperature, since exp2 is the faster function; the factor is
part of the rows. Where the vectors' lengths bound |l2| by SAFE, sums of exp2(l2) neither overflow nor lose a term, so
no maximum is taken: for unit vectors where 2 / temperature < 87, a temperature of 0.023 or more. Otherwise a first pass
finds each row's maximum.

Shapes: N rows, M columns, d embedding, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import positives
from .gather import accumulator, piece, spans
from .positives import Groups

#: Numbers from 2^-64 to 2^64, and sums of 2^40 of them times gradients of 2^-20, are inside float32.
SAFE = 64.0
LN2 = math.log(2)


class _Logits:
    """Logits in base 2, a tile at a time, each overwriting the last; what is left out is -inf.

    self_index [N]: the column a row leaves out; groups: whose pairs of one group are left out, and none without.
    """

    def __init__(
        self,
        rows: Tensor,
        cols: Tensor,
        temperature: float,
        self_index: Tensor | None = None,
        groups: Groups | None = None,
    ):
        dtype = accumulator(rows.dtype)
        self.rows, self.cols = rows.to(dtype) * (1 / (temperature * LN2)), cols.to(dtype)
        self.self_index, self.groups = self_index, groups
        self.step = math.isqrt(piece(rows))
        # A few rows are given wide tiles.
        self.col_step = max(self.step, piece(rows) // max(len(rows), 1))
        self.buffer = self.rows.new_empty(min(self.step, len(rows)) * min(self.col_step, len(cols)))

    def bounded(self) -> bool:
        """Whether the vectors' lengths keep every logit within SAFE."""
        if len(self.rows) == 0 or len(self.cols) == 0:
            return True
        return bool(self.rows.norm(dim=1).amax() * self.cols.norm(dim=1).amax() <= SAFE)

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, logits) of all tiles."""
        for cols in spans(len(self.cols), self.col_step):
            for rows in spans(len(self.rows), self.step):
                yield rows, cols, self._tile(rows, cols)

    def half(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Of a symmetric problem: the tiles on the diagonal and above it."""
        for rows in spans(len(self.rows), self.step):
            for cols in spans(len(self.cols), self.step):
                if cols.start >= rows.start:
                    yield rows, cols, self._tile(rows, cols)

    def _tile(self, rows: slice, cols: slice) -> Tensor:
        x, c = self.rows[rows], self.cols[cols]
        tile = torch.mm(x, c.T, out=self.buffer[: len(x) * len(c)].view(len(x), len(c)))
        if self.self_index is not None:
            fill_at(tile, self.self_index[rows] - cols.start, -torch.inf)
        if self.groups is not None:
            tile.masked_fill_(self.groups.rows[rows, None] == self.groups.cols[cols], -torch.inf)
        return tile


def fill_at(tile: Tensor, column: Tensor, value: float) -> None:
    """Sets tile[i, column[i]] of every row whose column lies in the tile."""
    inside = ((column >= 0) & (column < tile.shape[1]))[:, None]
    column = column.clamp(0, tile.shape[1] - 1).long()[:, None]
    tile.scatter_(1, column, tile.gather(1, column).masked_fill_(inside, value))


def _symmetric(rows: Tensor, cols: Tensor, self_index: Tensor | None) -> bool:
    """Whether pair (i, j) is left out exactly when (j, i) is: then half of the tiles tell all."""
    if rows is not cols:
        return False
    return self_index is None or torch.equal(self_index, torch.arange(len(rows), device=rows.device).to(self_index))


def _maximum(logits: _Logits) -> Tensor:
    """Every row's largest logit [N]; 0 for a row with nothing left."""
    largest = logits.rows.new_full((len(logits.rows),), -torch.inf)
    for rows, _, tile in logits.tiles():
        torch.maximum(largest[rows], tile.amax(dim=1), out=largest[rows])
    return largest.masked_fill_(largest.isinf(), 0.0)


def _forward(
    logits: _Logits, with_mean: bool, log_prior: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: logsumexp in base 2 [N], mean column [N, d] (empty if not wanted), mean log prior [N]."""
    total = logits.rows.new_zeros(len(logits.rows))
    mean = torch.zeros_like(logits.rows) if with_mean else logits.rows.new_empty(0)
    prior = torch.zeros_like(total)
    bounded = logits.bounded()
    if symmetric and bounded:
        for rows, cols, tile in logits.half():
            total[rows] += tile.exp2_().sum(dim=1)
            if rows != cols:
                total[cols] += tile.sum(dim=0)
        return total.log2_(), mean, prior
    shift = None if bounded else _maximum(logits)
    for rows, cols, tile in logits.tiles():
        if shift is not None:
            tile -= shift[rows, None]
        total[rows] += tile.exp2_().sum(dim=1)
        if with_mean:
            mean[rows].addmm_(tile, logits.cols[cols])
        if log_prior is not None:
            prior[rows].addmv_(tile, log_prior[cols].to(tile.dtype))
    lse = total.log2() if shift is None else total.log2() + shift
    # A row with nothing left has sums of 0, and means of 0.
    total.masked_fill_(total == 0, 1.0)
    return lse, mean.div_(total[:, None]) if with_mean else mean, prior.div_(total)


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
    groups = _groups(row_label, col_label, self_index)
    logits = _Logits(rows, cols, temperature, self_index, groups if drop else None)
    square = rows is cols and row_label is col_label
    symmetric = not with_mean and square and _symmetric(rows, cols, self_index)
    answer, mean, _ = _forward(logits, with_mean, None, symmetric)
    answer = answer.mul_(LN2)
    if groups is None:
        return answer, mean, answer.new_empty(0), answer.new_empty(0)
    return answer, mean, positives.mean_logits(groups, rows, cols, temperature), groups.counts.to(answer.dtype)


def _groups(row_label: Tensor | None, col_label: Tensor | None, self_index: Tensor | None) -> Groups | None:
    """None where one side has no labels: then nothing is a positive."""
    return None if row_label is None or col_label is None else Groups(row_label, col_label, self_index)


def _divisor(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """The logsumexp in base 2 to subtract, infinite for a row with nothing left: nothing comes of such a row."""
    return (lse.to(dtype) / LN2).masked_fill_(lse == -torch.inf, torch.inf)


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
    groups = _groups(row_label, col_label, self_index)
    logits = _Logits(rows, cols, temperature, self_index, groups if drop else None)
    lse2 = _divisor(lse, logits.rows.dtype)
    grad = grad.to(lse2.dtype).masked_fill(lse == -torch.inf, 0.0)
    d_rows = d_cols = logits.rows.new_empty(0)
    # Where the forward kept the mean column, the rows' gradient is free.
    known = want_rows and mean.numel() > 0
    if want_rows:
        d_rows = mean * grad[:, None] if known else torch.zeros_like(logits.rows)
    if want_cols:
        d_cols = torch.zeros_like(logits.cols)
    if want_cols or (want_rows and not known):
        for r, c, tile in logits.tiles():
            tile.sub_(lse2[r, None]).exp2_().mul_(grad[r, None])
            if want_rows and not known:
                d_rows[r].addmm_(tile, logits.cols[c])
            if want_cols:
                d_cols[c].addmm_(tile.T, logits.rows[r])
    # The columns met rows that hold the logits' factor already, but in base 2.
    d_rows, d_cols = d_rows.div_(temperature), d_cols.mul_(LN2)
    if groups is not None and pull is not None:
        pull = pull.to(logits.rows.dtype) / temperature
        if want_rows:
            positives.pull_rows(d_rows, groups, cols, pull)
        if want_cols:
            positives.pull_cols(d_cols, groups, rows, pull)
    return d_rows.to(rows.dtype), d_cols.to(cols.dtype)


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
    same = lse_rows is lse_cols and grad_rows is grad_cols and self_rows is self_cols and row_label is col_label
    half = same and _symmetric(rows, cols, self_rows)
    groups = _groups(row_label, col_label, self_rows)
    logits = _Logits(rows, cols, temperature, self_rows if half else None, groups if drop else None)
    dtype = logits.rows.dtype
    row_lse, col_lse = _divisor(lse_rows, dtype), _divisor(lse_cols, dtype)
    grad_rows = grad_rows.to(dtype).masked_fill(lse_rows == -torch.inf, 0.0)
    grad_cols = grad_cols.to(dtype).masked_fill(lse_cols == -torch.inf, 0.0)
    out = torch.zeros_like(logits.rows)
    if half and logits.bounded():
        weight = grad_rows * torch.exp2(-row_lse)
        buffer = torch.empty_like(logits.buffer)
        for r, c, tile in logits.half():
            both = torch.add(weight[r, None], weight[c], out=buffer[: tile.numel()].view_as(tile))
            tile.exp2_().mul_(both)
            out[r].addmm_(tile, logits.cols[c])
            if r != c:
                out[c].addmm_(tile.T, logits.cols[r])
    else:
        own = None if half else self_rows
        for r, c, tile in logits.tiles():
            theirs = (tile - col_lse[c]).exp2_().mul_(grad_cols[c])
            mine = tile.sub_(row_lse[r, None]).exp2_().mul_(grad_rows[r, None])
            if own is not None:
                fill_at(mine, own[r] - c.start, 0.0)
            if not half and self_cols is not None:
                fill_at(theirs.T, self_cols[c] - first - r.start, 0.0)
            out[r].addmm_(mine.add_(theirs), logits.cols[c])
    if groups is not None and pull_rows is not None:
        positives.pull_rows(out, groups, cols, pull_rows.to(dtype))
    if groups is not None and pull_cols is not None:
        # The columns as rows, whose positives are among the rows.
        back = groups if same else Groups(col_label, row_label, None if self_cols is None else self_cols - first)
        positives.pull_cols(out, back, cols, pull_cols.to(dtype))
    return out.div_(temperature).to(rows.dtype)


def posterior(
    t: Tensor, c: Tensor, temperature: float, log_prior: Tensor | None, want_marginal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = _Logits(t, c, temperature)
    lse2, mean, prior = _forward(logits, True, log_prior, False)
    marginal = logits.rows.new_zeros(len(c) if want_marginal else 0)
    if want_marginal:
        for rows, cols, tile in logits.tiles():
            marginal[cols] += tile.sub_(lse2[rows, None]).exp2_().sum(dim=0)
    return lse2 * LN2, mean, prior, marginal


def posterior_backward(
    t: Tensor,
    c: Tensor,
    temperature: float,
    lse: Tensor,
    r: Tensor | None,
    h: Tensor | None,
    a: Tensor | None,
    v: Tensor | None,
    e: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    want_t: bool,
    want_c: bool,
) -> tuple[Tensor, Tensor]:
    logits = _Logits(t, c, temperature)
    dtype = logits.rows.dtype
    lse2 = _divisor(lse, dtype)
    r, h, a, v, e, u, w = (None if x is None else x.to(dtype) for x in (r, h, a, v, e, u, w))
    through_prior = e is not None and u is not None
    logits_matter = through_prior or any(x is not None for x in (r, h, a, w))
    d_t = torch.zeros_like(logits.rows) if want_t else logits.rows.new_empty(0)
    d_c = torch.zeros_like(logits.cols) if want_c else logits.rows.new_empty(0)
    buffer = torch.empty_like(logits.buffer)
    for rows, cols, tile in logits.tiles():
        slope = buffer[: tile.numel()].view_as(tile)
        if logits_matter:
            # What multiplies p in the gradient of the logits.
            if a is None:
                slope.zero_()
            else:
                torch.mm(a[rows], logits.cols[cols].T, out=slope)
            if h is not None:
                slope.addcmul_(tile, h[rows, None], value=LN2)
            if through_prior:
                slope.addcmul_(e[rows, None], u[cols])
            if w is not None:
                slope += w[cols]
            if r is not None:
                slope -= r[rows, None]
        p = tile.sub_(lse2[rows, None]).exp2_()
        if want_c and v is not None:
            d_c[cols].addmm_(p.T, v[rows], alpha=1 / LN2)
        if logits_matter:
            slope *= p
            if want_t:
                d_t[rows].addmm_(slope, logits.cols[cols])
            if want_c:
                d_c[cols].addmm_(slope.T, logits.rows[rows])
    return d_t.div_(temperature).to(t.dtype), d_c.mul_(LN2).to(c.dtype)
