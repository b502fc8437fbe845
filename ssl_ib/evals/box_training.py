"""Training a detector and finding boxes with it.

Shapes: H x W pixels of an image, h x w of the prepared one, k objects on it, m detections.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image

from .. import random
from ..errors import UserError
from . import unfinished
from .average_precision import Predicted
from .boxes import BoxImages, coco_tools
from .detector import Design, build, groups
from .progress import track
from .protocol import Job
from .training import Order, generators, seed_step, train

#: Keeps what an image draws apart from the order of the images and from what a step draws.
_IMAGES = -3
#: Of the steps at most, the warm-up is so many.
_WARMUP = 0.1
#: Pixels of a side that a box must have to be trained on: less is left of some at the edge of a crop.
_LEAST = 1.0


@dataclass(frozen=True)
class Course:
    """How a detector is trained.

    size:         pixels of a side of a square that an image fits into; or those of its short side, and at most those of
                  its long side.
    jitter:       the range of a factor of this size. Of an image that is then larger than the square, a random part of
                  the square's size is taken.
    flip:         probability of a horizontal flip.
    micro_batch:  images that go through the detector at a time; None: all of a batch.
    lr:           for a batch of `batch_size` images.
    warmup_steps: at most a tenth of all steps. milestones: shares of the training, at which the rate is multiplied by
                  `gamma`.
    clip:         of the gradient's norm; None: none.
    precise_bn:   batches over which batch norms take their statistics anew at the end; 0: they keep running means.
    """

    epochs: int
    batch_size: int
    size: int | tuple[int, int]
    jitter: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    micro_batch: int | None = None
    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.1
    layer_decay: float = 0.7
    warmup_steps: int = 250
    milestones: tuple[float, ...] = (0.889, 0.963)
    gamma: float = 0.1
    clip: float | None = None
    precise_bn: int = 0

    def rate(self, step: int, steps: int) -> float:
        """The share of the highest rate at a step of all."""
        warmup = min(self.warmup_steps, int(_WARMUP * steps))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.gamma ** sum(step >= milestone * steps for milestone in self.milestones)


def scaled(course: Course, height: int, width: int, factor: float = 1.0) -> tuple[int, int]:
    """The height and width to which an image is resized."""
    if isinstance(course.size, int):
        scale = factor * course.size / max(height, width)
    else:
        short, long = course.size
        scale = min(factor * short / min(height, width), long / max(height, width))
    return max(round(scale * height), 1), max(round(scale * width), 1)


class Views(Dataset):
    """Prepared images with their objects, by (epoch, row): float32 [3, h, w], and what torchvision calls a target:
    `boxes` float32 [k, 4], `labels` int64 [k] from 1 on, and `masks` uint8 [k, h, w] where there are any.

    seed: of the augmentation; None: the plain images. An image that cannot be read gives its error.
    """

    def __init__(self, job: Job, course: Course, images: BoxImages, seed: int | None):
        self.images, self.course, self.seed = images, course, seed
        self.mean, self.std = job.subject.description["mean"], job.subject.description["std"]
        self.interpolation = F.InterpolationMode(job.subject.preprocessing["interpolation"])

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]] | UserError:
        epoch, row = place
        try:
            image = tv_tensors.Image(self.images.image(row))
        except UserError as error:
            return error
        size = self.images.sizes[row]
        if self.seed is None:
            image = F.resize(image, list(scaled(self.course, *size)), interpolation=self.interpolation)
            return self._normalised(image), {}
        objects = self.images.objects[row]
        kept = ~objects.crowd
        target = {
            "boxes": tv_tensors.BoundingBoxes(objects.boxes[kept], format="XYXY", canvas_size=size),
            "labels": objects.labels[kept] + 1,
        }
        if self.images.masks:
            target["masks"] = tv_tensors.Mask(self.images.decoded_masks(row)[kept])
        return self._augmented(image, target, random.image_keys(self.seed, epoch, torch.tensor([row]), _IMAGES))

    def _augmented(self, image: Tensor, target: dict[str, Tensor], key: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        flip, jitter, top, left = random.uniform(key, 4)[0].tolist()
        low, high = self.course.jitter
        height, width = scaled(self.course, *image.shape[1:], low + (high - low) * jitter)
        shaped = {"image": image, **{name: target[name] for name in ("boxes", "masks") if name in target}}
        for name, part in shaped.items():
            how = {"interpolation": self.interpolation} if name == "image" else {}
            part = F.resize(part, [height, width], **how)
            if isinstance(self.course.size, int) and max(height, width) > self.course.size:
                tall, wide = min(height, self.course.size), min(width, self.course.size)
                part = F.crop(part, round(top * (height - tall)), round(left * (width - wide)), tall, wide)
            shaped[name] = F.horizontal_flip(part) if flip < self.course.flip else part
        image, boxes = shaped.pop("image"), shaped.pop("boxes").as_subclass(Tensor)
        there = (boxes[:, 2:] - boxes[:, :2] >= _LEAST).all(dim=1)
        found = {"boxes": boxes[there], "labels": target["labels"][there]}
        if "masks" in shaped:
            found["masks"] = shaped["masks"].as_subclass(Tensor)[there]
        return self._normalised(image), found

    def _normalised(self, image: Tensor) -> Tensor:
        image = F.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True)
        return F.normalize(image, self.mean, self.std)


def detector(
    job: Job, design: Design, course: Course, images: BoxImages, seed: int, workers: int, saved: Path | None
) -> FasterRCNN:
    """A detector that is trained on the images, with the encoder's weights at first.

    workers: processes that prepare images; 0: this one. saved: where the state is kept; None: nowhere.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(job.subject, design, course.size, len(images.classes), images.masks).to(job.device)
    batch = min(course.batch_size, len(images))
    per_epoch = len(images) // batch
    steps = course.epochs * per_epoch
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[course.optimiser]
    more = {"momentum": 0.9} if course.optimiser == "sgd" else {}
    optimiser = kind(groups(model, course.weight_decay, course.layer_decay), lr=course.lr, **more)
    loader = DataLoader(
        Views(job, course, images, seed),
        batch_sampler=Order(len(images), batch, per_epoch, seed),
        num_workers=workers,
        collate_fn=_readable,
        generator=torch.Generator(),
        persistent_workers=workers > 0,
    )
    micro = min(course.micro_batch or batch, batch)

    def loss_of(views: list[Any]) -> Tensor:
        """The loss of a batch, of which all but the last part is already differentiated."""
        parts = [views[start : start + micro] for start in range(0, len(views), micro)]
        before = torch.zeros((), device=job.device)
        for part in parts:
            loss = _loss(job, model, part) * (len(part) / len(views))
            if part is not parts[-1]:
                loss.backward()
                before += loss.detach()
        return before + loss

    peak = course.lr * batch / course.batch_size
    train(
        job,
        model,
        loader,
        lambda views: loss_of(_or_raise(views)),
        optimiser,
        lambda step: peak * course.rate(step, steps),
        steps,
        seed,
        saved,
        "detector",
        course.clip,
    )
    if course.precise_bn and not job.dry:
        # The same batches where the training was finished before, and the scoring was stopped.
        loader.batch_sampler.epoch = course.epochs - 1
        _measure_norms(job, model, loader, course.precise_bn, seed)
    # Where the scoring is stopped, nothing is trained again.
    unfinished.save(saved, {"epoch": course.epochs, "model": model.state_dict(), "optimiser": optimiser.state_dict()})
    return model.eval()


def _loss(job: Job, model: FasterRCNN, views: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
    images = [image.to(job.device) for image, _ in views]
    targets = [{name: part.to(job.device) for name, part in target.items()} for _, target in views]
    with job.autocast():
        return sum(model(images, targets).values())


@torch.no_grad()
def _measure_norms(job: Job, model: FasterRCNN, loader: DataLoader, batches: int, seed: int) -> None:
    """Sets the statistics of batch norms to their means over batches, with the weights as they are at the end."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # The mean of all batches.
    model.train()
    count = min(batches, len(loader))
    with generators():
        seed_step(seed, -1)
        for views, _ in zip(track(loader, count, "statistics of batch norms"), range(count), strict=False):
            _loss(job, model, _or_raise(views))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def find(job: Job, model: FasterRCNN, course: Course, images: BoxImages, workers: int) -> list[Predicted]:
    """What a detector finds on each of the images."""
    # Images of one shape go through it together, so that none is filled up for another's sake.
    shapes: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(images.sizes):
        shapes.setdefault(model.transform.canvas(*scaled(course, *size)), []).append(row)
    most = job.settings.encode_batch
    batches = [rows[start : start + most] for rows in shapes.values() for start in range(0, len(rows), most)]
    loader = DataLoader(
        Views(job, course, images, None),
        batch_sampler=[[(0, row) for row in rows] for rows in batches],
        num_workers=workers,
        collate_fn=_readable,
        generator=torch.Generator(),
    )
    found: dict[int, Predicted] = {}
    model.eval()
    for rows, views in zip(batches, track(loader, len(batches), "boxes, batches"), strict=True):
        prepared = [image.to(job.device) for image, _ in _or_raise(views)]
        with job.autocast():
            detected = model(prepared)
        for row, image, one in zip(rows, prepared, detected, strict=True):
            found[row] = _in_pixels(one, tuple(image.shape[1:]), images.sizes[row])
    return [found[row] for row in range(len(images))]


def _in_pixels(found: dict[str, Tensor], prepared: tuple[int, int], size: tuple[int, int]) -> Predicted:
    """Detections in the pixels of the image, from those of the prepared one."""
    (h, w), (height, width) = prepared, size
    boxes = found["boxes"].float().cpu() * torch.tensor([width / w, height / h] * 2)
    masks = None
    if "masks" in found:
        encode = coco_tools().mask.encode
        pasted = (
            paste_masks_in_image(mask[None], box[None], size)[0, 0] > 0.5
            for mask, box in zip(found["masks"].float().cpu(), boxes, strict=True)
        )
        masks = [encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in pasted]
    return Predicted(boxes, found["scores"].float().cpu(), found["labels"].cpu() - 1, masks)


def _readable(views: list[Any]) -> list[Any] | UserError:
    """The views of a batch, or the error of one: it is raised where it does not come from another process."""
    return next((view for view in views if isinstance(view, UserError)), views)


def _or_raise(views: list[Any] | UserError) -> list[Any]:
    if isinstance(views, UserError):
        raise views
    return views
