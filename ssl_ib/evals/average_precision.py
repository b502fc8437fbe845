"""COCO's average precision of boxes or masks, by faster-coco-eval or pycocotools.

Shapes: K classes, m detections on an image; T = 10 thresholds of the overlap (IoU), from 0.5 to 0.95, R = 101 recalls.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from .boxes import BoxImages, Tools, coco_tools


@dataclass(frozen=True)
class Predicted:
    """What was found on an image, in its own pixels.

    boxes: float32 [m, 4], left, top, right, bottom. scores: float32 [m], in [0, 1]. labels: classes, int64 [m].
    masks: as compressed run lengths; None where none are predicted.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Precision:
    """Average precisions in [0, 1].

    ap: the mean over ten thresholds of the overlap from 0.5 to 0.95, and over classes; ap50, ap75: at one threshold.
    by_class: `ap` of each class; None where no held-out box is of it.
    curves: the precision at an overlap of 0.5 for 101 recalls from 0 to 1, float64 [R, K]; -1 for such a class.
    """

    ap: float
    ap50: float
    ap75: float
    by_class: dict[str, float | None]
    curves: np.ndarray


def average_precision(truth: BoxImages, found: list[Predicted], kind: Literal["bbox", "segm"] = "bbox") -> Precision:
    """Scores what was found on the images of a set: COCO's average precision, with 100 detections an image.

    Boxes that are a crowd's or difficult are treated as COCO treats crowds: what lies in them is not counted, and they
    need not be found.
    """
    tools, ids = coco_tools(), range(1, len(truth) + 1)
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(truth.classes)]
    images = [{"id": i, "height": h, "width": w} for i, (h, w) in zip(ids, truth.sizes, strict=True)]
    annotations, results = [], []
    for row, (i, objects, detections) in enumerate(zip(ids, truth.objects, found, strict=True)):
        ignored = (objects.crowd | objects.difficult).tolist()
        masks = truth.encoded_masks(row) if kind == "segm" else [None] * len(objects)
        for box, label, crowd, mask in zip(_sides(objects.boxes), objects.labels.tolist(), ignored, masks, strict=True):
            line = {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "bbox": box}
            area = float(tools.mask.area(mask)) if kind == "segm" else box[2] * box[3]
            annotations.append({**line, "area": area, "iscrowd": int(crowd), "segmentation": mask})
        masks = detections.masks if kind == "segm" else [None] * len(detections.scores)
        labels, scores = detections.labels.tolist(), detections.scores.tolist()
        for box, label, score, mask in zip(_sides(detections.boxes), labels, scores, masks, strict=True):
            line = {"image_id": i, "category_id": label + 1, "score": score}
            results.append({**line, **({"segmentation": mask} if kind == "segm" else {"bbox": box})})
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress.
        known = _coco(tools, {"info": {}, "images": images, "annotations": annotations, "categories": categories})
        # `loadRes` refuses an empty list.
        detected = known.loadRes(results) if results else _coco(tools, {**known.dataset, "annotations": []})
        evaluation = tools.evaluation(known, detected, kind)
        evaluation.evaluate()
        evaluation.accumulate()
    # [T, R, K, areas, detections an image]: all areas, and the largest number.
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    by_class = {name: _mean(precision[:, :, k]) for k, name in enumerate(truth.classes)}
    return Precision(_mean(precision), _mean(precision[0]), _mean(precision[5]), by_class, precision[0])


def _coco(tools: Tools, dataset: dict[str, Any]) -> Any:
    found = tools.coco()
    found.dataset = dataset
    found.createIndex()
    return found


def _sides(boxes: Tensor) -> list[list[float]]:
    """Left, top, width, height of each box [m, 4]."""
    boxes = boxes.double()
    return [[*box[:2], box[2] - box[0], box[3] - box[1]] for box in boxes.tolist()]


def _mean(precision: np.ndarray) -> float | None:
    """The mean of what is there: -1 marks a class without boxes."""
    there = precision[precision > -1]
    return float(there.mean()) if there.size else None
