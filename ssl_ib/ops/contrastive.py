"""InfoNCE over labelled rows and columns: one op for NT-Xent, MoCo's queue, and groups of several positives.

Row n and column m belong together where their labels are equal. The logits are row . column / temperature; nothing is
normalised here, so callers pass unit vectors.

Shapes: N rows, M columns, d embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from . import softmax_operators as operators
from .backend import check_range, ran
from .products import operands


def info_nce(
    rows: Tensor,
    cols: Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    temperature: float,
    self_index: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """InfoNCE of every row, [N]: logsumexp of its logits minus the mean logit of its positives.

    rows [N, d], cols [M, d], or None for the rows themselves; row_labels int [N], col_labels int [M] (None with cols
    None); temperature > 0; self_index int [N]: the column to leave out of row n, -1 for none; own [N, d]: one further
    column, a positive, that only its row sees (MoCo: cols is the queue). With own and cols, no labels at all (None,
    None) say that no column is a positive, which saves the search for them.
    A row without positives gives 0. The answer and all sums are float32 (float64 for float64 rows); under autocast the
    GPU kernels round the vectors, as a matrix product would, and nothing else.
    Raises UserError for arguments that do not fit. Source: van den Oord et al., "Representation Learning with
    Contrastive Predictive Coding", 2018, equation 4; several positives as in Khosla et al., 2020, equation 2.
    """
    check("info_nce", rows, cols, row_labels, col_labels, temperature, self_index, own)
    arguments = (rows, cols, row_labels, col_labels, temperature, self_index, own, False)
    lse, positive, count = _parts("info_nce", *arguments)
    loss = lse - positive
    return loss if count is None else loss.masked_fill(count == 0, 0.0)


def info_nce_parts(
    rows: Tensor,
    cols: Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    temperature: float,
    self_index: Tensor | None = None,
    own: Tensor | None = None,
    drop_group: bool = False,
) -> tuple[Tensor, Tensor]:
    """The two parts of `info_nce`, each [N] and differentiable: (logsumexp, mean logit of the positives).

    drop_group leaves a row's positives, `own` among them, out of its logsumexp, which then runs over its negatives.
    A row without positives has 0 as its second part; one without columns has -inf as its first. Both without gradient.
    """
    check("info_nce_parts", rows, cols, row_labels, col_labels, temperature, self_index, own)
    arguments = (rows, cols, row_labels, col_labels, temperature, self_index, own, drop_group)
    return _parts("info_nce_parts", *arguments)[:2]


def check(
    op: str,
    rows: Tensor,
    cols: Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    temperature: float,
    self_index: Tensor | None,
    own: Tensor | None,
) -> None:
    if rows.ndim != 2:
        raise UserError(f"{op}: expected rows [N, d], got {list(rows.shape)}")
    unlabelled = cols is not None and own is not None and row_labels is None and col_labels is None
    if not unlabelled and ((cols is None) != (col_labels is None) or row_labels is None):
        raise UserError(
            f"{op}: expected row_labels, and cols and col_labels together, or cols and own without any labels"
        )
    num_rows, width = rows.shape
    num_cols = num_rows if cols is None else len(cols)
    expected = {"row_labels": (row_labels, (num_rows,)), "self_index": (self_index, (num_rows,))}
    expected |= {"cols": (cols, (num_cols, width)), "col_labels": (col_labels, (num_cols,))}
    expected |= {"own": (own, (num_rows, width))}
    for name, (given, shape) in expected.items():
        if given is not None and given.shape != shape:
            raise UserError(f"{op}: expected {name} {list(shape)}, got {list(given.shape)}")
    if self_index is not None:
        check_range(op, "self_index", self_index, -1, num_cols)
    if temperature <= 0:
        raise UserError(f"{op}: expected a temperature above 0, got {temperature}")


def _parts(
    op: str,
    rows: Tensor,
    cols: Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    temperature: float,
    self_index: Tensor | None,
    own: Tensor | None,
    drop_group: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logsumexp, mean positive logit, number of positives), each [N]; None for the number: no row is without one."""
    backend, rows, cols = operands("info_nce", rows, cols)
    if backend == "reference":
        return _reference(rows, cols, row_labels, col_labels, temperature, self_index, own, drop_group)
    if row_labels is not None:
        row_labels, col_labels = labels_of_one_kind(row_labels, col_labels)
    with_mean = cols is not None and rows.requires_grad and torch.is_grad_enabled()
    lse, _, positive, count = operators.lse(
        rows, cols, temperature, self_index, row_labels, col_labels, drop_group, with_mean, backend
    )
    if own is None:
        return lse, positive, count
    logit = operators.own_logits(rows, own, temperature)
    if not drop_group:
        lse = torch.logaddexp(lse, logit)
    if row_labels is None:
        return lse, logit, None
    # The own column is one more positive.
    return lse, (positive * count + logit) / (count + 1), None


def labels_of_one_kind(row_labels: Tensor, col_labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both labels in one dtype that kernels compare: int32 or int64."""
    kinds = {x.dtype for x in (row_labels, col_labels) if x is not None}
    if kinds not in ({torch.int32}, {torch.int64}):
        row_labels, col_labels = row_labels.long(), None if col_labels is None else col_labels.long()
    return row_labels, col_labels


def _reference(
    rows: Tensor,
    cols: Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    temperature: float,
    self_index: Tensor | None,
    own: Tensor | None,
    drop_group: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logsumexp, mean positive logit, number of positives), each [N]."""
    ran("info_nce", "reference")
    dtype = torch.promote_types(rows.dtype, torch.float32)
    rows = rows.to(dtype)
    cols = rows if cols is None else cols.to(dtype)
    col_labels = row_labels if col_labels is None else col_labels
    # Autocast would round the logits to bfloat16: an error of some hundredths at small temperatures.
    with torch.autocast(rows.device.type, enabled=False):
        logits = rows @ cols.T / temperature
    if row_labels is None:
        siblings = torch.zeros_like(logits, dtype=torch.bool)
    else:
        siblings = row_labels[:, None] == col_labels
    left_out = torch.zeros_like(siblings)
    if self_index is not None:
        left_out = self_index[:, None] == torch.arange(len(cols), device=rows.device)
        siblings = siblings & ~left_out
    count = siblings.sum(dim=1)
    total = torch.where(siblings, logits, 0.0).sum(dim=1)
    if drop_group:
        left_out = left_out | siblings
    # The gradient of a logsumexp over nothing is NaN, so such a row is computed over all and then overwritten.
    empty = left_out.all(dim=1)
    lse = logits.masked_fill(left_out & ~empty[:, None], -torch.inf).logsumexp(dim=1).masked_fill(empty, -torch.inf)
    if own is not None:
        own_logit = (rows * own.to(dtype)).sum(dim=1) / temperature
        total, count = total + own_logit, count + 1
        if not drop_group:
            lse = torch.logaddexp(lse, own_logit)
    return lse, total / count.clamp(min=1), count
