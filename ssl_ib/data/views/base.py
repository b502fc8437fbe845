"""What a views recipe is: which views are drawn of an image, which plain view is evaluated, and how they are shown.

Shapes: B images, C channels, H x W pixels of the source, h x w of a view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...types import Sample
from ..statistics import Statistics


class Views(nn.Module, ABC):
    """The views of a recipe, drawn in batch, and the plain view that is evaluated.

    A recipe's constructor may ask for the run's source, as an argument `source`, and whether all state is loaded from a
    checkpoint afterwards, as an argument `resumed`. Parameters and buffers of views are saved in checkpoints, but for
    the statistics, which are measured anew.

    shapes:     of each view without the batch, such as (3, h, w), (1, h, w), or (10, 3, h, w) of a film.
    num_global: how many of the views, the first ones, a teacher may see; None for all.
    """

    registry_kind: ClassVar[str] = "views"
    num_global: int | None = None
    _mean: Tensor
    _std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_mean", torch.zeros(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.ones(3, 1, 1), persistent=False)

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each view, without the batch."""

    @abstractmethod
    def draw(self, sample: Sample, keys: list[Tensor]) -> list[Tensor]:
        """The views of some images, normalised: float32 [B, *shape] each.

        keys: an int64 [B] a view, the same for the same image, epoch and view; all chance comes from them.
        """

    @abstractmethod
    def center(self, sample: Sample) -> Tensor:
        """The plain view that is evaluated, without chance, normalised: what the model's `encode` takes, [B, ...]."""

    def measure(self, source: Any) -> None:
        """Finds out what views are normalised with, once, before any is drawn: by default the source's statistics."""
        self.normalize(*source.statistics())

    def normalize(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets what is subtracted from each channel of the plain view and what it is divided by; until then nothing.

        Raises UserError where a deviation is not positive.
        """
        if len(mean) != len(std) or not len(mean) or min(std) <= 0:
            raise UserError(f"expected a mean and a positive std for each channel, got {mean} and {std}")
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self._mean.device).view(-1, 1, 1) for values in (mean, std)
        )

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation of each channel of the plain view, as `normalize` got them."""
        return tuple(self._mean.flatten().tolist()), tuple(self._std.flatten().tolist())

    def show(self, view: Tensor, number: int | None) -> Tensor | None:
        """A view as a picture: [B, *shape], normalised -> [B, 3, h, w] in [0, 1]; None where it cannot be shown.

        number: which of the views it is, or None for the plain one. By default any view of as many channels as the
        plain one has, 1 or 3, is taken back to pixels.
        """
        if view.ndim != 4 or view.shape[1] not in (1, 3) or view.shape[1] != len(self._mean):
            return None
        pixels = (view * self._std.to(view.device) + self._mean.to(view.device)).clamp_(0.0, 1.0)
        return pixels.expand(-1, 3, -1, -1)

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """How the plain view is made of an image, where that is a resize and a crop: `size` in pixels, `crop_ratio` and
        `interpolation` (record/backbone.py). None where it is anything else."""
        return None
