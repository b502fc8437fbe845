"""What every model around one encoder answers alike: how it evaluates, cuts views into patches, and is exported."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..part import Model
from ..types import Batch, Masks
from .encoder import Encoder


class EncoderModel(Model):
    """A model whose representation is that of its `encoder`."""

    encoder: Encoder

    @property
    def backbone(self) -> nn.Module:
        return self.encoder.backbone

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)[1]

    def feature_maps(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        return self.encoder.feature_maps(images, layers)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        return self.encoder.grid(shape)

    def export(self) -> tuple[str, dict[str, Any]]:
        return self.encoder.name, self.encoder.arguments


class MaskedImageModel(EncoderModel):
    """An encoder of masked views, and a decoder that is neither run nor trained where nobody reads what it rebuilds."""

    decoder: nn.Module

    def select(self, names) -> None:
        super().select(names)
        self.decoder.requires_grad_("reconstruction" in self.wanted)

    @abstractmethod
    def outputs_of(self, view: Tensor, masks: Masks | None) -> dict[str, Tensor]:
        """The outputs of one view [B, C, H, W] under its masks, by name."""

    def forward(self, batch: Batch) -> dict[str, list[Tensor]]:
        views = [self.outputs_of(view, masks) for view, masks in zip(batch.views, batch.masks, strict=True)]
        return {name: [view[name] for view in views] for name in views[0]}


def check_final_norm(model: str, encoder: Encoder) -> None:
    """Raises UserError where a vision transformer norms its pooled features in place of its tokens."""
    vit = encoder.backbone
    if encoder.is_vit and list(vit.fc_norm.parameters()):
        raise UserError(
            f"model {model!r} needs a vision transformer that norms its tokens, and {encoder.name!r} norms what "
            "comes after: set backbone_args.fc_norm=false"
        )


def one_shape(model: str, view_shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """The shape [C, H, W] of every view. Raises UserError where they differ."""
    if len(set(view_shapes)) > 1:
        raise UserError(f"model {model!r} reconstructs views of one shape, got {view_shapes}")
    return view_shapes[0]
