"""InfoNCE between two views: SimCLR's NT-Xent, or a plain cross-view softmax.

Shapes: B images of all processes, b of this one, d embedding.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .. import distributed, ops
from ..hints import Positive
from ..part import Criterion
from ..registry import register_criterion
from ..types import Batch, Loss, Progress
from .pair import image_labels, two_views, unit


@register_criterion("info_nce")
class InfoNCE(Criterion):
    """Each view picks its image's other view out of the batch, by cosine similarity.

    Reads `projection` [b, d] of two views. Source: NT-Xent, Chen et al., "A Simple Framework for Contrastive Learning",
    2020, equation 1 (with the defaults); MRCL, equation 16 (`negatives="cross", symmetric=False`).

    temperature: divides the cosine similarity.
    negatives:   the candidates: "both" views of all images but the row itself (2B - 1), or the other view's alone (B).
    symmetric:   average both directions, or let only the first view pick.

    Watched: `mi_nats`, log(candidates) - loss, a lower bound on the views' mutual information in nats (van den Oord et
    al., 2018), at most log(candidates); `positive_similarity`, the mean cosine of this process's pairs.
    """

    requires = frozenset({"projection"})
    num_views = 2

    def __init__(
        self,
        temperature: Positive = 0.1,
        negatives: Literal["both", "cross"] = "both",
        symmetric: bool = True,
    ):
        super().__init__()
        self.temperature, self.negatives, self.symmetric = temperature, negatives, symmetric

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        first, second = (unit(z) for z in two_views(outputs, "projection"))
        if self.negatives == "both":
            value, candidates = self._both(first, second)
        else:
            value, candidates = self._cross(first, second)
        loss = Loss.weighted(info_nce=(value, 1.0))
        watched = {
            "mi_nats": math.log(candidates) - value.detach(),
            "positive_similarity": (first * second).detach().sum(dim=1).mean(),
        }
        return replace(loss, terms=loss.terms | watched)

    def _both(self, first: Tensor, second: Tensor) -> tuple[Tensor, int]:
        """NT-Xent: columns are both views of all images, and a row leaves itself out."""
        mine, everyone = image_labels(first)
        num_images = len(everyone)
        if self.symmetric:
            rows, labels, self_index = torch.cat([first, second]), mine.repeat(2), torch.cat([mine, num_images + mine])
        else:
            rows, labels, self_index = first, mine, mine
        if self.symmetric and distributed.world_size() == 1:
            cols = col_labels = None
        else:
            cols, col_labels = torch.cat([distributed.gather(first), distributed.gather(second)]), everyone.repeat(2)
        value = ops.info_nce(rows, cols, labels, col_labels, self.temperature, self_index=self_index).mean()
        return value, 2 * num_images - 1

    def _cross(self, first: Tensor, second: Tensor) -> tuple[Tensor, int]:
        """Columns are the other view of all images."""
        mine, everyone = image_labels(first)
        value = ops.info_nce(first, distributed.gather(second), mine, everyone, self.temperature).mean()
        if self.symmetric:
            back = ops.info_nce(second, distributed.gather(first), mine, everyone, self.temperature).mean()
            value = (value + back) / 2
        return value, len(everyone)
