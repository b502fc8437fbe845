"""What a representation can do when it is told what to know: linear heads trained together with the encoder.

Shapes: n training images, b images of a batch, D features, C classes, d numbers.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..config.registry import register_criterion
from ..errors import UserError, nearest
from ..part import Criterion, RunInfo
from ..types import Batch, Loss, Progress


@register_criterion("supervised")
class Supervised(Criterion):
    """Linear heads on the first view predict factors of the images (`Batch.factors`); the sum of their losses.

    A factor of classes has a cross-entropy, a factor of numbers an error of the standardised numbers. The heads are the
    criterion's: evaluations read the features, as with every other criterion. Source: the row "supervised" of table 4
    of Tian et al., "What Makes for Good Views for Contrastive Learning?", 2020.

    factors: the names of the factors, or none for all that the source has.
    output:  what the heads read of the model.
    error:   of numbers: the mean square, or the mean absolute value.

    Watched: the loss of each factor by its name, and for classes `<factor>_accuracy`.
    """

    def __init__(
        self,
        info: RunInfo,
        factors: tuple[str, ...] = (),
        output: Literal["features", "projection"] = "features",
        error: Literal["square", "absolute"] = "square",
    ):
        super().__init__()
        known = info.factors()
        if not known:
            raise UserError("criterion 'supervised' needs a source that has factors, such as source=moving_mnist")
        for name in factors:
            if name not in known:
                raise UserError(f"factors={name}: unknown factor{nearest(name, known)}")
        self.factors, self.output, self.error = factors or tuple(known), output, error
        self.requires, self.reads = frozenset({output}), {output: (0,)}
        self.heads = nn.ModuleDict()
        for name in self.factors:
            values = known[name].float()
            classes = not known[name].is_floating_point()
            self.heads[name] = nn.Linear(info.width(output), int(values.max()) + 1 if classes else values.shape[1])
            if not classes:
                self.register_buffer(f"{name}_mean", values.mean(dim=0))
                self.register_buffer(f"{name}_std", values.std(dim=0, unbiased=False).clamp_min(1e-6))

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress | None = None) -> Loss:
        """Reads the first view's output [b, D], and the factors of the batch, int64 [b] or float32 [b, d]."""
        features = outputs[self.output][0]
        losses, accuracies = {}, {}
        for name, head in self.heads.items():
            predicted, value = head(features), batch.factors[name]
            if value.is_floating_point():
                wanted = (value - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")
                losses[name] = (F.mse_loss if self.error == "square" else F.l1_loss)(predicted, wanted)
            else:
                losses[name] = F.cross_entropy(predicted, value)
                accuracies[f"{name}_accuracy"] = (predicted.argmax(dim=1) == value).float().mean()
        loss = Loss.weighted(**{name: (value, 1.0) for name, value in losses.items()})
        return Loss(loss.total, loss.terms | accuracies, loss.weights)
