"""Training an encoder with its classifier from end to end: timm's augmentations, mixing and rates by layer.

Everything a step draws is a function of the seed, the epoch and the image or the step, so a training that was stopped
goes on as if it had not been.

Shapes: B images a batch, n images in all, C classes, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from .. import random
from ..errors import UserError
from .protocol import Job, Split
from .training import Order, seed_all, train

#: Keeps what an image draws apart from the order of the images, and from what a step draws.
_IMAGES = -3


@dataclass(frozen=True)
class Recipe:
    """How an encoder is fine-tuned (`FinetuneSettings` has the values of MAE).

    optimiser:     AdamW, or SGD with momentum 0.9.
    lr:            per 256 images where `lr_scale` is linear. head_lr: of the classifier; None: as the encoder's.
    layer_decay:   each layer's rate is that of the layer above it times this; 1: all are alike.
    weight_decay:  not on biases and other 1-D parameters.
    shape:         after the warm-up a cosine down to min_lr, or steps by gamma at each of the milestones.
    drop_path:     of the last block, rising from 0.
    rand_augment:  timm's text for it; None for none. erasing: probability of random erasing.
    smoothing:     of the labels. mixup, cutmix: parameters of their beta distributions; 0: off.
    pool:          of a vision transformer: the mean of the patches with a norm of its own after it, as in MAE's code,
                   the class token, or the encoder's own.
    clip:          of the gradient's norm; None: none.
    """

    epochs: int
    batch_size: int
    optimiser: Literal["adamw", "sgd"]
    lr: float
    lr_scale: Literal["raw", "linear"]
    head_lr: float | None
    min_lr: float
    warmup_epochs: float
    shape: Literal["cosine", "step"]
    milestones: tuple[float, ...]
    gamma: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    crop: tuple[float, float]
    rand_augment: str | None
    erasing: float
    smoothing: float
    mixup: float
    cutmix: float
    pool: Literal["own", "cls", "mean"]
    clip: float | None

    def rate(self, epoch: float, peak: float) -> float:
        """The encoder's rate after `epoch` epochs, a fraction counting, where its highest is `peak`."""
        if epoch < self.warmup_epochs:
            return peak * epoch / self.warmup_epochs
        if self.shape == "step":
            return peak * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-12)
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def classifier(job: Job, recipe: Recipe, seed: int) -> nn.Module:
    """The encoder with a new classifier on it, in timm's form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drop = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
        model = job.subject.create(num_classes=job.num_classes, **drop)
        if not isinstance(model.get_classifier(), nn.Linear):
            raise UserError(f"{job.subject.where}: the classifier of a {type(model).__name__} is not one linear layer")
        if job.subject.vit and recipe.pool != "own":
            if recipe.pool == "cls" and not model.has_class_token:
                raise UserError(f"pool=cls: {job.subject.where} has no class token: give pool=mean")
            model.reset_classifier(job.num_classes, "token" if recipe.pool == "cls" else "avg")
            if recipe.pool == "mean" and isinstance(model.fc_norm, nn.Identity):
                # The pretrained norm is of tokens; the mean of the patches gets one of its own.
                model.norm, model.fc_norm = nn.Identity(), nn.LayerNorm(model.embed_dim, eps=1e-6)
        head = model.get_classifier()
        nn.init.trunc_normal_(head.weight, std=2e-5)  # As in MAE's code.
        nn.init.zeros_(head.bias)
    return model.to(job.device)


def finetune(job: Job, recipe: Recipe, train_on: Split, seed: int, workers: int, saved: Path | None) -> nn.Module:
    """The encoder and a classifier, trained together on the images of `train_on`.

    workers: processes that augment images; 0: this one. saved: where the training stands at the end of each epoch is
    written there, and it goes on from there; None: nothing is written.
    """
    model = classifier(job, recipe, seed)
    batch = min(recipe.batch_size, len(train_on))
    steps = max(len(train_on) // batch, 1)
    scale = batch / 256 if recipe.lr_scale == "linear" else 1.0
    mixing = bool(recipe.mixup or recipe.cutmix) and batch > 1
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=job.num_classes)

    def loss_of(examples: tuple[Tensor, Tensor]) -> Tensor:
        views, targets = (part.to(job.device) for part in examples)
        if mixing:
            even = batch // 2 * 2  # timm mixes pairs.
            views, targets = mix(views[:even], targets[:even])
        with job.autocast():
            scores = job.subject.call(model, views)
            return F.cross_entropy(scores.float(), targets, label_smoothing=0.0 if mixing else recipe.smoothing)

    loader = DataLoader(
        _Augmented(job, recipe, train_on, seed),
        batch_sampler=Order(len(train_on), batch, steps, seed),
        num_workers=workers,
        generator=torch.Generator(),
        persistent_workers=workers > 0,
    )
    total, what = recipe.epochs * steps, "fine-tuning"
    optimiser = _optimiser(model, recipe)

    def rate(step: int) -> float:
        return recipe.rate(step / steps, recipe.lr * scale)

    train(job, model, loader, loss_of, optimiser, rate, total, seed, saved, what, recipe.clip)
    return model


def named(job: Job, model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """The classes that a classifier names for a split's plain images, and the true ones: int64 [n], on the CPU."""
    scores, labels = job.features(split, lambda views: job.subject.call(model, views))
    return scores.argmax(dim=1), labels


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser; `lr_scale` of a group is its rate over that of the encoder's last layer."""
    decay = {"layer_decay": recipe.layer_decay} if recipe.layer_decay < 1 else {}
    more = {"betas": (0.9, 0.999)} if recipe.optimiser == "adamw" else {"momentum": 0.9}
    # timm's `sgd` is Nesterov's; `momentum` is the plain one.
    name = {"adamw": "adamw", "sgd": "momentum"}[recipe.optimiser]
    optimiser = create_optimizer_v2(model, opt=name, lr=1.0, weight_decay=recipe.weight_decay, **decay, **more)
    if recipe.head_lr is None:
        return optimiser
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    groups = []
    for group in optimiser.param_groups:
        for of_head, factor in ((False, 1.0), (True, recipe.head_lr / recipe.lr)):
            parameters = [p for p in group["params"] if (id(p) in head) is of_head]
            if parameters:
                groups.append({**group, "params": parameters, "lr_scale": group.get("lr_scale", 1.0) * factor})
    return type(optimiser)(groups, lr=1.0)


class _Augmented(Dataset):
    """Images augmented by timm, each by its own draw: (epoch, row) -> float32 [3, h, w] and its label."""

    def __init__(self, job: Job, recipe: Recipe, train: Split, seed: int):
        how = job.subject.preprocessing
        self.train, self.seed = train, seed
        self.transform = create_transform(
            how["size"],
            is_training=True,
            scale=recipe.crop,
            color_jitter=0.0,
            auto_augment=recipe.rand_augment,
            interpolation=how["interpolation"],
            mean=job.subject.description["mean"],
            std=job.subject.description["std"],
            re_prob=recipe.erasing,
            re_mode="pixel",
        )
        for step in self.transform.transforms:
            for operation in getattr(step, "ops", ()):
                if operation.aug_fn is auto_augment.posterize:
                    operation.aug_fn = _posterize

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, row = place
        sample = self.train.images.gather(self.train.index[row : row + 1])
        key = random.image_keys(self.seed, epoch, sample.index, _IMAGES)
        seed_all(int(key[0]) % 2**32)
        return self.transform(to_pil_image(sample.images[0].cpu())), int(sample.label)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Of no bits at all, which timm may ask for, nothing is left. Pillow refuses them since its version 13."""
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
