"""What the softmax ops share: the choice of a backend, and the operands' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import autocast, choose


def operands(op: str, rows: Tensor, cols: Tensor | None) -> tuple[str, Tensor, Tensor | None]:
    """The backend of an op for rows [N, d] and cols [M, d] (None: the rows), and both in one dtype.

    Under autocast the GPU kernels take their operands as a matrix product would, rounded once; sums, logits and
    results stay float32. The torch backends would round the logits too, so they are given the vectors as they are.
    Raises UserError where a backend was asked for that cannot run.
    """
    backend = choose(op, rows, len(rows) * len(rows if cols is None else cols))
    if cols is not None and cols.dtype != rows.dtype:
        dtype = torch.promote_types(rows.dtype, cols.dtype)
        rows, cols = rows.to(dtype), cols.to(dtype)
    if backend in ("triton", "cuda") or (backend == "auto" and rows.is_cuda):
        rows, cols = autocast(rows), None if cols is None else autocast(cols)
    return backend, rows, cols
