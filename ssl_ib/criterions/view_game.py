"""InfoMin's objective for learned views: share little with each other, and keep what tells the classes apart.

Shapes: B images, n of them with a known label, K classes, d embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from ..config.registry import register_criterion
from ..errors import UserError
from ..part import Criterion
from ..types import Batch, Loss, Progress
from .info_nce import InfoNCE
from .pair import two_views


@register_criterion("view_game")
class ViewGame(Criterion):
    """The contrastive loss of two learned views, of all rows, plus the cross-entropy of the labelled ones.

    Reads `projection` [B, d] and `logits` [n, K] of both views; a row of the batch is labelled where its label is not
    -1. All weights are 1. Who minimises and who maximises is the model's matter (`view_generator` reverses the gradient
    of `projection`). Source: Tian et al., "What Makes for Good Views for Contrastive Learning?", 2020, equation 3.

    nce:         the contrastive part; without it the views are learned from labels alone ("supervised").
    supervised:  the classifiers' part; without it the views only lose what they share ("unsupervised").
    contrastive: the contrastive criterion (default: info_nce at temperature 0.15, whose candidates are the other view's
                 rows, both directions averaged).

    Watched: `accuracy_1` and `accuracy_2`, the classifiers' shares of right answers; and what the contrastive criterion
    watches: `mi_nats`, what the critics find the views to share, at most `mi_ceiling`.
    """

    def __init__(self, nce: bool = True, supervised: bool = True, contrastive: Criterion | None = None):
        super().__init__()
        if not (nce or supervised):
            raise UserError("nce=false and supervised=false leave nothing to learn: switch one of them on")
        self.contrastive = (contrastive or InfoNCE(temperature=0.15, negatives="cross")) if nce else None
        self.nats = self.contrastive.nats if nce else {}
        self.supervised = supervised
        self.requires = frozenset({"logits"} if supervised else ()) | (self.contrastive.requires if nce else set())

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        parts = []
        if self.contrastive is not None:
            parts.append(self.contrastive(outputs, batch, progress))
        if self.supervised:
            parts.append(self._classified(outputs, batch))
        return Loss(
            sum(part.total for part in parts),
            {name: term for part in parts for name, term in part.terms.items()},
            {name: weight for part in parts for name, weight in part.weights.items()},
        )

    @staticmethod
    def _classified(outputs: dict[str, list[Tensor]], batch: Batch) -> Loss:
        """Means over the labelled rows of all processes; where there are none at all, 0."""
        labels = batch.label[batch.label >= 0]
        # A process may have more labelled rows than another: the mean of these shares is the mean over all rows.
        everyones = distributed.all_reduce_mean(torch.tensor(float(len(labels)), device=labels.device))
        share = everyones.clamp_min(1 / distributed.world_size()).reciprocal()
        terms, watched = {}, {}
        for number, logits in enumerate(two_views(outputs, "logits"), start=1):
            logits = logits.float()
            terms[f"ce_{number}"] = (F.cross_entropy(logits, labels, reduction="sum") * share, 1.0)
            watched[f"accuracy_{number}"] = (logits.argmax(dim=1) == labels).sum() * share
        loss = Loss.weighted(**terms)
        return Loss(loss.total, loss.terms | watched, loss.weights)
