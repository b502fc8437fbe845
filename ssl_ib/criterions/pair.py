"""What the criterions of two views share.

Shapes: b rows of this process, d embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from ..errors import UserError


def two_views(outputs: dict[str, list[Tensor]], name: str) -> tuple[Tensor, Tensor]:
    """The output `name` of both views; raises UserError unless there are two."""
    if len(outputs[name]) != 2:
        raise UserError(f"expected {name!r} of 2 views, got {len(outputs[name])}: choose a task that draws 2 views")
    return outputs[name][0], outputs[name][1]


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1, in float32 at least: x [b, d] -> [b, d]."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def image_labels(x: Tensor) -> Tensor:
    """Numbers, among the images of all processes, of those behind this process's rows x [b, d]: int64 [b]."""
    return torch.arange(len(x), device=x.device) + distributed.rank() * len(x)


def shares(cols: Tensor) -> tuple[int, ...]:
    """How many rows like `cols` each process has: in a run, as many as this one."""
    return (len(cols),) * distributed.world_size()
