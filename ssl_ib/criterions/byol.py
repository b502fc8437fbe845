"""BYOL: each view predicts the target network's projection of the other. No negatives."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..config.registry import register_criterion
from ..part import Criterion
from ..types import Batch, Loss, Progress
from .pair import two_views, unit


@register_criterion("byol")
class BYOL(Criterion):
    """Squared distance of the normalised prediction to the other view's normalised target, both directions added.

    Reads `prediction` and `target` [b, d] of two views; the target is a constant. Between 0 and 8.
    Source: Grill et al., "Bootstrap Your Own Latent", 2020, equation 2 and the symmetrised loss below it.
    Watched: `positive_similarity`, the mean cosine of prediction and target.
    """

    requires = frozenset({"prediction", "target"})
    num_views = 2

    def forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch | None = None, progress: Progress | None = None
    ) -> Loss:
        predictions = [unit(p) for p in two_views(outputs, "prediction")]
        targets = [unit(z.detach()) for z in reversed(two_views(outputs, "target"))]
        error = sum((p - z).square().sum(dim=1).mean() for p, z in zip(predictions, targets, strict=True))
        loss = Loss.weighted(prediction_error=(error, 1.0))
        # Of unit vectors: |p - z|^2 = 2 - 2 p.z, here twice.
        return replace(loss, terms=loss.terms | {"positive_similarity": 1 - error.detach() / 4})
