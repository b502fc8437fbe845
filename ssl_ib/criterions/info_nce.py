"""InfoNCE between two views: SimCLR's NT-Xent, or a plain cross-view softmax.

Shapes: B images of all processes, b of this one, d embedding.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .. import distributed
from ..config.hints import Positive
from ..config.registry import register_criterion
from ..ops.distributed import info_nce
from ..part import Criterion, Nats
from ..types import Batch, Loss, Progress
from .pair import image_labels, shares, two_views, unit


@register_criterion("info_nce")
class InfoNCE(Criterion):
    """Each view picks its image's other view out of the batch, by cosine similarity.

    Reads `projection` [b, d] of two views. Source: NT-Xent, Chen et al., "A Simple Framework for Contrastive Learning",
    2020, equation 1 (with the defaults); MRCL, equation 16 (`negatives="cross", symmetric=False`).

    temperature: divides the cosine similarity.
    negatives:   the candidates: "both" views of all images but the row itself (2B - 1), or the other view's alone (B).
    symmetric:   average both directions, or let only the first view pick.

    Watched: `mi_nats`, log(candidates) - loss, a lower bound on the views' mutual information in nats (van den Oord et
    al., 2018), at most `mi_ceiling`, log(candidates); `positive_similarity`, the mean cosine of this process's pairs.
    """

    requires = frozenset({"projection"})
    num_views = 2
    nats = {"mi_nats": Nats("lower bound", "what the two views share", "mi_ceiling")}

    def __init__(
        self,
        temperature: Positive = 0.1,
        negatives: Literal["both", "cross"] = "both",
        symmetric: bool = True,
    ):
        super().__init__()
        self.temperature, self.negatives, self.symmetric = temperature, negatives, symmetric

    def forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch | None = None, progress: Progress | None = None
    ) -> Loss:
        first, second = (unit(z) for z in two_views(outputs, "projection"))
        value = self._both(first, second) if self.negatives == "both" else self._cross(first, second)
        num_images = len(first) * distributed.world_size()
        candidates = 2 * num_images - 1 if self.negatives == "both" else num_images
        loss = Loss.weighted(info_nce=(value, 1.0))
        watched = {
            "mi_nats": math.log(candidates) - value.detach(),
            "mi_ceiling": torch.full_like(value.detach(), math.log(candidates)),
            "positive_similarity": (first * second).detach().sum(dim=1).mean(),
        }
        return replace(loss, terms=loss.terms | watched)

    def _both(self, first: Tensor, second: Tensor) -> Tensor:
        """NT-Xent: columns are both views of all images, and a row leaves itself out."""
        views, labels = torch.cat([first, second]), image_labels(first)
        rows, cols = (views, None) if self.symmetric else (first, views)
        col_labels = None if cols is None else labels.repeat(2)
        labels = labels.repeat(len(rows) // len(first))
        itself = torch.arange(len(rows), device=rows.device)
        return info_nce(
            rows, cols, labels, col_labels, self.temperature, self_index=itself, shares=shares(views)
        ).mean()

    def _cross(self, first: Tensor, second: Tensor) -> Tensor:
        """Columns are the other view of all images."""
        labels = image_labels(first)
        pairs = [(first, second), (second, first)] if self.symmetric else [(first, second)]
        directions = [
            info_nce(rows, cols, labels, labels, self.temperature, shares=shares(cols)).mean() for rows, cols in pairs
        ]
        return sum(directions) / len(directions)
