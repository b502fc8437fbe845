"""Torchvision's Faster R-CNN or Mask R-CNN on the feature maps of an encoder.

Shapes: B images of h x w pixels, k boxes on one of them, m detections; P maps with C channels each.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import LayerNorm2d, freeze_batch_norm_2d
from timm.models import ResNet, group_parameters
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from ..errors import UserError
from .maps import FeatureMaps, groups_of
from .subject import Subject

#: The ratios of an anchor's height to its width, and, without a pyramid, its sizes, in shares of `Design.anchors`.
_RATIOS, _SIZES = (0.5, 1.0, 2.0), (0.25, 0.5, 1.0, 2.0, 4.0)
#: Sides of what is cut out of the maps for each proposal: for the boxes and for the masks of a pyramid, and for C4.
_BOX, _MASK, _STAGE = 7, 14, 14
#: The size of a box that belongs to a map, in its strides: 224 pixels at a stride of 16 (Lin et al., CVPR 2017, eq. 1).
_CANONICAL = 14
#: Units of the fully connected layers, in channels of the pyramid.
_HIDDEN = 4


@dataclass(frozen=True)
class Design:
    """How a detector is built.

    neck:       "fpn": a pyramid of maps, of FPN, or of ViTDet for a plain vision transformer. "c4": the map of the last
                stage but one of a ResNet, whose last stage is the head.
    width:      channels of the pyramid. rpn_convs: layers of the network that proposes boxes.
    head:       of a pyramid: four convolutions and one fully connected layer, or two of the latter.
    norm:       "frozen": the encoder's batch norms keep their statistics and weights, and new layers have layer norm.
                "batch": batch norms everywhere, over the images of a step.
    freeze:     so many of the encoder's first parts stay as they are: the stem, then the stages (of a vision
                transformer: the embedding, then the blocks); "all": the whole of it.
    anchors:    the side of an anchor, in strides of its map.
    rois:       proposals of an image that the head is trained on. proposals: those that it scores.
    min_score:  detections of less are left out.
    """

    neck: Literal["fpn", "c4"] = "fpn"
    width: int = 256
    rpn_convs: int = 2
    head: Literal["4conv1fc", "2fc"] = "4conv1fc"
    norm: Literal["frozen", "batch"] = "frozen"
    freeze: int | Literal["all"] = 0
    drop_path: float = 0.1
    anchors: float = 8.0
    rois: int = 512
    proposals: int = 1000
    min_score: float = 0.05


def build(subject: Subject, design: Design, size: int | tuple[int, int], classes: int, masks: bool) -> FasterRCNN:
    """A detector with the encoder's weights, and new layers by torch's global generator.

    size: pixels of a square that the images fit into, or of their short and long side. classes: without the
    background, which is class 0 of the detector.
    Raises UserError where the encoder has not the maps that the design needs.
    """
    side = size if isinstance(size, int) else size[0]
    trunk = _Pyramid(subject, design, side) if design.neck == "fpn" else _C4(subject, design, side)
    if trunk.positions and not subject.vit and not isinstance(size, int):
        raise UserError(f"size: {subject.where} takes square images alone: expected one number, got {list(size)}")
    names, strides = list(map(str, range(len(trunk.pooled)))), trunk.pooled
    if design.neck == "fpn":
        sizes = [[design.anchors * stride] for stride in trunk.strides]
        shape, cut, hidden = (design.width, _BOX, _BOX), _BOX, _HIDDEN * design.width
        if design.head == "2fc":
            box_head: nn.Module = TwoMLPHead(math.prod(shape), hidden)
        else:
            box_head = FastRCNNConvFCHead(shape, [design.width] * 4, [hidden], _norm(design))
        mask_channels, mask_head = design.width, MaskRCNNHeads(design.width, [design.width] * 4, 1, _norm(design))
    else:
        sizes = [[design.anchors * stride * share for share in _SIZES] for stride in trunk.strides]
        box_head, mask_head = nn.Sequential(trunk.last, nn.AdaptiveAvgPool2d(1), nn.Flatten()), trunk.last
        hidden, mask_channels, cut = trunk.last.channels, trunk.last.channels, _STAGE
    anchors = _Anchors(sizes, trunk.strides)
    # One map has the anchors of all sizes, so that more of them are considered, as in detectron2.
    before, after = (6, 2) if design.neck == "c4" else (1, 1)
    arguments: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(trunk.out_channels, anchors.num_anchors_per_location()[0], design.rpn_convs),
        "rpn_pre_nms_top_n_train": 2 * before * design.proposals,
        "rpn_pre_nms_top_n_test": before * design.proposals,
        "rpn_post_nms_top_n_train": after * design.proposals,
        "rpn_post_nms_top_n_test": design.proposals,
        "box_roi_pool": _Align(names, cut, strides),
        "box_head": box_head,
        "box_predictor": FastRCNNPredictor(hidden, classes + 1),
        "box_score_thresh": design.min_score,
        "box_batch_size_per_image": design.rois,
    }
    if masks:
        arguments["mask_roi_pool"] = _Align(names, _MASK, strides)
        arguments["mask_head"] = mask_head
        arguments["mask_predictor"] = MaskRCNNPredictor(mask_channels, design.width, classes + 1)
    model = (MaskRCNN if masks else FasterRCNN)(trunk, **arguments)
    model.transform = _Stack(trunk.multiple, side if trunk.positions and isinstance(size, int) else None)
    return model


def groups(model: FasterRCNN, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """The parameters that are trained, as of `FeatureMaps.groups`."""
    maps = model.backbone.maps
    there = {id(p) for p in maps.parameters()}
    others = nn.ParameterList(p for p in model.parameters() if id(p) not in there)
    return maps.groups(weight_decay, layer_decay) + groups_of(others, weight_decay)


def _norm(design: Design) -> type[nn.Module]:
    """Of new layers."""
    return LayerNorm2d if design.norm == "frozen" else nn.BatchNorm2d


class _Pyramid(nn.Module):
    """Four maps of an encoder with as many channels each, and a fifth of half the last one's resolution.

    strides: of the five. pooled: of those from which boxes are cut out. multiple: to which images are filled up.
    positions: whether the encoder has them, so that images are filled up to one size.
    """

    def __init__(self, subject: Subject, design: Design, size: int):
        super().__init__()
        mode: dict[str, Any] = {"mode": "pyramid", "width": design.width} if subject.vit else {}
        self.maps = FeatureMaps(subject, size, drop_path=design.drop_path, **mode)
        _freeze(self.maps.encoder, design, subject.where)
        if subject.vit:
            self.top: nn.Module = nn.Identity()
        else:
            self.top = FeaturePyramidNetwork(self.maps.channels, design.width, norm_layer=_norm(design))
        self.coarser = LastLevelMaxPool()
        self.out_channels, self.pooled = design.width, self.maps.strides
        self.strides = [*self.pooled, 2 * self.pooled[-1]]
        self.multiple = round(self.pooled[-1])
        self.positions = getattr(getattr(self.maps.encoder, "patch_embed", None), "img_size", None) is not None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, h, w] -> five maps [B, C, h / s, w / s] by name."""
        found = self.top(OrderedDict((str(number), one) for number, one in enumerate(self.maps(images))))
        maps, names = self.coarser(list(found.values()), list(found.values()), list(found))
        return OrderedDict(zip(names, maps, strict=True))


class _C4(nn.Module):
    """The map of the last stage but one of a ResNet; the last stage is the head that scores what is cut out of it."""

    def __init__(self, subject: Subject, design: Design, size: int):
        super().__init__()
        if not isinstance(subject.model, ResNet):
            raise UserError(f"neck=c4: only a ResNet of timm's has it, and {subject.where} is none: give neck=fpn")
        self.maps = FeatureMaps(subject, size, scales=(16,), drop_path=design.drop_path)
        _freeze(self.maps.encoder, design, subject.where)
        self.out_channels, self.pooled = self.maps.channels[0], self.maps.strides
        self.strides, self.multiple, self.positions = self.pooled, 2 * round(self.pooled[0]), False
        self.last = _LastStage(self.maps.encoder, design)
        # It is trained with the new layers, and no image goes through it as a whole.
        self.maps.encoder.layer4 = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, C, h / s, w / s]."""
        return self.maps(images)[0]


class _LastStage(nn.Module):
    """The last stage of a ResNet with a norm of its own (He et al., CVPR 2020, appendix A.3)."""

    def __init__(self, encoder: ResNet, design: Design):
        super().__init__()
        self.stage, self.channels = encoder.layer4, encoder.num_features
        self.norm = _norm(design)(self.channels)

    def forward(self, cut: Tensor) -> Tensor:
        """[m, C, 14, 14] -> [m, channels, 7, 7]."""
        return self.norm(self.stage(cut))


def _freeze(encoder: nn.Module, design: Design, where: str) -> None:
    parts = group_parameters(encoder, encoder.group_matcher(coarse=True))
    count = len(parts) if design.freeze == "all" else design.freeze
    if count > len(parts):
        raise UserError(f"freeze: {where} has {len(parts)} parts, got {count}")
    frozen = {name for part in sorted(parts)[:count] for name in parts[part]}
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for name, module in list(encoder.named_modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                weight = f"{name}.{child_name}.weight".lstrip(".")
                if design.norm == "frozen" or weight in frozen:
                    setattr(module, child_name, freeze_batch_norm_2d(child))


class _Anchors(AnchorGenerator):
    """Anchors at the maps' own strides, where torchvision derives these from the sizes of the maps."""

    def __init__(self, sizes: list[list[float]], strides: list[float]):
        super().__init__(tuple(map(tuple, sizes)), (_RATIOS,) * len(sizes))
        self.strides = strides

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> list[Tensor]:
        exact = [[torch.tensor(stride, device=self.cell_anchors[0].device)] * 2 for stride in self.strides]
        return super().grid_anchors(grid_sizes, exact)


class _Align(MultiScaleRoIAlign):
    """RoIAlign at the maps' own strides, where torchvision takes the next power of two."""

    def __init__(self, names: list[str], side: int, strides: list[float]):
        super().__init__(names, side, sampling_ratio=2)
        self.scales = [1 / stride for stride in strides]
        middle = min(2, len(strides) - 1)
        self.map_levels = LevelMapper(0, len(strides) - 1, _CANONICAL * strides[middle], middle)


class _Stack(nn.Module):
    """Images of several sizes as one batch, in the place of torchvision's own preparation.

    multiple: the sides of the batch are multiples of it. side: the side of the batch, a square; None: the smallest.
    """

    def __init__(self, multiple: int, side: int | None):
        super().__init__()
        self.multiple, self.side = multiple, side

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """The height and width of a batch with images of at most these."""
        sides = (height, width) if self.side is None else (self.side, self.side)
        return tuple(-(-side // self.multiple) * self.multiple for side in sides)

    def forward(self, images: list[Tensor], targets: Any) -> tuple[ImageList, Any]:
        """Prepared images [3, h, w] in the upper left corner of a batch, with zeros beside them."""
        sizes = [tuple(image.shape[1:]) for image in images]
        height, width = self.canvas(max(h for h, _ in sizes), max(w for _, w in sizes))
        batch = images[0].new_zeros(len(images), 3, height, width)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return ImageList(batch, sizes), targets

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """Detections as they are, in pixels of the prepared images."""
        return result
