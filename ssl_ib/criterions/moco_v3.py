"""MoCo v3: each view's prediction picks the target network's projection of the other view out of the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .. import distributed
from ..config.hints import Positive
from ..config.registry import register_criterion
from ..ops.distributed import info_nce
from ..part import Criterion, Nats
from ..types import Batch, Loss, Progress
from .pair import image_labels, shares, two_views, unit


@register_criterion("moco_v3")
class MoCoV3(Criterion):
    """2 T x cross-entropy of q.k/T over the targets of the whole batch, both directions added.

    Reads `prediction` and `target` [b, d] of two views; the target is a constant.
    Source: Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers", 2021, algorithm 1.

    temperature: T (0.2 for vision transformers, 1 for ResNet-50). The factor 2 T keeps the gradient's scale.

    Watched: `mi_nats`, log(images of the batch) - the mean of the two directions: a lower bound in nats, at most
    `mi_ceiling`, log(images of the batch).
    """

    requires = frozenset({"prediction", "target"})
    num_views = 2
    nats = {"mi_nats": Nats("lower bound", "what the two views share", "mi_ceiling")}

    def __init__(self, temperature: Positive = 0.2):
        super().__init__()
        self.temperature = temperature

    def forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch | None = None, progress: Progress | None = None
    ) -> Loss:
        queries = [unit(p) for p in two_views(outputs, "prediction")]
        keys = [unit(z.detach()) for z in reversed(two_views(outputs, "target"))]
        labels = image_labels(queries[0])
        both = sum(
            info_nce(q, k, labels, labels, self.temperature, shares=shares(k)).mean()
            for q, k in zip(queries, keys, strict=True)
        )
        loss = Loss.weighted(info_nce=(both, 2 * self.temperature))
        ceiling = math.log(len(labels) * distributed.world_size())
        watched = {"mi_nats": ceiling - both.detach() / 2, "mi_ceiling": torch.full_like(both.detach(), ceiling)}
        return replace(loss, terms=loss.terms | watched)
