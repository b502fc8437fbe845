"""InfoMin's game of learned views: a generator, two critics that it plays against, two classifiers that it helps.

Shapes: B images, n of them with a known label, h x w pixels, D encoder width, d projection width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..config.hints import Layers, Positive, PositiveInt
from ..config.registry import register_model
from ..data.views.couplings import Flow
from ..data.views.generator import Generator, Space
from ..errors import UserError
from ..part import Model, ParamGroup, RunInfo
from ..types import Batch
from .encoder import Encoder, Pool
from .heads import mlp_head
from .reversal import reverse


@register_model("view_generator")
class ViewGenerator(Model):
    """Splits an image in two views, of one and of two channels, by a learned map that can be inverted.

    Of the one view that is drawn of an image, the generator g makes v1 [B, 1, h, w] and v2 [B, 2, h, w]. The critics f1
    and f2 project them, and a gradient reversal stands between g and the critics: where these minimise a loss of
    `projection`, g maximises it. The classifiers c1 and c2 have encoders of their own and no reversal: g, c1 and c2
    minimise a loss of `logits` together. Source: Tian et al., "What Makes for Good Views for Contrastive Learning?",
    2020, section 4.2. The run leaves its views: `views={name: learned_split, run: DIR}` draws them.

    space:       colour space of the pixels before the couplings; v1 starts as its first channel (in ydbdr the luma).
    flow:        "vp" couplings shift channels, and preserve volume; "nvp" couplings scale them too.
    blocks:      couplings; hidden: width of their networks; nvp_clip: bound of a coupling's log scale.
    view_norm:   give critics and classifiers each channel of the views standardised over the batch. The statistics are
                 constants to the gradient, so that g gains nothing by mere scale; evaluations use running ones.
    backbone, backbone_args, pool: the timm model of each of the four encoders.
    projector_*: each critic's head, an MLP without batch norm.
    lr_g, lr_f:  learning rates of the generator, and of critics and classifiers; they follow the shape of the run's.

    Its representation is that of both critics, or of both classifiers where the criterion reads `logits` alone.
    """

    provides = frozenset({"projection", "logits"})
    counts = {"projection": 2, "logits": 2}

    def __init__(
        self,
        info: RunInfo,
        space: Space = "rgb",
        flow: Flow = "nvp",
        blocks: Layers = 6,
        hidden: PositiveInt = 32,
        nvp_clip: Positive = 1.0,
        view_norm: bool = True,
        backbone: str = "resnet18",
        backbone_args: dict[str, Any] | None = None,
        pool: Pool = "mean",
        projector_layers: Layers = 2,
        projector_hidden: PositiveInt = 256,
        projector_dim: PositiveInt = 128,
        lr_g: Positive = 2e-4,
        lr_f: Positive = 6e-4,
    ):
        super().__init__()
        # Not under their own names, so that a schedule of one is refused: they are read once.
        self._lr_g, self._lr_f = lr_g, lr_f
        if len(info.view_shapes) != 1 or len(info.view_shapes[0]) != 3 or info.view_shapes[0][0] != 3:
            raise UserError(
                "model 'view_generator' makes two views of one that is drawn, [3, h, w], and here are drawn "
                f"{', '.join(str(list(shape)) for shape in info.view_shapes)}: use views=plain"
            )
        _, height, width = info.view_shapes[0]
        self.generator = Generator(space, flow, blocks, hidden, nvp_clip, info.mean(), info.deviation())
        self.norms = nn.ModuleList([Standardised(1), Standardised(2)]) if view_norm else None
        self.num_classes = len(info.classes())

        def encoder(channels: int) -> Encoder:
            return Encoder(backbone, backbone_args or {}, (channels, height, width), pool)

        self.critics = nn.ModuleList(
            _Reader(e, mlp_head(e.width, projector_hidden, projector_dim, projector_layers, False, hidden_norm=False))
            for e in (encoder(1), encoder(2))
        )
        self.classifiers = nn.ModuleList(
            _Reader(e, nn.Linear(e.width, max(self.num_classes, 1))) for e in (encoder(1), encoder(2))
        )
        self.widths = {"projection": projector_dim, "logits": self.num_classes}
        self.wanted = self.provides

    def select(self, names: Iterable[str]) -> None:
        super().select(names)
        if "logits" in self.wanted and self.num_classes < 2:
            raise UserError(
                f"the classifiers need images of at least 2 known classes, and the source has {self.num_classes}: "
                "give labelled images, or leave the labels out (criterion.supervised=false)"
            )
        self.critics.requires_grad_("projection" in self.wanted)
        self.classifiers.requires_grad_("logits" in self.wanted)

    def param_groups(self) -> Iterable[ParamGroup]:
        """Generator, critics and classifiers."""
        for name, module, rate in (
            ("generator", self.generator, self._lr_g),
            ("critics", self.critics, self._lr_f),
            ("classifiers", self.classifiers, self._lr_f),
        ):
            params = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
            if params:
                yield ParamGroup(name, params, lr=rate)

    def views_of(self, images: Tensor) -> list[Tensor]:
        """v1 [B, 1, h, w] and v2 [B, 2, h, w] of normalised images [B, 3, h, w]."""
        views = list(self.generator(images).split([1, 2], dim=1))
        return views if self.norms is None else [norm(view) for norm, view in zip(self.norms, views, strict=True)]

    def forward(self, batch: Batch) -> dict[str, list[Tensor]]:
        """projection [B, d] of both views, and logits [n, K] of those rows whose label is known."""
        views, outputs = self.views_of(batch.views[0]), {}
        if "projection" in self.wanted:
            outputs["projection"] = [f(reverse(view)) for f, view in zip(self.critics, views, strict=True)]
        if "logits" in self.wanted:
            known = batch.label >= 0
            outputs["logits"] = [c(view[known]) for c, view in zip(self.classifiers, views, strict=True)]
        return outputs

    def trained_encoders(self) -> list[nn.Module]:
        """Those that read the learned views, of critics or else classifiers, as `encode` does; none is left behind."""
        readers = self.critics if "projection" in self.wanted else self.classifiers
        return [reader.encoder.backbone for reader in readers]

    def encode(self, images: Tensor) -> Tensor:
        """Features of both views, side by side: [B, 3, h, w] -> [B, 2 D]."""
        readers = self.critics if "projection" in self.wanted else self.classifiers
        return torch.cat([r.features(v) for r, v in zip(readers, self.views_of(images), strict=True)], dim=1)


class Standardised(nn.Module):
    """Channels [B, C, h, w] less their mean, over their deviation, of the rows of all processes.

    No gradient passes through mean and deviation. In evaluation mode they are running ones.
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.mean, self.variance
        if self.training:
            with torch.no_grad():
                moments = torch.stack([x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))])
                mean, square = distributed.all_reduce_mean(moments)
                variance = (square - mean.square()).clamp_min(0.0)
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        return (x - mean[:, None, None]) * (variance + self.eps).rsqrt()[:, None, None]


class _Reader(nn.Module):
    """An encoder of a view, and a head on its features."""

    def __init__(self, encoder: Encoder, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def features(self, view: Tensor) -> Tensor:
        return self.encoder(view)[1]

    def forward(self, view: Tensor) -> Tensor:
        return self.head(self.features(view))
