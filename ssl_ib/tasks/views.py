"""The plain task: random views of each image, each with masks of its own."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .. import random
from ..config.registry import register_task
from ..errors import UserError
from ..part import RunInfo, Task
from ..types import Batch, Progress, Sample

#: Streams of the per-image keys: view v draws from VIEW + v, its masks from MASK + v.
VIEW, MASK = 0, 1000


@register_task("views")
class ViewsTask(Task):
    """Draws the view recipe's views of each image and masks each view independently.

    mask_draw: new masks in every epoch ("step"), or an image's first ones for good ("image").
    lr_batch:  what the linear-scaling rule of the learning rate counts: every mask of an image ("masks"), or "images".
    """

    def __init__(
        self,
        views,
        masker,
        info: RunInfo,
        mask_draw: Literal["step", "image"] = "step",
        lr_batch: Literal["masks", "images"] = "masks",
    ):
        super().__init__()
        self.mask_draw = mask_draw
        self.views, self.masker = views, masker
        self.grids = [info.grid(shape) for shape in views.shapes]
        if masker is None:
            return
        for shape, grid in dict(zip(views.shapes, self.grids, strict=True)).items():
            if grid is None:
                raise UserError(f"masker {type(masker).__name__} needs a model that cuts views of {shape} into patches")
            if hasattr(masker, "check"):
                masker.check(grid)
        if lr_batch == "masks":
            self.samples_per_image = max((info.masks(grid) or (1,))[0] for grid in self.grids)

    def prepare(self, sample: Sample, progress: Progress) -> Batch:
        def keys(stream: int, epoch: int = progress.epoch) -> Tensor:
            return random.image_keys(progress.seed, epoch, sample.index, stream)

        device = sample.images.device
        drawn = self.views.draw(sample, [keys(VIEW + v) for v in range(len(self.grids))])
        mask_epoch = progress.epoch if self.mask_draw == "step" else 0
        masks = [
            None if self.masker is None else self.masker(keys(MASK + v, mask_epoch).to(device), grid)
            for v, grid in enumerate(self.grids)
        ]
        return Batch(drawn, masks, sample.index.to(device), sample.label, sample.factors)
