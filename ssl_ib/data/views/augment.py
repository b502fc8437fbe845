"""How a view is drawn from an image: `Augment` is one view's distribution, `Crops` all views of a recipe.

A view is drawn in two acts. First its parameters, a few numbers an image, on the CPU: they are functions of the image's
key alone, come out alike wherever the pixels are, and tell which images an operation applies to without waiting for
the device. Then the pixels, on the images' device, for the whole batch at once.

Shapes: B images, H x W pixels of the source, h x w of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from ... import ops, random
from ...errors import UserError
from ...ops.pixels import resample
from ...ops.views import Operation, Parameters, Steps
from ...types import Sample
from .base import Views
from .boxes import full_sizes, sample_boxes
from .rand_augment import RandAugment

# A stream an operation, so that its draw does not depend on which other operations are on.
_CROP, _FLIP, _JITTER, _ORDER, _GREY, _BLUR, _SOLARISE, _RAND_AUGMENT = range(8)


@dataclass(frozen=True)
class Augment:
    """The distribution of one view: a crop, a flip, and then the operations in the order of `operations`.

    size:       pixels of a side of the view.
    scale:      range of the crop's share of the image's area, within (0, 1].
    ratio:      range of the crop's width / height.
    flip:       probability of a horizontal flip.
    jitter:     strength of brightness, contrast, saturation (factors in [max(0, 1 - s), 1 + s]) and hue (shift in
                [-s, s] turns, s <= 0.5); applied with probability jitter_p.
    grey_p:     probability of turning grey.
    blur_p:     probability of a Gaussian blur with sigma uniform in blur_sigma, in pixels of the view. Its kernel spans
                about a tenth of the view: 23 pixels at 224, 3 at 32.
    solarise_p: probability of inverting the pixels above one half.
    operations: what is done after the flip, and in which order; one that is left out is not done.
    rand_augment: the distribution of RandAugment's operations; None for none.

    Raises UserError where a number is out of its range.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.8
    grey_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_p: float = 0.0
    interpolation: resample.Interpolation = "bilinear"
    operations: tuple[Operation, ...] = get_args(Operation)
    rand_augment: RandAugment | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale: expected 0 < low <= high <= 1, got {self.scale}")
        for name in ("ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"{name}: expected 0 < low <= high, got {(low, high)}")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise UserError(f"jitter: expected strengths of 0 or more, that of the hue up to 0.5, got {self.jitter}")
        for name in ("flip", "jitter_p", "grey_p", "blur_p", "solarise_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a probability, got {getattr(self, name)}")
        known = get_args(Operation)
        if not set(self.operations) <= set(known) or len(set(self.operations)) < len(self.operations):
            raise UserError(f"operations: expected some of {', '.join(known)}, each once, got {list(self.operations)}")

    @property
    def blur_radius(self) -> int:
        """Pixels the blur reaches to either side: its kernel is the odd one next to size / 10."""
        return min(max(1, self.size // 20), self.size - 1)

    def draw(self, keys: Tensor, sizes: Tensor) -> Parameters:
        """Draws a view's parameters: keys int64 [B], sizes int64 [B, 2] of (height, width)."""
        keys, sizes = keys.cpu(), sizes.cpu()
        sigma = random.uniform(random.fold(keys, _BLUR), 2, *self.blur_sigma)[:, 1]
        return Parameters(
            boxes=sample_boxes(random.fold(keys, _CROP), sizes, self.scale, self.ratio),
            flip=_chance(keys, _FLIP, self.flip),
            factors=self._factors(keys),
            order=random.permutation(random.fold(keys, _ORDER), 4),
            grey=_chance(keys, _GREY, self.grey_p),
            sigma=sigma * _chance(keys, _BLUR, self.blur_p),
            solarise=_chance(keys, _SOLARISE, self.solarise_p),
            ops=None if self.rand_augment is None else self.rand_augment.draw(random.fold(keys, _RAND_AUGMENT)),
        )

    def _factors(self, keys: Tensor) -> Tensor:
        strength = torch.tensor(self.jitter)
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
        low, high = neutral - strength, neutral + strength
        low[:3].clamp_min_(0.0)
        # The stream's first draw decides whether there is jitter at all.
        factors = low + (high - low) * random.uniform(random.fold(keys, _JITTER), 5)[:, 1:]
        return torch.where(_chance(keys, _JITTER, self.jitter_p)[:, None], factors, neutral)

    @property
    def steps(self) -> Steps:
        """What is done to every image; operations that never happen are left out."""
        happens = {
            "jitter": self.jitter_p and any(self.jitter),
            "grey": self.grey_p,
            "blur": self.blur_p,
            "solarise": self.solarise_p,
            "rand_augment": self.rand_augment is not None and self.rand_augment.number,
        }
        return Steps(
            self.size,
            tuple(operation for operation in self.operations if happens[operation]),
            self.interpolation,
            self.blur_radius,
            *(() if self.rand_augment is None else (self.rand_augment.ops, self.rand_augment.fill)),
        )

    def apply(self, images: Tensor, drawn: Parameters, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """Makes the view: images uint8 [B, 3, H, W] -> float32 [B, 3, size, size] in [0, 1], or normalised with mean
        and std, where they are given."""
        return ops.augment(images, self.steps, drawn, mean, std)

    def __call__(
        self,
        images: Tensor,
        keys: Tensor,
        sizes: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> Tensor:
        """One view an image: uint8 [B, 3, H, W] -> float32 [B, 3, size, size] in [0, 1].

        keys:  int64 [B]; the same key draws the same parameters, whatever else is in the batch and on whatever device,
               and the same pixels but for rounding: a matrix product may add up otherwise in another batch size (a few
               units of 1e-7, of which RandAugment, that rounds to grey levels, can make such a level). Keys that are on
               the CPU already save a wait for the device.
        sizes: int64 [B, 2], (height, width) of images that lie padded in the top-left corner.
        mean, std: what the view is normalised with, 3 numbers each; it is not, where they are left out.
        """
        drawn = self.draw(keys, full_sizes(images) if sizes is None else sizes)
        return self.apply(images, drawn, mean, std)


def _chance(keys: Tensor, stream: int, probability: float) -> Tensor:
    """True with the given probability, by the first draw of a stream: keys [B] -> bool [B]."""
    return random.uniform(random.fold(keys, stream), 1)[:, 0] < probability


class Crops(Views):
    """Views that are each cut from the image and changed by chance; the plain one is cut from its centre.

    augments:   one distribution a view.
    crop_ratio: the plain view's size over the side that the shorter side of the image is resized to, in (0, 1].
    num_global: how many of the views, the first ones, are global crops (default: all), which a teacher may see.
    """

    def __init__(self, augments: Sequence[Augment], crop_ratio: float = 1.0, num_global: int | None = None):
        super().__init__()
        self.augments, self.crop_ratio = list(augments), crop_ratio
        self.num_global = len(self.augments) if num_global is None else num_global

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        return tuple((3, augment.size, augment.size) for augment in self.augments)

    def draw(self, sample: Sample, keys: list[Tensor]) -> list[Tensor]:
        """Reads `sample.extra["size"]` where images are padded. See `Augment.__call__`."""
        sizes = sample.extra.get("size")
        drawn = zip(self.augments, keys, strict=True)
        return [augment(sample.images, key, sizes, self._mean, self._std) for augment, key in drawn]

    def center(self, sample: Sample) -> Tensor:
        """Of the first view's size: the shorter side of the image is resized to size / crop_ratio, so that images of
        the view's size stay as they are at a crop_ratio of 1. uint8 [B, 3, H, W] -> float32 [B, 3, h, w]."""
        size, interpolation = self.augments[0].size, self.augments[0].interpolation
        return self._normalised(plain_crop(sample, size, self.crop_ratio, interpolation))

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        if type(self).center is not Crops.center:
            return None
        first = self.augments[0]
        return {"size": first.size, "crop_ratio": self.crop_ratio, "interpolation": first.interpolation}

    def _normalised(self, views: Tensor) -> Tensor:
        return views.sub_(self._mean.to(views.device)).div_(self._std.to(views.device))


def plain_crop(sample: Sample, size: int, crop_ratio: float, interpolation: resample.Interpolation) -> Tensor:
    """The centre of each image: its shorter side is resized to size / crop_ratio, and size x size pixels are cut out.

    Images uint8 [B, 3, H, W], padded where there is `extra["size"]` -> float32 [B, 3, size, size] in [0, 1].
    """
    sizes = sample.extra.get("size")
    sizes = full_sizes(sample.images) if sizes is None else sizes
    view = resample.centre_crop(sample.images, sizes, round(size / crop_ratio), size, interpolation)
    return view.clamp_(0.0, 1.0)
