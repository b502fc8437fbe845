"""Small networks for sequences of frames and for single frames: a convolutional net, and for sequences an LSTM.

Shapes: B batch, T frames, D features, d projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..config.hints import PositiveInt
from ..config.registry import register_model
from ..errors import UserError
from ..part import Model, RunInfo
from ..types import Batch


class FrameNet(nn.Sequential):
    """Convolutions of 3 x 3 and stride 2, each with batch norm and ReLU, then the mean over places.

    [B, 3, H, W] -> [B, channels[-1]].
    """

    def __init__(self, channels: Sequence[int]):
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *channels)):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class SequenceNet(nn.Module):
    """A `FrameNet` on each frame, and an LSTM over them: [B, T, 3, H, W] -> its last state [B, hidden]."""

    def __init__(self, frames: FrameNet, width: int, hidden: int):
        super().__init__()
        self.frames, self.lstm = frames, nn.LSTM(width, hidden, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        features = self.frames(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return self.lstm(features)[0][:, -1]


@register_model("frame_sequence")
class FrameSequence(Model):
    """A convolutional net and an LSTM for views that are sequences, a convolutional net for views that are one frame.

    Source: Tian et al., "What Makes for Good Views for Contrastive Learning?", 2020, appendix B.4.

    channels:      of the convolutions (3 x 3, stride 2, batch norm, ReLU), which the mean over places follows.
    hidden:        size of the LSTM's state, the last of which is the representation.
    projector_dim: of the linear layer that ends each network.
    share:         one convolutional net for both kinds of views, or one for each.
    """

    def __init__(
        self,
        info: RunInfo,
        channels: tuple[PositiveInt, ...] = (8, 16, 32, 64),
        hidden: PositiveInt = 64,
        projector_dim: PositiveInt = 64,
        share: bool = False,
    ):
        super().__init__()
        if not channels:
            raise UserError("channels: expected one convolution at least")
        wrong = [shape for shape in info.view_shapes if len(shape) not in (3, 4) or shape[-3] != 3]
        if wrong:
            raise UserError(
                f"model 'frame_sequence' takes views of T frames, [T, 3, H, W], or of one, [3, H, W]; got {wrong[0]}"
            )
        self.share = share
        frames = FrameNet(channels)
        self.sequence = SequenceNet(frames, channels[-1], hidden)
        self.frame = frames if share else FrameNet(channels)
        self.sequence_projector = nn.Linear(hidden, projector_dim)
        self.frame_projector = nn.Linear(channels[-1], projector_dim)
        self.shapes = info.view_shapes
        # With so few channels a CPU is twice as fast like this.
        self.to(memory_format=torch.channels_last)
        first = hidden if len(self.shapes[0]) == 4 else channels[-1]
        self.widths = {"features": first, "projection": projector_dim}
        self.provides = self.wanted = frozenset(self.widths)

    def _networks(self, number: int) -> tuple[nn.Module, nn.Module]:
        """The network and the linear layer of the view of this number."""
        if len(self.shapes[number]) == 4:
            return self.sequence, self.sequence_projector
        return self.frame, self.frame_projector

    def _is_read(self, number: int) -> bool:
        return any(self.reads(name, number) for name in self.provides)

    def select(self, names: Iterable[str]) -> None:
        super().select(names)
        self.requires_grad_(False)
        for number in range(len(self.shapes)):
            network, projector = self._networks(number)
            if self._is_read(number):
                network.requires_grad_(True)
            if self.reads("projection", number):
                projector.requires_grad_(True)

    def forward(self, batch: Batch) -> dict[str, list[Tensor | None]]:
        """features [B, D] and projection [B, d], one a view; None where the criterion does not read them."""
        features, projection = [], []
        for number, view in enumerate(batch.views):
            network, projector = self._networks(number)
            features.append(network(view) if self._is_read(number) else None)
            projection.append(projector(features[-1]) if self.reads("projection", number) else None)
        return {"features": features, "projection": projection}

    def encode(self, images: Tensor) -> Tensor:
        """Sequences [B, T, 3, H, W] -> [B, hidden]; single frames [B, 3, H, W] -> [B, channels[-1]]."""
        return self.sequence(images) if images.ndim == 5 else self.frame(images)
