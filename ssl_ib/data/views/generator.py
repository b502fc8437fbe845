"""InfoMin's generator of views: an invertible map of an image's channels, whose first channel is one view and whose
other two are the other (Tian et al., 2020, section 4.2). A run trains one, and `learned_split` draws views from it.

Shapes: B images, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .colour_spaces import YDBDR
from .couplings import Couplings, Flow

Space = Literal["rgb", "ydbdr"]


class Generator(nn.Module):
    """Couplings on the channels of a colour space: [B, 3, h, w] -> [B, 3, h, w]; starts as the colour space alone.

    space:     the channels that the couplings get: "rgb", or "ydbdr", in units of the channels' mean deviation.
    flow, blocks, hidden, clip: as for `Couplings`.
    mean, std: what the images it reads are normalised with, channel by channel, for pixels in [0, 1].

    These arguments travel with the weights, so that any generator can load another's state_dict.
    """

    def __init__(
        self,
        space: Space = "rgb",
        flow: Flow = "nvp",
        blocks: int = 6,
        hidden: int = 32,
        clip: float = 1.0,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ):
        super().__init__()
        self._build(space, flow, blocks, hidden, clip, list(mean), list(std))

    def _build(self, space, flow, blocks, hidden, clip, mean, std) -> None:
        self.arguments = {"space": space, "flow": flow, "blocks": blocks, "hidden": hidden, "clip": clip}
        self.arguments |= {"mean": mean, "std": std}
        self.couplings = Couplings(flow, blocks, hidden, clip)
        matrix = (
            torch.tensor(YDBDR) * torch.tensor(std) / torch.tensor(std).mean() if space == "ydbdr" else torch.eye(3)
        )
        self.register_buffer("_space", matrix, persistent=False)

    def get_extra_state(self) -> dict[str, Any]:
        return self.arguments

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Becomes a generator of these arguments, whose weights are about to be loaded."""
        if state != self.arguments:
            device, trained = self._space.device, any(p.requires_grad for p in self.parameters())
            self._build(**state)
            self.to(device).requires_grad_(trained)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] as this generator reads them: [B, 3, h, w] -> [B, 3, h, w]."""
        mean, std = (pixels.new_tensor(self.arguments[name]).view(3, 1, 1) for name in ("mean", "std"))
        return (pixels - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images -> the first view's channel above the other view's two: [B, 3, h, w] -> [B, 3, h, w]."""
        return self.couplings(_mapped(images, self._space))

    def inverse(self, views: Tensor) -> Tensor:
        """The pixels in [0, 1] of which `forward` makes these: [B, 3, h, w] -> [B, 3, h, w]."""
        images = _mapped(self.couplings.inverse(views), torch.linalg.inv(self._space))
        mean, std = (images.new_tensor(self.arguments[name]).view(3, 1, 1) for name in ("mean", "std"))
        return images * std + mean


def _mapped(images: Tensor, matrix: Tensor) -> Tensor:
    """Each pixel's channels through a 3 x 3 matrix, in float32 at least."""
    with torch.autocast(images.device.type, enabled=False):
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        return (matrix.to(images.dtype) @ images.flatten(2)).view_as(images)
