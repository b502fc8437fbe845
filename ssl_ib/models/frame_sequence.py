"""Small networks for sequences of frames and for single frames: a convolutional net, and for sequences an LSTM.

Shapes: B batch, T frames, D features, d projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..config.hints import PositiveInt
from ..config.registry import register_model
from ..errors import UserError
from ..part import Model, RunInfo
from ..types import Batch


class FrameNet(nn.Sequential):
    """Convolutions of 3 x 3, each with batch norm and ReLU, then the mean over places: [B, 3, H, W] -> [B, D]."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int]):
        layers: list[nn.Module] = []
        for (before, after), stride in zip(pairwise((3, *channels)), strides, strict=True):
            convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class SequenceNet(nn.Module):
    """A `FrameNet` on each frame, and an LSTM over them: [B, T, 3, H, W] -> its last state, [B, hidden]."""

    def __init__(self, frames: FrameNet, width: int, hidden: int):
        super().__init__()
        self.frames, self.lstm = frames, nn.LSTM(width, hidden, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        features = self.frames(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return self.lstm(features)[0][:, -1]


@register_model("frame_sequence")
class FrameSequence(Model):
    """A convolutional net and an LSTM for views that are sequences, a convolutional net for views that are one frame.

    Each ends with a linear layer. Source: Tian et al., "What Makes for Good Views for Contrastive Learning?", 2020,
    appendix B.4, which does not say what strides and norms the convolutions have.

    channels:      of the convolutions (3 x 3, batch norm, ReLU), which the mean over places follows.
    strides:       of the convolutions, as many as there are channels.
    hidden:        size of the LSTM's state, the last of which is the representation of a sequence.
    projector_dim: size of what the linear layers give.
    share:         what the views share. none: each kind of view has a network of its own. frames: the convolutional net
                   is the same. all: everything is, and a single frame is a sequence of one.
    """

    def __init__(
        self,
        info: RunInfo,
        channels: tuple[PositiveInt, ...] = (8, 16, 32, 64),
        strides: tuple[PositiveInt, ...] = (2, 2, 2, 2),
        hidden: PositiveInt = 64,
        projector_dim: PositiveInt = 64,
        share: Literal["none", "frames", "all"] = "none",
    ):
        super().__init__()
        if not channels or len(strides) != len(channels):
            raise UserError(f"strides={strides}: expected a stride for each of the channels {channels}")
        wrong = [shape for shape in info.view_shapes if len(shape) not in (3, 4) or shape[-3] != 3]
        if wrong:
            raise UserError(
                f"model 'frame_sequence' takes views of T frames, [T, 3, H, W], or of one, [3, H, W]; got {wrong[0]}"
            )
        self.share, self.shapes = share, info.view_shapes
        frames = FrameNet(channels, strides)
        self.sequence = SequenceNet(frames, channels[-1], hidden)
        self.sequence_projector = nn.Linear(hidden, projector_dim)
        if share == "all":
            self.frame = self.frame_projector = None
        else:
            self.frame = frames if share == "frames" else FrameNet(channels, strides)
            self.frame_projector = nn.Linear(channels[-1], projector_dim)
        # With so few channels a CPU is faster like this.
        self.to(memory_format=torch.channels_last)
        self.widths = {"features": hidden if self._is_sequence(self.shapes[0]) else channels[-1]}
        self.widths |= {"projection": projector_dim}
        self.provides = self.wanted = frozenset(self.widths)

    def _is_sequence(self, shape: tuple[int, ...]) -> bool:
        """Whether a view of this shape goes through the network for sequences."""
        return len(shape) == 4 or self.share == "all"

    def _networks(self, number: int) -> tuple[nn.Module, nn.Module]:
        """The network and the linear layer of the view of this number."""
        if self._is_sequence(self.shapes[number]):
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
            _, projector = self._networks(number)
            features.append(self.encode(view) if self._is_read(number) else None)
            projection.append(projector(features[-1]) if self.reads("projection", number) else None)
        return {"features": features, "projection": projection}

    def trained_encoders(self) -> list[nn.Module]:
        """Those networks that are trained; none is a timm model, so that none is left behind."""
        return [self.sequence] if self.frame is None else [self.sequence, self.frame]

    def encode(self, images: Tensor) -> Tensor:
        """Sequences [B, T, 3, H, W] -> [B, hidden]; single frames [B, 3, H, W] -> [B, D]."""
        if not self._is_sequence(tuple(images.shape[1:])):
            return self.frame(images)
        return self.sequence(images if images.ndim == 5 else images[:, None])
