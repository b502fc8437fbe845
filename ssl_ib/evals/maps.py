"""Feature maps of an encoder at several strides, for protocols that score pixels or boxes.

A convolutional or hierarchical network has such maps. A vision transformer has one stride, that of its patches: its
tokens are brought to the others by new layers, as BEiT does (and MAE after it), or as ViTDet does.

Shapes: B images of h x w pixels; map i has C_i channels and stride s_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from ..errors import UserError
from .subject import Subject

#: Scales there can be. A vision transformer's patches are at 16, and the deepest map of another network is at 32.
_SCALES, _PATCHES = (2, 4, 8, 16, 32), 16
#: Where BEiT takes the four maps of a vision transformer, as shares of its depth: 3, 5, 7 and 11 of the blocks 0 to 11.
_SHARES = (1 / 3, 1 / 2, 2 / 3, 1)


class FeatureMaps(nn.Module):
    """An encoder with its weights, and its feature maps at several strides.

    size:      (height, width) of the images it is trained on, or the side of a square. A vision transformer's positions
               are resampled to it, and from there to images of other sizes.
    scales:    which maps, from the finest: 32 is the deepest map of a network that has several strides, 16 the one
               before it, and so on. Of a vision transformer 16 is the map of its patches. They are the strides for
               patches of 16 pixels and for usual stems; with others `strides` says what they are.
    drop_path: as timm's drop_path_rate.
    mode:      of a vision transformer alone. "taps": each map is made of another block, by transposed convolutions or
               pooling (BEiT). "pyramid": all are made of the last block, and have `width` channels (ViTDet, Li et al.,
               ECCV 2022, section 3).
    blocks:    of a vision transformer's taps: a block for each scale, counted from 0. Default: BEiT's, of a third, a
               half, two thirds and all of the depth, where there are four scales, else the last one.
    norm:      whether a vision transformer's last norm is applied to the tokens.

    channels, strides: of each map, in the order of `scales`; a stride may be a fraction.

    The new layers are drawn from torch's global generator. Raises UserError where the encoder has no such maps.
    """

    def __init__(
        self,
        subject: Subject,
        size: int | tuple[int, int],
        scales: Sequence[int] = (4, 8, 16, 32),
        drop_path: float = 0.0,
        mode: Literal["taps", "pyramid"] = "taps",
        blocks: Sequence[int] | None = None,
        norm: bool = False,
        width: int = 256,
    ):
        super().__init__()
        assert all(scale in _SCALES for scale in scales), scales
        info = getattr(subject.model, "feature_info", None)
        if not info or not hasattr(subject.model, "forward_intermediates"):
            raise UserError(f"{subject.where}: timm gives no feature maps of a {type(subject.model).__name__}")
        self.vit, self.norm, self._call = subject.vit, norm, subject.call
        drop = {"drop_path_rate": drop_path} if drop_path else {}
        self.encoder = subject.create(**drop, **({"dynamic_img_size": True} if self.vit else {}))
        self.patch = self.encoder.patch_embed.patch_size if self.vit else (1, 1)
        self._resize((size, size) if isinstance(size, int) else size, subject.where)
        depth = len(info)
        if self.vit:
            width = self.encoder.embed_dim if mode == "taps" else width
            make = _tap if mode == "taps" else _storey
            self.levels = _blocks(depth, len(scales), blocks) if mode == "taps" else [depth - 1] * len(scales)
            self.necks = nn.ModuleList(make(self.encoder.embed_dim, scale, width) for scale in scales)
            self.channels = [width] * len(scales)
            strides = [self.patch[0] * scale / _PATCHES for scale in scales]
        else:
            if mode != "taps" or blocks is not None:
                raise UserError(f"mode, blocks: only a vision transformer has them, and {subject.where} is none")
            self.levels = [depth - len(_SCALES) + _SCALES.index(scale) for scale in scales]
            if min(self.levels) < 0:
                raise UserError(f"{subject.where} has {depth} feature maps, which are fewer than {list(scales)} need")
            self.necks = nn.ModuleList(nn.Identity() for _ in scales)
            self.channels = [info[level]["num_chs"] for level in self.levels]
            # timm's description does not know that the stem for small images has a stride of 1, where it had 4.
            finer = 4 if "stem" in subject.description else 1
            strides = [max(info[level]["reduction"] / finer, 1) for level in self.levels]
            if len(set(strides)) == 1 < len(scales):
                raise UserError(
                    f"{subject.where}: the maps of {type(self.encoder).__name__} have one stride, and only plain "
                    "vision transformers are brought to others"
                )
        self.strides = [int(stride) if stride == int(stride) else stride for stride in strides]

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps of prepared images, from the finest: [B, 3, h, w] -> maps [B, C_i, ceil(h / s_i), ceil(w / s_i)].

        Images whose sides are no multiples of a vision transformer's patch are filled up with zeros at their right and
        lower edges, and its maps cover these too. Raises UserError for a size that the encoder does not take.
        """
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.patch[1], 0, -height % self.patch[0]))
        indices = sorted(set(self.levels))
        how: dict[str, Any] = {"indices": indices, "intermediates_only": True, "output_fmt": "NCHW"}
        how["norm"] = self.norm and self.vit
        found = self._call(lambda x: self.encoder.forward_intermediates(x, **how), images)
        found = dict(zip(indices, found, strict=True))
        return [neck(found[level]) for level, neck in zip(self.levels, self.necks, strict=True)]

    def groups(self, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """The parameters for an optimiser, each group with its `weight_decay` and its `lr_scale`.

        layer_decay: each layer of the encoder has the rate of the layer above it times this; the new layers here, and
        whatever is on top, have an `lr_scale` of 1. Vectors have no weight decay.
        """
        exempt = self.encoder.no_weight_decay() if hasattr(self.encoder, "no_weight_decay") else ()
        groups = param_groups_layer_decay(self.encoder, weight_decay, exempt, layer_decay=layer_decay)
        for group in groups:
            group["lr_scale"] *= layer_decay  # timm leaves the last layer at 1, but here there are layers above it.
        return groups + groups_of(self.necks, weight_decay)

    def _resize(self, size: tuple[int, int], where: str) -> None:
        """Resamples the positions of an encoder that has them for one size."""
        size = tuple(-(-side // patch) * patch for side, patch in zip(size, self.patch, strict=True))
        made_for = getattr(getattr(self.encoder, "patch_embed", None), "img_size", None)
        if made_for not in (None, size) and hasattr(self.encoder, "set_input_size"):
            try:
                self.encoder.set_input_size(img_size=size)
            except (AssertionError, RuntimeError) as error:
                raise UserError(f"{where} cannot take images of {size[0]} x {size[1]} pixels: {error}") from None


def groups_of(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of a head for an optimiser, as `FeatureMaps.groups`: vectors have no weight decay."""
    parameters = list(module.parameters())
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [{**group, "lr_scale": 1.0} for group in groups if group["params"]]


def _blocks(depth: int, scales: int, given: Sequence[int] | None) -> list[int]:
    """The block that each scale is made of."""
    if given is None:
        shares = _SHARES if scales == len(_SHARES) else (1,) * scales
        return [max(round(depth * share), 1) - 1 for share in shares]
    if len(given) != scales or not all(0 <= block < depth for block in given):
        raise UserError(f"blocks: expected {scales} numbers from 0 to {depth - 1}, got {list(given)}")
    return list(given)


def _tap(channels: int, scale: int, width: int) -> nn.Module:
    """BEiT's layers from the tokens of a block to a scale; all maps have the tokens' width."""
    assert channels == width and scale > 2
    if scale >= _PATCHES:
        return nn.Identity() if scale == _PATCHES else _half()
    if scale == 8:
        return _double(channels, width)
    return nn.Sequential(_double(channels, width), nn.BatchNorm2d(width), nn.GELU(), _double(width, width))


def _storey(channels: int, scale: int, width: int) -> nn.Module:
    """ViTDet's layers from the tokens of the last block to a scale and a width."""
    assert scale > 2
    resize, found = [] if scale == _PATCHES else [_half()], channels
    if scale < _PATCHES:
        resize, found = [_double(channels, channels // 2)], channels // 2
    if scale == 4:
        resize, found = [*resize, LayerNorm2d(found), nn.GELU(), _double(found, found // 2)], found // 2
    one, three = nn.Conv2d(found, width, 1, bias=False), nn.Conv2d(width, width, 3, padding=1, bias=False)
    return nn.Sequential(*resize, one, LayerNorm2d(width), three, LayerNorm2d(width))


def _double(channels: int, width: int) -> nn.Module:
    """Twice the resolution."""
    return nn.ConvTranspose2d(channels, width, 2, stride=2)


def _half() -> nn.Module:
    """Half of the resolution, rounded up as strided convolutions do."""
    return nn.MaxPool2d(2, ceil_mode=True)
