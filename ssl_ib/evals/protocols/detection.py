"""Detection: the encoder is trained on within Faster R-CNN or Mask R-CNN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ...config.hints import Count, NonNegative, Positive, PositiveInt, Probability
from ...errors import UserError
from ...record import eval_figures
from .. import unfinished
from ..average_precision import Precision, Predicted, average_precision
from ..box_sets import open_sets
from ..box_training import Course, detector, find
from ..boxes import BoxImages, coco_tools, decoded
from ..detector import Design
from ..protocol import CommonSettings, Files, Job, Seeds, register_protocol

#: Where a trained detector is left, in the folder of the results.
KEPT = "evals/detector.pt"
#: What a dry run is cut down to.
DRY_IMAGES = 4
#: Held-out images that are drawn, and the least score of a detection that is drawn on them.
_SHOWN, _LIKELY = 6, 0.5

#: Li et al., ECCV 2022, and detectron2's configuration of ViTDet-B: 184,375 steps with 64 of COCO's 118,287 images.
_VITDET: dict[str, Any] = {
    "size": 1024,
    "jitter": [0.1, 2.0],
    "epochs": 100,
    "batch_size": 64,
    "optimiser": "adamw",
    "lr": 1e-4,
    "weight_decay": 0.1,
    "layer_decay": 0.7,
    "drop_path": 0.1,
    "warmup_steps": 250,
    "milestones": [0.889, 0.963],
    "rpn_convs": 2,
    "norm": "frozen",
    "precise_bn": 0,
}
#: He et al., CVPR 2020, as Tian et al., NeurIPS 2020, use it: schedule 1x, 90,000 steps with 16 images.
_MOCO: dict[str, Any] = {
    "size": [800, 1333],
    "jitter": [0.8, 1.0],
    "epochs": 12,
    "batch_size": 16,
    "optimiser": "sgd",
    "lr": 0.02,
    "weight_decay": 1e-4,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "warmup_steps": 1000,
    "milestones": [0.667, 0.889],
    "rpn_convs": 1,
    "norm": "batch",
    "precise_bn": 200,
}
#: On Pascal VOC: 24,000 steps with 16 of the 16,551 images of trainval 2007 and 2012.
_MOCO_VOC: dict[str, Any] = {
    **_MOCO,
    "neck": "c4",
    "jitter": [0.6, 1.0],
    "epochs": 23,
    "warmup_steps": 100,
    "milestones": [0.75, 0.917],
}
FORMS: dict[str, dict[str, Any]] = {"vitdet": _VITDET, "infomin": _MOCO, "infomin_voc": _MOCO_VOC, "svib": _MOCO}


class DetectionSettings(CommonSettings):
    """Faster R-CNN, or Mask R-CNN where the objects have masks, trained from end to end, with COCO's average precision.

    path: a folder in the layout of Pascal VOC (Annotations, JPEGImages, ImageSets/Main) or of COCO (a JSON file a
    split). train, val: the names of the splits, or lists of them; of several years VOC2007/trainval. annotations:
    COCO's two JSON files, for training and for what is held out, where they have not the usual names
    (annotations/instances_train2017.json); images: their folder or folders. masks: auto trains masks where every
    object has one. train_images, val_images: at most so many of each.

    form: vitdet for a plain vision transformer (MRCL, MI-MAE); infomin or svib for a ResNet, which is the schedule 1x
    of MoCo; infomin_voc with the neck c4. What is given besides stands in its place.
    size: pixels of a square that images fit into, or [SHORT, LONG] side. jitter: range of a factor of it. flip:
    probability. batch_size: lr is for so many; with another one and without lr, the form's lr goes with it.
    micro_batch: images that go through at a time; their gradients are added up. lr, weight_decay, layer_decay,
    warmup_steps (at most a tenth of all), milestones (shares of the training) and gamma: the course of the rate.
    neck: fpn, of a plain vision transformer ViTDet's pyramid; or c4. norm: frozen keeps the encoder's batch norms as
    they are, and new layers have layer norm; batch trains them all, over the images that go through at a time.
    precise_bn: batches for their statistics at the end. freeze: so many of the encoder's first parts stay as they are
    (the stem, then stages or blocks); all: the whole encoder. anchors: their side, in strides of their map. width,
    head, rpn_convs, rois, proposals: of the detector. min_score: detections of less are left out. workers: processes
    that prepare images. keep: leave the detector of the last seed in evals/detector.pt. seeds: several give mean and
    deviation.
    """

    varied: ClassVar = {"seeds": "seed", "metrics": "metric"}

    path: str
    train: Files = ("train",)
    val: Files = ("val",)
    annotations: Files = ()
    images: Files = ()
    masks: bool | Literal["auto"] = "auto"
    train_images: PositiveInt | None = None
    val_images: PositiveInt | None = None
    form: Literal[tuple(FORMS)] = "vitdet"  # type: ignore[valid-type]
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 1024
    jitter: tuple[Positive, Positive] = (0.1, 2.0)
    flip: Probability = 0.5
    epochs: PositiveInt = 100
    batch_size: PositiveInt = 64
    micro_batch: PositiveInt | None = None
    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-4
    weight_decay: NonNegative = 0.1
    layer_decay: Probability = 0.7
    drop_path: Probability = 0.1
    warmup_steps: Count = 250
    milestones: tuple[Probability, ...] = (0.889, 0.963)
    gamma: Positive = 0.1
    clip: Positive | None = None
    neck: Literal["fpn", "c4"] = "fpn"
    norm: Literal["frozen", "batch"] = "frozen"
    precise_bn: Count = 0
    freeze: Count | Literal["all"] = 0
    anchors: Positive = 8.0
    width: PositiveInt = 256
    head: Literal["4conv1fc", "2fc"] = "4conv1fc"
    rpn_convs: PositiveInt = 2
    rois: PositiveInt = 512
    proposals: PositiveInt = 1000
    min_score: Probability = 0.05
    encode_batch: PositiveInt = 8
    workers: Count = 2
    keep: bool = False
    seeds: Seeds = (0,)

    @classmethod
    def fill(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The values of the form, with the rate for the batch that is given."""
        data = dict(FORMS.get(str(given.get("form", "vitdet")), {}))
        batch = given.get("batch_size")
        if data and type(batch) is int:
            data["lr"] *= batch / data["batch_size"]
        return data

    @property
    def design(self) -> Design:
        return Design(**{field.name: getattr(self, field.name) for field in fields(Design)})

    @property
    def course(self) -> Course:
        """Raises UserError where the values do not fit together."""
        if self.jitter[0] > self.jitter[1]:
            raise UserError(f"jitter: expected low <= high, got {list(self.jitter)}")
        if not isinstance(self.size, int) and self.size[0] > self.size[1]:
            raise UserError(f"size: expected the short side first, got {list(self.size)}")
        return Course(**{field.name: getattr(self, field.name) for field in fields(Course)})

    def open(self, dry: bool, say: Callable[[str], None]) -> tuple[BoxImages, BoxImages]:
        coco_tools()
        self.course  # noqa: B018  It is checked before images are opened.
        limits = (self.train_images, self.val_images)
        if dry:
            limits = tuple(min(limit or DRY_IMAGES, DRY_IMAGES) for limit in limits)
        splits = self.train, self.val
        return open_sets(Path(self.path), splits, self.annotations, self.images, self.masks, limits, say)


@register_protocol("detection")
def detection(job: Job, settings: DetectionSettings) -> None:
    """COCO's average precision of boxes, and of masks, after training in Faster R-CNN or Mask R-CNN."""
    design, course = settings.design, settings.course
    kinds = {"": "bbox", "mask_": "segm"} if job.train.masks else {"": "bbox"}
    metrics = [f"{kind}{name}" for kind in kinds for name in ("AP", "AP50", "AP75")]
    _tell(job, settings)
    for seed in settings.seeds:
        if not (missing := job.todo({"seed": seed, "metric": metric} for metric in metrics)):
            continue
        saved = unfinished.place(job, {"seed": seed})
        model = detector(job, design, course, job.train, seed, settings.workers, saved)
        found = find(job, model, course, job.val, settings.workers)
        scores = {kind: average_precision(job.val, found, of) for kind, of in kinds.items()}
        for variant in missing:
            _record(job, variant, scores["mask_" if variant["metric"].startswith("mask_") else ""])
        if settings.keep and job.out is not None:
            _keep(job, settings, model)
        unfinished.forget(saved)
        _draw(job, found, scores)
    if len(settings.seeds) > 1:
        for metric in metrics:
            values = [job.found({"seed": seed, "metric": metric})["value"] for seed in settings.seeds]
            job.record_mean({"seed": list(settings.seeds), "metric": metric}, metric, values)


def _tell(job: Job, settings: DetectionSettings) -> None:
    """What a reader of the numbers has to know of how they came."""
    how = job.subject.preprocessing
    size = settings.size if isinstance(settings.size, int) else settings.size[0]
    if job.subject.vit and size != how["size"]:
        job.say(f"images of {size} pixels, and the encoder was made for {how['size']}: positions are resampled")
    batch = min(settings.batch_size, len(job.train))
    at_once = min(settings.micro_batch or batch, batch)
    if settings.norm == "batch":
        job.say(f"batch norms are over {at_once} images at a time")
    if batch < settings.batch_size:
        job.say(f"a batch has {batch} images, as there are no more; the rate is lowered with it")


def _record(job: Job, variant: dict[str, Any], scores: Precision) -> None:
    metric = variant["metric"]
    value = {"AP": scores.ap, "AP50": scores.ap50, "AP75": scores.ap75}[metric.removeprefix("mask_")]
    more = {"by_class": scores.by_class} if metric.endswith("AP") else {}
    job.record(variant, metric, value, scored_by=coco_tools().name, **more)


def _keep(job: Job, settings: DetectionSettings, model: torch.nn.Module) -> None:
    (job.home / KEPT).parent.mkdir(parents=True, exist_ok=True)
    kept = {"model": model.state_dict(), "settings": settings.model_dump(mode="json"), "weights": job.weights}
    torch.save({**kept, "classes": job.train.classes}, job.home / KEPT)


def _draw(job: Job, found: list[Predicted], scores: dict[str, Precision]) -> None:
    val: BoxImages = job.val
    if path := job.figure("boxes"):
        rows = [number * len(val) // _SHOWN for number in range(_SHOWN)] if len(val) > _SHOWN else range(len(val))
        true = [
            eval_figures.Marks(
                val.objects[row].boxes, val.objects[row].labels, masks=val.decoded_masks(row) if val.masks else None
            )
            for row in rows
        ]
        marks = [_marks(found[row]) for row in rows]
        eval_figures.detections([val.image(row) for row in rows], true, marks, val.classes, path, _LIKELY)
    for kind, name in {"": "precision", "mask_": "mask_precision"}.items():
        if kind in scores and (path := job.figure(name)):
            title = f"Precision of {'masks' if kind else 'boxes'} at an overlap of 0.5"
            eval_figures.precision_by_recall(torch.from_numpy(scores[kind].curves), val.classes, path, title)


def _marks(found: Predicted) -> eval_figures.Marks:
    """What is drawn of detections: those that are rather there than not."""
    kept = (found.scores >= _LIKELY).nonzero()[:, 0]
    masks = None
    if found.masks is not None:
        masks = decoded([found.masks[k] for k in kept.tolist()])
    return eval_figures.Marks(found.boxes[kept], found.labels[kept], found.scores[kept], masks)
