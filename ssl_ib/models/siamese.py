"""Two (or more) views through one encoder and its heads: what every plain contrastive method trains.

Shapes: B batch, K kept patches, P prefix tokens, D encoder width, d projection width.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from ..config.hints import LayerCount, Layers, PositiveInt, Probability
from ..config.registry import register_model
from ..errors import UserError
from ..part import Context, RunInfo
from ..types import Batch
from .encoder import Encoder, Pool
from .encoder_model import EncoderModel
from .heads import mlp_head
from .momentum import MomentumCopy


@register_model("siamese")
class Siamese(EncoderModel):
    """Encoder, projector, and where asked a predictor and a momentum target.

    backbone, backbone_args: a timm model; vision transformers can be masked, others cannot.
    pool:             the class token or the mean of the visible patches stands for the image.
    projector_*:      MLP with batch norm; `projector_norm` ends it with one (SimCLR v2, MoCo v3).
    predictor_layers: 0 leaves the predictor out; BYOL and MoCo v3 have 2.
    momentum:         of the target network (BYOL: .99 to 1, cosine); none leaves the target out.
    target_masked:    whether the target sees the masked views too (MRCL Eq. 15), or the whole ones.
    freeze_patch_embed: keep the patch projection at its random start (MoCo v3).
    """

    def __init__(
        self,
        info: RunInfo,
        backbone: str = "vit_base_patch16_224",
        backbone_args: dict[str, Any] | None = None,
        pool: Pool = "cls",
        positions: Literal["learned", "sincos"] = "learned",
        projector_layers: Layers = 3,
        projector_hidden: PositiveInt = 4096,
        projector_dim: PositiveInt = 256,
        projector_norm: bool = True,
        predictor_layers: LayerCount = 0,
        predictor_hidden: PositiveInt = 4096,
        predictor_norm: bool = True,
        momentum: Probability | None = None,
        target_masked: bool = True,
        freeze_patch_embed: bool = False,
    ):
        super().__init__()
        self.momentum, self.target_masked = momentum, target_masked
        if len({shape[0] for shape in info.view_shapes}) > 1:
            raise UserError(f"model 'siamese' needs views with equal channels, got {info.view_shapes}")
        self.encoder = Encoder(backbone, backbone_args or {}, info.view_shapes[0], pool, positions)
        for shape in info.view_shapes:
            self.encoder.check(shape)
        if freeze_patch_embed:
            self.encoder.freeze_patch_embed()
        self.projector = mlp_head(self.encoder.width, projector_hidden, projector_dim, projector_layers, projector_norm)
        self.predictor = (
            mlp_head(projector_dim, predictor_hidden, projector_dim, predictor_layers, predictor_norm)
            if predictor_layers
            else None
        )
        self.target = None if momentum is None else MomentumCopy(self.encoder, self.projector)
        self.widths = {"tokens": self.encoder.width, "features": self.encoder.width}
        self.widths |= dict.fromkeys(("projection", "prediction", "target"), projector_dim)
        provides = {"features", "projection"}
        provides |= {"tokens"} if self.encoder.is_vit else set()
        provides |= {"prediction"} if self.predictor is not None else set()
        provides |= {"target"} if self.target is not None else set()
        self.provides = self.wanted = frozenset(provides)

    def select(self, names) -> None:
        super().select(names)
        if self.predictor is not None and "prediction" not in self.wanted:
            self.predictor.requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, list[Tensor]]:
        """tokens [B*N, P + K, D], features [B*N, D], projection, prediction and target [B*N, d], one a view."""
        keeps = [None if masks is None else masks.keep for masks in batch.masks]
        tokens, features = encode_views(self.encoder, batch.views, keeps)
        outputs = {"features": features, "projection": [self.projector(f) for f in features]}
        if self.encoder.is_vit:
            outputs["tokens"] = tokens
        if self.predictor is not None and "prediction" in self.wanted:
            outputs["prediction"] = [self.predictor(z) for z in outputs["projection"]]
        if self.target is not None and "target" in self.wanted:
            outputs["target"] = self._targets(batch.views, keeps if self.target_masked else [None] * len(keeps))
        return outputs

    def _targets(self, views: list[Tensor], keeps: list[Tensor | None]) -> list[Tensor]:
        encoder, projector = self.target.networks
        with torch.no_grad():
            _, features = encode_views(encoder, views, keeps)
            return [projector(f) for f in features]

    def after_step(self, ctx: Context) -> None:
        if self.target is not None:
            self.target.update(self.encoder, self.projector, momentum=self.momentum)


def encode_views(
    encoder: Encoder, views: list[Tensor], keeps: list[Tensor | None], jointly: bool | None = None
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Tokens and features of each view.

    views: [B, C, H, W] each; keeps: int64 [B, N, K] or None each. An image with N masks becomes N rows.
    jointly: whether consecutive views of one shape go through the encoder together. Those of a vision transformer do by
    default. Other backbones may normalise over the batch, so each of their views is a batch of its own, as in the
    published methods of two views.
    """
    tokens, features = [], []

    pairs = list(zip(views, keeps, strict=True))
    jointly = encoder.is_vit if jointly is None else jointly

    def sort(number: int) -> Any:
        view, keep = pairs[number]
        return (view.shape, None if keep is None else keep.shape) if jointly else number

    for _, group in groupby(range(len(pairs)), key=sort):
        images, kept = zip(*(pairs[number] for number in group), strict=True)
        stacked = images[0] if len(images) == 1 else torch.cat(images)
        both = encoder(stacked, None if kept[0] is None else torch.cat(kept))
        tokens += [None] * len(images) if both[0] is None else list(both[0].chunk(len(images)))
        features += list(both[1].chunk(len(images)))
    return tokens, features
