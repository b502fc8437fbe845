"""What the criterions of two views share.

Shapes: b rows of this process, N rows of all processes, d embedding.
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


def image_labels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the images behind this process's rows, and behind those of all processes: int64 [b], [N]."""
    everyone = torch.arange(distributed.world_size() * len(x), device=x.device)
    return everyone[distributed.rank() * len(x) :][: len(x)], everyone
