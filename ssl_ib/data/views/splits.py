"""Views that show different parts of one image: two of its channels' groups, two bands of frequencies, two patches.

Each view has an encoder of its own. What both share is set by how the image is divided (Tian et al., InfoMin,
2020): the less they share, the more an encoder has to leave out.

Shapes: B images, C channels of the divided image, h x w pixels of a view.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ... import distributed, random
from ...config.hints import Count, PositiveInt
from ...config.registry import register_views
from ...errors import UserError
from ...ops.pixels import resample
from ...types import Sample
from ..sources.base import InMemory
from . import colour_spaces
from .augment import Augment, plain_crop
from .base import Views
from .boxes import full_sizes

#: Training images that statistics are measured on, spread over the set: of a set in memory, and of one that streams.
_MEASURED, _MEASURED_STREAMED = 2048, 512


class Split(Views):
    """Two views that are the first and the other channels of one image: both come from the same crop.

    The plain view has all channels. Each is normalised with statistics of its own, measured on plain views.

    augment:    how the one image is drawn; its key is that of the first view.
    crop_ratio: as for Crops.
    first:      channels of the first view.
    statistics: mean and deviation of each channel, where they are not to be measured.
    """

    def __init__(
        self,
        augment: Augment,
        crop_ratio: float,
        channels: int,
        first: int,
        statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ):
        super().__init__()
        self.augment, self.crop_ratio = augment, crop_ratio
        self.channels, self.first = channels, first
        self._source: Any = None
        self._stated = statistics
        self.normalize(*statistics or ((0.0,) * channels, (1.0,) * channels))

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        size = self.augment.size
        return ((self.first, size, size), (self.channels - self.first, size, size))

    @abstractmethod
    def divide(self, pixels: Tensor) -> Tensor:
        """The channels that are divided between the views: float32 [B, 3, h, w] in [0, 1] -> [B, C, h, w]."""

    def draw(self, sample: Sample, keys: list[Tensor]) -> list[Tensor]:
        pixels = self.augment(sample.images, keys[0], sample.extra.get("size"))
        divided = self._normalised(self.divide(pixels))
        return [part.contiguous() for part in divided.tensor_split((self.first,), 1)]

    def center(self, sample: Sample) -> Tensor:
        return self._normalised(self.divide(self._plain(sample)))

    def measure(self, source: Any) -> None:
        """On some thousand training images, or on some hundred where they stream; always the same ones.

        Of several processes each reads its share.
        """
        if self._stated is not None or self._source is source:
            return
        images = source.train()
        count = min(len(images), _MEASURED if images.in_memory else _MEASURED_STREAMED)

        def sums(index: Tensor) -> list[list[float]]:
            channels = self.divide(self._plain(images.gather(index))).double()
            return torch.stack([channels.mean((2, 3)).sum(0), channels.square().mean((2, 3)).sum(0)]).tolist()

        chunks = (torch.arange(count) * len(images) // count).split(64)
        total, squares = torch.tensor(distributed.shared(sums, chunks), dtype=torch.float64).sum(0)
        mean = total / count
        # At least a grey level's, so that one can divide by it: the colours of grey images do not vary.
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
        self.normalize(mean.tolist(), deviation.tolist())
        self._source = source

    def _plain(self, sample: Sample) -> Tensor:
        return plain_crop(sample, self.augment.size, self.crop_ratio, self.augment.interpolation)

    def _normalised(self, channels: Tensor) -> Tensor:
        return (channels - self._mean.to(channels.device)) / self._std.to(channels.device)

    def _denormalised(self, view: Tensor, number: int | None) -> Tensor:
        """A view's channels (of all views where number is None) as `divide` gave them."""
        part = {None: slice(None), 0: slice(self.first), 1: slice(self.first, None)}[number]
        return view * self._std[part].to(view.device) + self._mean[part].to(view.device)


class ColourSplit(Split):
    """The first channel of a colour space, and the other two. See `Split` and `colour_spaces`."""

    def __init__(
        self,
        augment: Augment,
        space: colour_spaces.Space,
        crop_ratio: float = 1.0,
        statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ):
        super().__init__(augment, crop_ratio, 3, 1, statistics)
        self.space = space

    def divide(self, pixels: Tensor) -> Tensor:
        return colour_spaces.convert(pixels, self.space)

    def show(self, view: Tensor, number: int | None) -> Tensor | None:
        """The first channel as grey, the other two with a neutral first one, and the plain view as the image it is."""
        channels = self._denormalised(view, number)
        low, high, neutral = colour_spaces.FIRST[self.space]
        if number == 0:
            return ((channels - low) / (high - low)).clamp(0.0, 1.0).expand(-1, 3, -1, -1)
        if number == 1:
            channels = torch.cat([torch.full_like(channels[:, :1], neutral), channels], 1)
        return colour_spaces.invert(channels, self.space)


class FrequencySplit(Split):
    """The blurred image, and what the blur took away: low and high frequencies, three channels each. See `Split`.

    sigma: of the Gaussian blur, in pixels of the view; its kernel reaches three times as far.
    """

    def __init__(self, augment: Augment, sigma: float, crop_ratio: float = 1.0):
        super().__init__(augment, crop_ratio, 6, 3)
        self.sigma = sigma

    def divide(self, pixels: Tensor) -> Tensor:
        radius = min(math.ceil(3 * self.sigma), pixels.shape[-1] - 1)
        sigma = torch.full((len(pixels),), self.sigma, device=pixels.device)
        low = resample.gaussian_blur(pixels, sigma, radius)
        return torch.cat([low, pixels - low], 1)

    def show(self, view: Tensor, number: int | None) -> Tensor | None:
        """The high frequencies around a middle grey; the plain view as the image that both add up to."""
        channels = self._denormalised(view, number)
        if number is None:
            channels = channels[:, :3] + channels[:, 3:]
        return (channels + 0.5 if number == 1 else channels).clamp(0.0, 1.0)


@register_views("patches")
class Patches(Views):
    """Two square patches of an image at an offset of (distance, distance) pixels (Tian et al., InfoMin, 2020).

    The further they are apart, the less they share. Nothing else is changed. Both encoders are evaluated on the whole
    image, its shorter side resized to the side of a patch.

    size:     pixels of a patch's side.
    distance: pixels of the image by which the second patch lies further down and further right; at least size for
              patches that do not overlap.
    """

    def __init__(
        self,
        size: PositiveInt = 64,
        distance: Count = 64,
        interpolation: resample.Interpolation = "bilinear",
        source: Any = None,
    ):
        super().__init__()
        self.size, self.distance, self.interpolation = size, distance, interpolation
        for which, images in (("training", source and source.train()), ("held-out", source and source.val())):
            if isinstance(images, InMemory):
                self._room(images.sizes, torch.arange(len(images)), f"{which} image")

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        return ((3, self.size, self.size),) * 2

    def draw(self, sample: Sample, keys: list[Tensor]) -> list[Tensor]:
        """The first view's key decides where both patches lie."""
        sizes = sample.extra.get("size")
        sizes = full_sizes(sample.images) if sizes is None else sizes.cpu()
        room = self._room(sizes, sample.index, "image")
        first = random.randint(keys[0].cpu(), 2, room + 1)
        corners = torch.stack([first, first + self.distance], 1)
        patches = resample.cut(sample.images, corners[..., 0], corners[..., 1], self.size)
        return [self._normalised(patches[:, number]) for number in range(2)]

    def center(self, sample: Sample) -> Tensor:
        pixels = plain_crop(sample, self.size, 1.0, self.interpolation)
        return (pixels - self._mean.to(pixels.device)) / self._std.to(pixels.device)

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {"size": self.size, "crop_ratio": 1.0, "interpolation": self.interpolation}

    def _normalised(self, patches: Tensor) -> Tensor:
        return (patches / 255 - self._mean.to(patches.device)) / self._std.to(patches.device)

    def _room(self, sizes: Tensor, index: Tensor, kind: str) -> Tensor:
        """How many pixels both patches together can be moved down and right: int64 [B, 2].

        sizes: int64 [B, 2] of (height, width). Raises UserError where they do not fit into an image.
        """
        room = sizes - (self.size + self.distance)
        small = (room < 0).any(1).nonzero()[:, 0]
        if len(small):
            (height, width), number = sizes[small[0]].tolist(), index[small[0]].item()
            raise UserError(
                f"distance={self.distance}: two patches of {self.size} pixels (size) at this distance need images of "
                f"at least {self.size + self.distance} pixels a side; {kind} {number} has {height} x {width} pixels"
            )
        return room
