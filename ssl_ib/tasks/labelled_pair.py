"""Labelled images beside unlabelled ones: what semi-supervised view learning takes a step on.

Shapes: B images of a step, n labelled images that are known in all.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import random
from ..config.hints import PositiveInt
from ..config.registry import register_task
from ..data.sources.base import ImageSet, stratified
from ..errors import UserError
from ..part import RunInfo, Task
from ..types import Batch, Masks, Progress, Sample
from .views import ViewsTask

#: Stream of the per-image keys that choose the labelled image, and of the view drawn of it.
_LABELLED = 2000


@register_task("labelled_pair")
class LabelledPair(Task):
    """Views of each image, whose label is hidden, and as many rows again of labelled images.

    The second half of a batch's rows are labelled images, each drawn anew, with replacement, from a pool that stays as
    it is: `labels_per_class` training images of each class. So batch.label is -1 in the first half and known in the
    second. All rows have views of their own. In evaluation mode the images come alone, with their own labels: held-out
    losses are of held-out images.

    labels_per_class: images of each class whose label is known, spread evenly over the class; null for all.

    Raises UserError, when it is built, where a class has fewer labelled images, or where there is none.
    """

    def __init__(self, views, masker, info: RunInfo, source, labels_per_class: PositiveInt | None = None):
        super().__init__()
        self.task = ViewsTask(views, masker, info)
        self.samples_per_image = self.task.samples_per_image
        self.images = source.train()
        self.pool = _pool(self.images, labels_per_class)

    def prepare(self, sample: Sample, progress: Progress) -> Batch:
        plain = self.task.prepare(sample, progress)
        if not self.training:
            return plain
        keys = random.image_keys(progress.seed, progress.epoch, sample.index, _LABELLED)
        chosen = self.pool[random.randint(keys, 1, len(self.pool))[:, 0]]
        labelled = self.images.gather(chosen).to(sample.images.device)
        # The row's key in place of the image's number: an image that is drawn twice gets two views.
        known = self.task.prepare(replace(labelled, index=keys), progress)
        return Batch(
            [torch.cat(pair) for pair in zip(plain.views, known.views, strict=True)],
            [_joined(*pair) for pair in zip(plain.masks, known.masks, strict=True)],
            torch.cat([plain.index, labelled.index.to(plain.index.device)]),
            torch.cat([torch.full_like(plain.label, -1), known.label]),
            {name: torch.cat([values, known.factors[name]]) for name, values in plain.factors.items()},
        )


def _joined(first: Masks | None, second: Masks | None) -> Masks | None:
    if first is None or second is None:
        return None
    return Masks(torch.cat([first.keep, second.keep]), torch.cat([first.mask, second.mask]))


def _pool(images: ImageSet, labels_per_class: int | None) -> Tensor:
    """Numbers of the images whose labels are known: int64 [n]."""
    members = [(images.labels == label).nonzero()[:, 0] for label in range(len(images.classes))]
    if not members or not sum(map(len, members)):
        raise UserError("task 'labelled_pair' needs labelled training images, and the source has none")
    least = labels_per_class or 1
    few = [f"{name!r} has {len(rows)}" for name, rows in zip(images.classes, members, strict=True) if len(rows) < least]
    if few:
        raise UserError(
            f"labels_per_class={labels_per_class}: expected so many labelled training images of each class, but "
            f"{', '.join(few[:10])}{', ...' if len(few) > 10 else ''}"
        )
    return torch.cat([rows[stratified(torch.zeros_like(rows), labels_per_class or len(rows))] for rows in members])
