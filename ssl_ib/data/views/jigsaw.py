"""The JigSaw view: the parts of an image in any order, each a small image of its own (Misra and van der Maaten, PIRL).

Shapes: B images, n = grid x grid parts, p pixels of a part's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import random
from ...errors import UserError
from ...ops.pixels.resample import Interpolation, cut
from ...types import Sample
from .augment import Augment, Crops
from .boxes import full_sizes

# Streams that no operation of Augment draws from.
_OFFSETS, _ORDER = 100, 101


@dataclass(frozen=True)
class Jigsaw:
    """The distribution of a JigSaw view: a crop of size x size pixels, perhaps mirrored, is divided into grid x grid
    equal cells, one square of `patch` pixels is cut from a random place of each, and the squares are shuffled.
    No colour is changed.

    size:  pixels of a side of the crop; what remains of it beyond grid equal cells of whole pixels is not used.
    scale: range of the crop's share of the image's area.
    flip:  probability of a horizontal flip, before the crop is divided.

    Raises UserError where the squares do not fit into the cells, or a number is out of its range.
    """

    size: int = 255
    patch: int = 64
    grid: int = 3
    scale: tuple[float, float] = (0.6, 1.0)
    flip: float = 0.5
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.grid * self.patch > self.size:
            raise UserError(
                f"jigsaw_size={self.size} pixels cannot be divided into {self.grid} x {self.grid} cells that hold "
                f"squares of {self.patch} pixels (jigsaw_patch): expected at least {self.grid * self.patch}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"jigsaw_scale: expected 0 < low <= high <= 1, got {self.scale}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, 3, p, p): the shape of the view without the batch."""
        return (self.grid**2, 3, self.patch, self.patch)

    def __call__(self, images: Tensor, keys: Tensor, sizes: Tensor | None = None) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, n, 3, p, p] in [0, 1]; keys and sizes as for `Augment`."""
        keys, n = keys.cpu(), self.grid**2
        crop = Augment(self.size, self.scale, flip=self.flip, interpolation=self.interpolation)
        whole = crop(images, keys, full_sizes(images) if sizes is None else sizes)
        cell = self.size // self.grid
        offsets = random.randint(random.fold(keys, _OFFSETS), 2 * n, cell - self.patch + 1).view(-1, n, 2)
        order = random.permutation(random.fold(keys, _ORDER), n)
        top = order // self.grid * cell + offsets[..., 0]
        left = order % self.grid * cell + offsets[..., 1]
        return cut(whole, top, left, self.patch)


class CropsAndJigsaw(Crops):
    """Views of whole crops, and as the last one a JigSaw view: float32 [B, n, 3, p, p]. No teacher sees that one."""

    def __init__(self, augments: Sequence[Augment], jigsaw: Jigsaw, crop_ratio: float = 1.0):
        super().__init__(augments, crop_ratio)
        self.jigsaw = jigsaw

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (*super().shapes, self.jigsaw.shape)

    def draw(self, sample: Sample, keys: list[Tensor]) -> list[Tensor]:
        parts = self.jigsaw(sample.images, keys[-1], sample.extra.get("size"))
        return [*super().draw(sample, keys[:-1]), self._normalised(parts)]

    def show(self, view: Tensor, number: int | None) -> Tensor | None:
        """A JigSaw view is shown with its parts side by side, as they were shuffled."""
        if view.ndim == 4:
            return super().show(view, number)
        grid = range(self.jigsaw.grid)
        rows = [torch.cat([view[:, row * len(grid) + column] for column in grid], 3) for row in grid]
        return super().show(torch.cat(rows, 2), number)
