"""An online encoder for queries and, where asked, its moving average for keys: MoCo, InfoMin, InstDis and PIRL.

Shapes: B images, P patches of a jigsaw view, D encoder width, d embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config.hints import Layers, PositiveInt, Probability
from ..config.registry import register_model
from ..errors import UserError
from ..part import Context, RunInfo
from ..types import Batch
from .batch_norm import BatchNormGroups
from .encoder import Encoder, Pool
from .encoder_model import EncoderModel
from .heads import mlp_head
from .momentum import MomentumCopy


class JigsawHead(nn.Module):
    """One embedding of all patches of an image, from the features of each: [B, P, D] -> [B, d].

    Every patch goes through the same head, and a linear layer reads the results side by side, in the order of the
    patches. Source: the head of PIRL's jigsaw branch, as InfoMin's code has it.
    """

    def __init__(self, patch: nn.Module, num_patches: int, width: int):
        super().__init__()
        self.patch, self.together = patch, nn.Linear(num_patches * width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.together(self.patch(features.flatten(0, 1)).view(len(features), -1))


@register_model("moco")
class MoCo(EncoderModel):
    """An encoder and a head for queries, and where asked a momentum copy of both for keys.

    Gives `features` [B, D] and `projection` [B, d] of the online network, and `target` [B, d] of the momentum copy,
    without gradient; none of them is scaled to length 1. Only what the criterion reads is computed: with `queue_nce`,
    one online pass for each query and one pass of the copy for the key. A view of shape (P, 3, h, w) is a jigsaw one:
    its P patches go through the same encoder, and a head of their own puts them together. Its `features` are the mean
    of its patches', and it cannot be a key.

    backbone, backbone_args: a timm model; `stem: cifar` suits a ResNet to small images.
    pool, positions: of a vision transformer. Views of other sizes than the first get resampled positions.
    head_layers:  1 for a linear head, 2 for MoCo v2's; ReLU and no batch norm between them, all with biases.
    head_hidden:  width between the layers; none for the encoder's.
    head_dim:     d, width of the embedding.
    momentum:     of the copy (MoCo: .999); none leaves it out, as InstDis, PIRL and CMC do.
    bn_groups:    how many batches batch norm sees in a step, over all processes: as many as the published runs had
                  GPUs, 8. Each process has at least one. Queries stay in their order. Keys change places over all
                  groups first (Shuffle-BN), so that a query and its key are normalised with different images. An
                  encoder without batch norm reads all images in one pass.

    Batch norm never goes by the images of several processes, nor of several groups.
    """

    own_batch_norm = True

    def __init__(
        self,
        info: RunInfo,
        backbone: str = "resnet50",
        backbone_args: dict[str, Any] | None = None,
        pool: Pool = "cls",
        positions: Literal["learned", "sincos"] = "learned",
        head_layers: Layers = 2,
        head_hidden: PositiveInt | None = None,
        head_dim: PositiveInt = 128,
        momentum: Probability | None = 0.999,
        bn_groups: PositiveInt = 1,
    ):
        super().__init__()
        self.momentum = momentum
        shapes = info.view_shapes
        self.jigsaws = frozenset(view for view, shape in enumerate(shapes) if len(shape) == 4)
        self.plain = frozenset(range(len(shapes))) - self.jigsaws
        first = min(self.plain, default=0)
        self.encoder = Encoder(backbone, backbone_args or {}, shapes[first][-3:], pool, positions)
        for view, shape in enumerate(shapes):
            self.encoder.check(shape[-3:] if view in self.jigsaws else shape)
        refuse_masks("moco", self.encoder, info)
        width = self.encoder.width
        heads = [
            mlp_head(width, head_hidden or width, head_dim, head_layers, last_norm=False, hidden_norm=False)
            for _ in range(1 + bool(self.jigsaws))
        ]
        self.projector, self.jigsaw = heads[0], None
        if self.jigsaws:
            counts = {shapes[view][0] for view in self.jigsaws}
            if len(counts) > 1:
                raise UserError(f"model 'moco' has one jigsaw head, and jigsaw views have {sorted(counts)} patches")
            self.jigsaw = JigsawHead(heads[1], counts.pop(), head_dim)
        self.target = None if momentum is None else MomentumCopy(self.encoder, self.projector)
        self.batches = BatchNormGroups(bn_groups, info, [self.encoder])
        self.widths = {"features": width, "projection": head_dim}
        self.widths |= {} if momentum is None else {"target": head_dim}
        self.provides = self.wanted = frozenset(self.widths)

    def select(self, names: Iterable[str]) -> None:
        super().select(names)
        if any(self.reads("target", view) for view in self.jigsaws):
            raise UserError(f"a jigsaw view cannot be a key, and the criterion reads 'target' of {set(self.jigsaws)}")
        for head, views in ((self.projector, self.plain), (self.jigsaw, self.jigsaws)):
            if head is not None:
                head.requires_grad_(any(self.reads("projection", view) for view in views))

    def forward(self, batch: Batch) -> dict[str, list[Tensor | None]]:
        outputs = {name: [None] * len(batch.views) for name in self.wanted}
        for number, view in enumerate(batch.views):
            if self.reads("features", number) or self.reads("projection", number):
                features = self.batches.queries(self._features, view, self.training)
                if self.reads("features", number):
                    outputs["features"][number] = features.mean(dim=1) if number in self.jigsaws else features
                if self.reads("projection", number):
                    head = self.jigsaw if number in self.jigsaws else self.projector
                    outputs["projection"][number] = head(features)
            if self.reads("target", number):
                with torch.no_grad():
                    outputs["target"][number] = self.batches.keys(self._key, view, self.training)
        return outputs

    def _features(self, view: Tensor) -> Tensor:
        """Online features of a plain view [B, D], or of each patch of a jigsaw one [B, P, D]."""
        if view.ndim == 4:
            return self.encoder(view)[1]
        return self.encoder(view.flatten(0, 1))[1].unflatten(0, view.shape[:2])

    def _key(self, view: Tensor) -> Tensor:
        encoder, projector = self.target.networks
        return projector(encoder(view)[1])

    def after_step(self, ctx: Context) -> None:
        if self.target is not None:
            self.target.update(self.encoder, self.projector, momentum=self.momentum)


def refuse_masks(model: str, encoder: Encoder, info: RunInfo) -> None:
    """Raises UserError where the run masks the patches of views, which this model would read whole."""
    grids = {encoder.grid(shape) for shape in info.view_shapes} - {None}
    if any(info.masks(grid) is not None for grid in grids):
        raise UserError(f"model {model!r} reads whole views: use masker=none, or model siamese")
