"""The public names as a user's typed code meets them: checked by mypy, never run.

What is an error here is an error in every plugin.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import ssl_ib
from ssl_ib import Batch, Criterion, Loss, Masks, Model, Progress, register_criterion, register_masker, register_model


@register_masker("centre")
class Centre:
    def __call__(self, keys: Tensor, grid: tuple[int, int]) -> Masks:
        numbers = torch.arange(grid[0] * grid[1], device=keys.device).view(grid)[1:-1, 1:-1]
        return Masks.from_keep(numbers.flatten().expand(len(keys), -1), grid[0] * grid[1])


@register_criterion("align")
class Align(Criterion):
    requires = frozenset({"projection"})

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        x, y = outputs["projection"]
        return Loss.weighted(align=(-(x * y).sum(1).mean(), self.weight))


@register_model("pixels")
class Pixels(Model):
    provides = frozenset({"projection"})

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer = torch.nn.LazyLinear(width)

    def encode(self, images: Tensor) -> Tensor:
        found: Tensor = self.layer(images.flatten(1))
        return found

    def forward(self, batch: Batch) -> dict[str, list[Tensor]]:
        return {"projection": [self.encode(view) for view in batch.views]}


def a_whole_run(photo: Path) -> float:
    made: type[Align] = Align
    assert made is Align
    run = ssl_ib.train("mrcl_digits", "epochs=1", out=None)
    encoder = ssl_ib.load("runs/mrcl_digits")
    features: Tensor = encoder.embed([Image.open(photo), photo])
    plain: torch.nn.Module = ssl_ib.load_backbone("runs/mrcl_digits")
    try:
        encoder.transform("missing.png")
    except ssl_ib.UserError as error:
        print(error, plain, features.shape)
    return float(run.results["trained"]["knn/top1"])
