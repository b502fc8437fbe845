"""Two views of a moving digit that share what one chooses: the first frames, and a later one made anew but for that.

Shapes: B sequences, S side of the canvas in pixels, d side of a digit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config.registry import register_views
from ...errors import UserError, nearest
from ...types import Sample
from ..sources.moving_mnist import SEEN, MovingMNIST, render
from .base import Views

FACTORS = ("digit", "background", "position")


@register_views("moving_mnist")
class MovingViews(Views):
    """View 1 is frames 1 to 10, view 2 is frame 20 with what is not shared drawn anew in every epoch.

    For the source `moving_mnist` alone. Source: Tian et al., "What Makes for Good Views for Contrastive Learning?",
    2020, section 3.2 and appendix B.4.

    share: which of `digit`, `background` and `position` frame 20 keeps: one, or a list of several. What is kept is the
        very image of the digit, the very crop of the picture, and the digit's place in frame 20. What is not kept is
        drawn as the sequences themselves draw it: any digit image, any crop of any picture, any place, of the same
        split.
    """

    def __init__(self, source: MovingMNIST | None, share: str | tuple[str, ...] = "digit"):
        super().__init__()
        share = (share,) if isinstance(share, str) else share
        unknown = [name for name in share if name not in FACTORS]
        if unknown:
            raise UserError(f"share={unknown[0]}: unknown factor{nearest(unknown[0], FACTORS)}")
        if not share:
            raise UserError(f"share=[]: expected one of {', '.join(FACTORS)} at least, for the views to have in common")
        # Where the source could not be built, that has been said, and the size is of no matter.
        if source is not None and not isinstance(source, MovingMNIST):
            raise UserError(f"views 'moving_mnist' need source=moving_mnist, got a {type(source).__name__}")
        self.source, self.share = source, share
        self.size = 64 if source is None else source.size

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (SEEN, 3, self.size, self.size), (3, self.size, self.size)

    def draw(self, sample: Sample, keys: list[Tensor]) -> list[Tensor]:
        """Frames 1 to 10, [B, 10, 3, S, S], and frame 20 as it is shared, [B, 3, S, S]; both normalised."""
        return [self._normalised(sample.images), self._normalised(render(*self.second(sample, keys[1]))[:, 0])]

    def second(self, sample: Sample, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What view 2 is rendered of, some of it the sample's: digits uint8 [B, d, d], backdrops uint8 [B, 3, S, S] and
        places int64 [B, 1, 2]. keys: int64 [B]."""
        extra, device = sample.extra, sample.images.device
        if "backdrop" not in extra:
            raise UserError("views 'moving_mnist' need images of source=moving_mnist, and these are of another source")
        pool = self.source.pools[int(extra["held_out"].any())]
        drawn = pool.draw(keys.cpu())
        return (
            extra["ink"] if "digit" in self.share else pool.ink(drawn).to(device),
            extra["backdrop"] if "background" in self.share else pool.backdrops(drawn).to(device),
            extra["place"][:, None] if "position" in self.share else pool.places(drawn, 1).to(device),
        )

    def center(self, sample: Sample) -> Tensor:
        """Frames 1 to 10: [B, 10, 3, S, S], normalised."""
        return self._normalised(sample.images)

    def show(self, view: Tensor, number: int | None) -> Tensor:
        """The last frame of a sequence, and a single frame as it is: [B, 3, S, S] in [0, 1]."""
        frame = view if view.ndim == 4 else view[:, -1]
        return (frame * self._std.to(view.device) + self._mean.to(view.device)).clamp_(0.0, 1.0)

    def _normalised(self, frames: Tensor) -> Tensor:
        """uint8 [..., 3, S, S] -> float32 of the same shape."""
        return frames.to(torch.float32).sub_(self._mean * 255).div_(self._std * 255)
