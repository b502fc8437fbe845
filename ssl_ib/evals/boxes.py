"""Images with boxes around the objects on them, and masks where there are any: what detection is trained and scored on.

Shapes: n images, k objects on one of them, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..data.decode import decode, read_image
from ..errors import UserError


@dataclass(frozen=True)
class Tools:
    """A library of COCO's: its classes, its functions of masks, and its name with the version."""

    coco: type
    evaluation: type
    mask: ModuleType
    name: str


@cache
def coco_tools() -> Tools:
    """faster-coco-eval, or pycocotools, whichever is installed. Raises UserError where neither is."""
    if find_spec("faster_coco_eval") is not None:
        from faster_coco_eval import COCO, COCOeval_faster, mask

        return Tools(COCO, COCOeval_faster, mask, f"faster-coco-eval {version('faster-coco-eval')}")
    if find_spec("pycocotools") is not None:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return Tools(COCO, COCOeval, mask, f"pycocotools {version('pycocotools')}")
    raise UserError("detection is scored by faster-coco-eval, which is not installed: pip install 'ssl-ib[dense]'")


@dataclass(frozen=True)
class Objects:
    """The objects on an image.

    boxes:  float32 [k, 4]: left, top, right, bottom in pixels from the image's upper left corner; right and bottom are
            exclusive.
    labels: numbers of classes, int64 [k].
    crowd:  bool [k]: a box is around many objects. It is not trained on, and detections in it are not counted.
    difficult: bool [k]: a box is trained on, and detections of it are not counted.
    shapes: their masks as COCO writes them; empty where the set has none.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    difficult: Tensor
    shapes: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class BoxImages:
    """Images with their objects.

    names: of the images. sizes: (height, width) of each. masks: whether every object has a mask.
    """

    names: list[str]
    files: list[Path]
    sizes: list[tuple[int, int]]
    objects: list[Objects]
    classes: list[str]
    masks: bool

    #: No average precision is that of chance.
    chance: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def count(self) -> int:
        """Boxes on all images."""
        return sum(map(len, self.objects))

    @property
    def facts(self) -> str:
        masks = " with masks" if self.masks else ""
        return f"{len(self.classes)} classes, {self.count:,} boxes{masks} on these"

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the images' names and sizes, and with anything said of objects."""
        digest = hashlib.blake2b(json.dumps([self.classes, self.names, self.sizes, self.masks]).encode(), digest_size=8)
        for found in self.objects:
            for part in (found.boxes, found.labels, found.crowd, found.difficult):
                digest.update(part.numpy().tobytes())
            if self.masks:
                digest.update(json.dumps(found.shapes, default=str).encode())
        return digest.hexdigest()

    def image(self, row: int) -> Tensor:
        """An image: uint8 [3, H, W]. Raises UserError where it cannot be read."""
        try:
            return decode(read_image(self.files[row]), None)
        except Exception as error:  # Pillow raises nearly anything on damaged bytes.
            raise UserError(f"{self.files[row]} cannot be read: {error}") from None

    def encoded_masks(self, row: int) -> list[dict[str, Any]]:
        """The masks of an image's objects, as compressed run lengths."""
        height, width = self.sizes[row]
        return [_run_lengths(shape, height, width) for shape in self.objects[row].shapes]

    def decoded_masks(self, row: int) -> Tensor:
        """The masks of an image's objects: uint8 [k, H, W], 1 on the object."""
        found = self.encoded_masks(row)
        return decoded(found) if found else torch.zeros(0, *self.sizes[row], dtype=torch.uint8)


def decoded(masks: list[dict[str, Any]]) -> Tensor:
    """Masks from their compressed run lengths: uint8 [k, H, W]; of none [0, 0, 0]."""
    if not masks:
        return torch.zeros(0, 0, 0, dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(coco_tools().mask.decode(masks).transpose(2, 0, 1)))


def _run_lengths(shape: Any, height: int, width: int) -> dict[str, Any]:
    tools = coco_tools().mask
    if isinstance(shape, list):
        return tools.merge(tools.frPyObjects(shape, height, width))
    if isinstance(shape["counts"], list):
        return tools.frPyObjects(shape, height, width)
    counts = shape["counts"]
    return {"size": shape["size"], "counts": counts.encode() if isinstance(counts, str) else counts}
