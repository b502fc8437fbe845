"""An encoder for each view: CMC's halves of a colour space, and views that no encoder should read both of.

Shapes: B images, V views, C_v channels of view v, D encoder width, d embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config.hints import Layers, PositiveInt, Probability
from ..config.registry import register_model
from ..errors import UserError
from ..part import Context, Export, Model, RunInfo
from ..types import Batch
from .batch_norm import BatchNormGroups
from .encoder import Encoder, Pool
from .heads import mlp_head
from .moco import refuse_masks
from .momentum import MomentumCopy


@register_model("two_stream")
class TwoStream(Model):
    """One encoder and one head a view, and where asked a momentum copy of all of them for keys.

    Gives `features` [B, D] and `projection` [B, d] of each view, and `target` [B, d] of the momentum copy, without
    gradient; none of them is scaled to length 1. Only what the criterion reads is computed. Source: Tian, Krishnan and
    Isola, "Contrastive Multiview Coding", 2020.

    The representation is that of all encoders side by side, [B, V x D]. Where the views split the channels of the plain
    view, each encoder reads its own channels of it, in order; where each view has as many channels as the plain one,
    each encoder reads the whole plain view.

    backbone, backbone_args, pool, positions: as of model moco. Every encoder is of this kind.
    share:    one encoder for all views, which then need equal channels; the heads stay apart.
    head_*, momentum, bn_groups: as of model moco.
    """

    own_batch_norm = True

    def __init__(
        self,
        info: RunInfo,
        backbone: str = "resnet50",
        backbone_args: dict[str, Any] | None = None,
        pool: Pool = "cls",
        positions: Literal["learned", "sincos"] = "learned",
        share: bool = False,
        head_layers: Layers = 1,
        head_hidden: PositiveInt | None = None,
        head_dim: PositiveInt = 128,
        momentum: Probability | None = None,
        bn_groups: PositiveInt = 1,
    ):
        super().__init__()
        self.momentum, self.share = momentum, share
        shapes = info.view_shapes
        if len(shapes) < 2:
            raise UserError(f"model 'two_stream' has an encoder for each of several views, and there is {len(shapes)}")
        self.encoders = nn.ModuleList(
            Encoder(backbone, backbone_args or {}, shape, pool, positions) for shape in shapes[: 1 if share else None]
        )
        for view, shape in enumerate(shapes):
            if share and shape[0] != shapes[0][0]:
                raise UserError(f"share=true needs views with equal channels, got {list(map(list, shapes))}")
            self._encoder(view).check(shape)
        refuse_masks("two_stream", self.encoders[0], info)
        width = self.encoders[0].width
        self.heads = nn.ModuleList(
            mlp_head(width, head_hidden or width, head_dim, head_layers, last_norm=False, hidden_norm=False)
            for _ in shapes
        )
        self.target = None if momentum is None else MomentumCopy(self.encoders, self.heads)
        self.batches = BatchNormGroups(bn_groups, info, self.encoders)
        self.widths = {"features": width, "projection": head_dim}
        self.widths |= {} if momentum is None else {"target": head_dim}
        self.provides = self.wanted = frozenset(self.widths)

    def _encoder(self, view: int) -> Encoder:
        """The online encoder of a view."""
        return self.encoders[0 if self.share else view]

    def select(self, names: Iterable[str]) -> None:
        super().select(names)
        learns = [self.reads("projection", view) for view in range(len(self.heads))]
        for head, learn in zip(self.heads, learns, strict=True):
            head.requires_grad_(learn)
        idle = [view for view, learn in enumerate(learns) if not learn and not self.reads("features", view)]
        if idle and not self.share:
            raise UserError(
                f"the criterion reads no projection of the views {', '.join(map(str, idle))}, so that their encoders "
                "would learn nothing: make every view a query, or use share=true"
            )

    def forward(self, batch: Batch) -> dict[str, list[Tensor | None]]:
        outputs = {name: [None] * len(batch.views) for name in self.wanted}
        for number, view in enumerate(batch.views):
            if self.reads("features", number) or self.reads("projection", number):
                features = self.batches.queries(partial(_features, self._encoder(number)), view, self.training)
                if self.reads("features", number):
                    outputs["features"][number] = features
                if self.reads("projection", number):
                    outputs["projection"][number] = self.heads[number](features)
            if self.reads("target", number):
                with torch.no_grad():
                    outputs["target"][number] = self.batches.keys(partial(self._key, number), view, self.training)
        return outputs

    def _key(self, view: int, images: Tensor) -> Tensor:
        encoders, heads = self.target.networks
        return heads[view](encoders[0 if self.share else view](images)[1])

    def after_step(self, ctx: Context) -> None:
        if self.target is not None:
            self.target.update(self.encoders, self.heads, momentum=self.momentum)

    def _own_channels(self, images: Tensor) -> list[tuple[Encoder, Tensor]]:
        """Each encoder with what it reads of plain views [B, C, H, W]: its own channels, or all of them."""
        channels = [self._encoder(view).channels for view in range(len(self.heads))]
        if all(count == images.shape[1] for count in channels):
            return [(encoder, images) for encoder in self.encoders]
        if sum(channels) != images.shape[1]:
            raise UserError(
                f"the encoders read views of {' + '.join(map(str, channels))} channels, and the plain view has "
                f"{images.shape[1]}: expected the views' channels together, or as many in each view"
            )
        parts = images.split(channels, dim=1)
        return [(self._encoder(view), part) for view, part in enumerate(parts)]

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([encoder(part)[1] for encoder, part in self._own_channels(images)], dim=1)

    def feature_maps(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        maps = [encoder.feature_maps(part, layers) for encoder, part in self._own_channels(images)]
        return [torch.cat(together, dim=1) for together in zip(*maps, strict=True)]

    def exports(self) -> dict[str, Export]:
        """`backbone_1`, `backbone_2` and so on, in the order of the views; `backbone` where they share it."""
        numbers = [""] if self.share else [f"_{number}" for number in range(1, len(self.encoders) + 1)]
        ends = list(accumulate(encoder.channels for encoder in self.encoders))
        return {
            f"backbone{number}": Export(
                encoder.backbone, encoder.name, encoder.arguments, (end - encoder.channels, end)
            )
            for number, encoder, end in zip(numbers, self.encoders, ends, strict=True)
        }


def _features(encoder: Encoder, images: Tensor) -> Tensor:
    return encoder(images)[1]
